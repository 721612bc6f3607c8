"""Values under an engine's own keys, from Python."""

import hashlib
import select
import threading

import numpy as np
import pytest

import larder
from larder import Op, Reason, State


def key(number, length=32):
    return hashlib.sha512(str(number).encode()).digest()[:length]


def value(number, size):
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, size, dtype=np.uint8)


@pytest.fixture
def client(shared_daemon):
    with larder.Client(shared_daemon.socket, deadline=20) as client:
        yield client


def open_values(client, name, most=1 << 20):
    return larder.Values(
        client,
        model="values",
        weights=hashlib.sha256(name.encode()).digest(),
        cache_dtype="u8",
        value_bytes_max=most,
        engine_layout="test",
        hash_scheme="test",
    )


def test_put_and_get(client):
    values = open_values(client, "put")
    keys = [key(i) for i in range(5)]
    sizes = [1, 63, 64, 4096, 1 << 20]
    assert values.put(keys, [value(i, n) for i, n in enumerate(sizes)]) == bytes(5)
    assert values.put(keys, [value(i, n) for i, n in enumerate(sizes)]) == bytes(5)
    out = [np.zeros(1 << 20, np.uint8) for _ in keys]
    reasons, got = values.get(keys, out)
    assert reasons == bytes(5) and got == sizes
    for i, size in enumerate(sizes):
        assert np.array_equal(out[i][:size], value(i, size))
    ids = values.ids_from_hashes(keys + [key(9)])
    assert list(values.lookup(ids)) == [State.READY] * 5 + [State.MISS]
    while State.UNKNOWN in values.lookup_cached(ids):
        pass
    assert list(values.lookup_cached(ids)) == [State.READY] * 5 + [State.MISS]


def test_pieces_and_raw_addresses(client):
    values = open_values(client, "pieces")
    whole = value(7, 1000)
    pieces = [whole[:100], bytes(whole[100:101]), whole[101:]]
    assert values.put([key(7)], [pieces]) == b"\0"
    out = np.zeros(1000, np.uint8)
    reasons, sizes = values.get([key(7)], [(out.ctypes.data, out.nbytes)])
    assert reasons == b"\0" and sizes == [1000]
    assert np.array_equal(out, whole)
    halves = [bytearray(500), bytearray(500)]
    assert values.get([key(7)], [halves])[0] == b"\0"
    assert halves[0] + halves[1] == whole.tobytes()


def test_misses(client):
    values = open_values(client, "misses")
    values.put([key(1)], [value(1, 100)])
    out = [bytearray(b"x" * 100) for _ in range(2)]
    reasons, sizes = values.get([key(0), key(1)], out)
    assert [Reason(r) for r in reasons] == [Reason.NEVER_SEEN, Reason.NONE]
    assert sizes == [0, 100] and out[0] == b"x" * 100
    reasons, _ = values.get([key(0), key(1)], out, prefix=True)
    assert Reason(reasons[1]) == Reason.NOT_TRIED
    reasons, _ = values.get([key(1)], [bytearray(99)])  # too small
    assert Reason(reasons[0]) == Reason.NOT_TRIED
    reasons = values.put([key(2)], [bytes((1 << 20) + 1)])
    assert reasons[0] != 0


def test_submitted(client):
    values = open_values(client, "submitted")
    queue = client.queue()
    count = 50
    for i in range(count):
        # The queue keeps the buffer alive.
        values.submit_put(queue, [key(i)], [value(i, 5000)], user_data=i)
    done = set()
    while len(done) < count:
        assert select.select([queue], [], [], 60)[0]
        for completion in queue.poll():
            assert completion.op == Op.PUT and completion.per_key == b"\0"
            done.add(completion.user_data)
    assert done == set(range(count))
    outs = [np.zeros(5000, np.uint8) for _ in range(count)]
    values.submit_get(queue, [key(i) for i in range(count)], outs, user_data="all")
    (completion,) = queue.poll(wait=60)
    assert completion.good == count and completion.sizes == [5000] * count
    for i in range(count):
        assert np.array_equal(outs[i], value(i, 5000))
    ids = values.ids_from_hashes([key(i) for i in range(count)])
    values.submit_delete(queue, ids)
    (completion,) = queue.poll(wait=60)
    assert completion.op == Op.DELETE and completion.good == count
    values.submit_lookup(queue, ids)
    (completion,) = queue.poll(wait=60)
    assert completion.per_key == bytes(count)  # all State.MISS


def test_a_queue_dropped_with_work_under_way(client):
    values = open_values(client, "dropped", 8 << 20)
    for _ in range(20):
        queue = client.queue()
        for i in range(4):
            values.submit_put(queue, [key(i)], [value(i, 1 << 20)])
            values.submit_get(queue, [key(i)], [bytearray(1 << 20)])
        del queue


def test_refuses_nonsense(client):
    values = open_values(client, "nonsense")
    queue = client.queue()
    with pytest.raises(ValueError, match="one length"):
        values.put([b"a", b"bb"], [b"", b""])
    with pytest.raises(ValueError, match="1 to 64"):
        values.put([bytes(65)], [b""])
    with pytest.raises(ValueError, match="for each key"):
        values.put([b"a"], [])
    with pytest.raises(ValueError, match="as many pieces"):
        values.put([b"a", b"b"], [[b"1", b"2"], [b"3"]])
    with pytest.raises(BufferError):
        values.get([b"a"], [b"read only"])
    with pytest.raises(TypeError):
        values.submit_get(queue, [b"a"], ["text"])
    with pytest.raises(ValueError, match="contiguous"):
        values.put([b"a"], [np.zeros((4, 4))[:, 1]])
    assert queue.pending == 0


def test_threads_with_queues_of_their_own(client):
    values = open_values(client, "threads")
    wrong = []

    def work(number):
        try:
            queue = client.queue()
            for i in range(30):
                values.submit_put(queue, [key((number, i))], [value(i, 3000)])
                out = np.zeros(3000, np.uint8)
                (put,) = queue.poll(wait=60)
                assert put.per_key == b"\0"
                values.submit_get(queue, [key((number, i))], [out])
                (got,) = queue.poll(wait=60)
                assert got.good == 1 and np.array_equal(out, value(i, 3000))
        except BaseException as error:  # noqa: BLE001: for the main thread
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_exact_size(client):
    values = open_values(client, "exact")
    assert values.put([key(1)], [value(1, 1000)]) == bytes(1)
    for size in (999, 1000, 1001):
        out = np.full(size, 0xEE, np.uint8)
        reasons, sizes = values.get([key(1)], [out], exact=True)
        if size == 1000:
            assert reasons == bytes(1) and sizes == [1000]
        else:
            assert reasons == bytes([Reason.NOT_TRIED]) and sizes == [0]
            assert (out == 0xEE).all()

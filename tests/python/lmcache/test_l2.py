"""LMCache's MP mode: the native_plugin L2 adapter, through LMCache's registry."""

import pathlib
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from l2 import UNTOUCHED, Controllers, content, key, memory, spec
from patience import under_kills, until

import larder
from larder._engine import weights_digest
from larder.lmcache import L2Connector

HERE = pathlib.Path(__file__).resolve().parent
DOCS = HERE.parents[2] / "client" / "python" / "docs" / "lmcache.md"
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def connect():
    """Adapters that are closed after the test."""
    made = []

    def make(daemon, **params):
        socket = daemon if isinstance(daemon, str) else daemon.socket
        made.append(Controllers(spec(socket, **params)))
        return made[-1]

    yield make
    for controllers in made:
        controllers.close()


def everything_durable(daemon):
    with larder.Client(daemon.socket) as client:
        until(lambda: client.usage()["durable_backlog"] == 0)


def test_the_documented_line(daemon):
    (line,) = re.findall(r"--l2-adapter '(\{.*?\})'", DOCS.read_text(), re.DOTALL)
    assert line.count("/run/larder/larderd.sock") == 1
    controllers = Controllers(line.replace("/run/larder/larderd.sock", daemon.socket))
    try:
        assert controllers.store([key(1)], [100 * KIB])
        assert controllers.load([key(1)], [100 * KIB]) == [True]
    finally:
        controllers.close()
    assert "lmcache" in daemon.larder("spaces")


@pytest.mark.parametrize(
    "size", [1, 63, 64, 65, 4096, 64 * KIB + 1, MIB, 32 * MIB, 32 * MIB + 7]
)
def test_what_was_stored_is_loaded(shared_daemon, connect, size):
    one = connect(shared_daemon, weights=f"size {size}@1")
    count = 3 if size > MIB else 20
    keys = [key(i) for i in range(count)]
    assert one.lookup(keys) == [False] * count
    assert one.load(keys, [size] * count) == [False] * count
    assert one.store(keys, [size] * count)
    assert one.store(keys, [size] * count)  # there already is success
    assert one.lookup([*keys, key(-1)]) == [True] * count + [False]
    assert one.load([key(-1), *keys], [size] * (count + 1)) == [False] + [True] * count


def test_sizes_may_differ_within_a_batch(shared_daemon, connect):
    one = connect(shared_daemon, weights="mixed sizes@1")
    sizes = [1, 5 * MIB, 64, 100_000]
    keys = [key(i) for i in range(4)]
    assert one.store(keys, sizes)
    assert one.load(keys, sizes) == [True] * 4


def test_another_size_is_a_miss_that_touches_nothing(shared_daemon, connect):
    one = connect(shared_daemon, weights="geometry@1")
    assert one.store([key(1)], [MIB])
    for size in (1, MIB // 2, MIB - 1, MIB + 1, 2 * MIB):
        assert one.load([key(1)], [size]) == [False]
    assert one.load([key(1)], [MIB]) == [True]


def test_a_serde_that_fills_its_buffer_partly(shared_daemon, connect):
    one = connect(shared_daemon, weights="serde@1", exact=False)
    assert one.store([key(1)], [1000])
    into = np.full(4096, UNTOUCHED, np.uint8)
    task = one.adapter.submit_load_task([key(1)], [memory(into)])
    found = []
    until(lambda: found.append(one.adapter.query_load_result(task)) or found[-1])
    assert found[-1].test(0)
    assert np.array_equal(into[:1000], content(key(1), 1000))


@pytest.mark.parametrize(
    "other",
    [
        {"weights": "test/model@2"},
        {"cache_dtype": "fp8_e4m3"},
        {"parallel": "pp2"},
        {"kv_scales": "scales@1"},
        {"rope": "yarn:4"},
        {"value_bytes_max": 128 * MIB},
    ],
)
def test_what_is_not_interchangeable_is_not_shared(shared_daemon, connect, other):
    first, second = connect(shared_daemon), connect(shared_daemon, **other)
    keys = [key(100 + i) for i in range(4)]
    assert first.store(keys, [64 * KIB] * 4)
    assert second.lookup(keys) == [False] * 4
    assert second.load(keys, [64 * KIB] * 4) == [False] * 4


def test_weights_are_read_or_named(shared_daemon, connect, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"weighty")
    digest = weights_digest(str(tmp_path / "other")).hex()
    made = [
        connect(shared_daemon, weights=weights)
        for weights in (str(tmp_path / "other"), digest, str(tmp_path), "other@1")
    ]
    assert made[0].store([key(1)], [4096])
    assert [one.lookup([key(1)]) for one in made] == [[True]] * 2 + [[False]] * 2


def test_keys_that_differ_in_any_field_are_others(shared_daemon, connect):
    one = connect(shared_daemon, weights="fields@1")
    keys = [
        key(1),
        key(2),
        key(1, model="test/model2"),
        key(1, kv_rank=0x02000200),
        key(1, object_group_id=1),
        key(1, cache_salt="tenant"),
        key(1, cache_salt="tenant2"),
        key(1, model="m" * 300, cache_salt="ü" * 128),
        key(1, model="模型"),
    ]
    for number, k in enumerate(keys):
        assert one.lookup(keys) == [i < number for i in range(len(keys))]
        assert one.store([k], [4096])
    assert one.load(keys, [4096] * len(keys)) == [True] * len(keys)


def test_tenants_do_not_meet(make_daemon, connect, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("red red-token-0123456789\nblue blue-token-0123456789\n")
    tokens.chmod(0o600)
    daemon = make_daemon(f"--server.tokens_file={tokens}")
    red = connect(daemon, token="red-token-0123456789")
    blue = connect(daemon, token="blue-token-0123456789")
    assert red.store([key(1)], [4096])
    assert blue.lookup([key(1)]) == [False]
    refused = connect(daemon, token="no-such-token-0123456789")
    assert not refused.store([key(2)], [4096])
    assert refused.load([key(1)], [4096]) == [False]


def in_another_process(daemon, verb, first, count, size):
    done = subprocess.run(
        [sys.executable, HERE / "other_process.py", daemon.socket, verb,
         str(first), str(count), str(size)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_another_process_reads_what_one_stored(daemon, connect):
    assert in_another_process(daemon, "store", 0, 10, MIB) == "stored"
    one = connect(daemon)
    assert one.load([key(i) for i in range(11)], [MIB] * 11) == [True] * 10 + [False]
    assert one.store([key(20)], [MIB])
    assert in_another_process(daemon, "load", 20, 1, MIB) == "loaded 1"


def test_what_was_durable_survives_sigkill(daemon, connect):
    one = connect(daemon)
    keys = [key(i) for i in range(40)]
    assert one.store(keys, [MIB] * 40)
    everything_durable(daemon)
    daemon.kill()
    assert one.lookup(keys) == [False] * 40
    daemon.start()
    # The adapter that saw it die, and a process that did not.
    until(lambda: one.lookup(keys) == [True] * 40)
    assert one.load(keys, [MIB] * 40) == [True] * 40
    assert in_another_process(daemon, "load", 0, 40, MIB) == "loaded 40"


def test_sigkill_under_load(daemon, connect):
    """Two controller threads; whatever is loaded is right, nothing hangs."""
    one = connect(daemon, deadline=5.0)
    slowest, hits = [0.0], [0]
    batch, size = 8, 256 * KIB

    def bounded(call):
        begin = time.monotonic()
        answer = call()
        slowest[0] = max(slowest[0], time.monotonic() - begin)
        return answer

    def store(number):
        keys = [key((number * batch + i) % 400) for i in range(batch)]
        bounded(lambda: one.store(keys, [size] * batch))

    def prefetch(number):
        keys = [key((number * 37 + i * 11) % 400) for i in range(batch)]
        bounded(lambda: one.lookup(keys))
        loaded = bounded(lambda: one.load(keys, [size] * batch))
        hits[0] += sum(loaded)

    under_kills(daemon, [store, prefetch], lambda: hits[0], times=4, pause=0.7)
    assert slowest[0] < 7
    assert hits[0] > 50


def test_a_daemon_that_comes_later(make_daemon, connect):
    daemon = make_daemon()
    daemon.end()
    one = connect(daemon)
    begin = time.monotonic()
    for number in range(100):
        assert not one.store([key(number)], [4096])
        assert one.lookup([key(number)]) == [False]
        assert one.load([key(number)], [4096]) == [False]
    one.adapter.delete([key(1)])
    assert time.monotonic() - begin < 10  # misses, not waits
    assert one.adapter.report_status()["is_healthy"]
    daemon.start()
    until(lambda: one.store([key(1)], [4096]))
    assert one.load([key(1)], [4096]) == [True]


def test_a_daemon_that_does_not_answer(daemon, connect):
    one = connect(daemon, deadline=1.0)
    assert one.store([key(1)], [MIB])
    daemon.freeze()
    try:
        begin = time.monotonic()
        assert one.lookup([key(1)]) == [False]
        assert one.load([key(1)], [MIB]) == [False]
        assert not one.store([key(2)], [MIB])
        assert time.monotonic() - begin < 6
        begin = time.monotonic()
        late = connect(daemon, deadline=1.0)
        assert late.lookup([key(1)]) == [False]
        assert time.monotonic() - begin < 6
    finally:
        daemon.thaw()
    until(lambda: one.load([key(1)], [MIB]) == [True])
    until(lambda: late.load([key(1)], [MIB]) == [True])


def test_delete(shared_daemon, connect):
    one = connect(shared_daemon, weights="delete@1")
    keys = [key(i) for i in range(6)]
    assert one.store(keys, [1000] * 6)
    assert one.adapter.get_usage().total_bytes_used == 6000
    one.adapter.delete(keys[:2] + [key(99)])
    assert one.lookup(keys) == [False] * 2 + [True] * 4
    assert one.adapter.get_usage().total_bytes_used == 4000
    assert one.store(keys, [1000] * 6)
    assert one.load(keys, [1000] * 6) == [True] * 6


def test_hostile_batches(shared_daemon, connect):
    one = connect(shared_daemon, weights="hostile@1", value_bytes_max=16 * MIB)
    assert one.store([], []) and one.lookup([]) == [] and one.load([], []) == []
    same = [key(1)] * 5
    assert one.store(same, [4096] * 5)
    assert one.load(same, [4096] * 5) == [True] * 5
    # Over value_bytes_max: not stored, and its neighbours are.
    keys = [key(i) for i in (10, 11, 12)]
    assert not one.store(keys, [4096, 17 * MIB, 4096])
    assert one.load(keys, [4096, 17 * MIB, 4096]) == [True, False, True]
    many = [key(i) for i in range(1000, 6000)]
    assert one.store(many, [64] * 5000)
    assert one.lookup(many) == [True] * 5000
    assert one.load(many, [64] * 5000) == [True] * 5000


def test_larger_than_memory(make_daemon, connect):
    daemon = make_daemon("--dram.capacity=128MiB", "--dram.slab=64MiB")
    one = connect(daemon)
    # Larger than a record can be there.
    assert not one.store([key(1)], [200 * MIB])
    assert one.load([key(1)], [200 * MIB]) == [False]
    keys = [key(i) for i in range(64)]
    for i in range(0, 64, 8):
        one.store(keys[i : i + 8], [4 * MIB] * 8)
    everything_durable(daemon)
    loaded = [one.load(keys[i : i + 8], [4 * MIB] * 8) for i in range(0, 64, 8)]
    assert sum(map(sum, loaded)) >= 48  # 256 MiB in all, mostly from NVMe


def drained(connector, futures):
    """Completions by number, as LMCache's demultiplexer takes them."""
    done = {}
    end = time.monotonic() + 60
    while not set(futures) <= done.keys():
        assert time.monotonic() < end
        for number, *rest in connector.drain_completions():
            assert number not in done
            done[number] = rest
        time.sleep(0.001)
    return done


def make_connector(daemon, **params):
    socket = daemon if isinstance(daemon, str) else daemon.socket
    about = {"weights": "w@1", "cache_dtype": "bf16", "parallel": "tp1"}
    return L2Connector(**about, socket=socket, **params)


def test_more_submissions_than_the_queue_holds(shared_daemon):
    connector = make_connector(shared_daemon, workers=1)
    data = np.zeros(64, np.uint8)
    futures = [
        connector.submit_batch_set([f"many{i}"], [memoryview(data)])
        for i in range(6000)
    ]
    done = drained(connector, futures)
    # What found no room was refused, and said so.
    assert sum(ok for ok, _, _ in done.values()) >= 4096
    assert all(ok == all(good) for ok, _, good in done.values())
    connector.close()


def test_four_threads_submit(shared_daemon):
    connector = make_connector(shared_daemon)
    futures = [[] for _ in range(4)]

    def submit(mine):
        data = memoryview(content(key(mine), 10_000))
        for number in range(200):
            names = [f"thread {mine} {number} {i}" for i in range(4)]
            futures[mine].append(connector.submit_batch_set(names, [data] * 4))
            futures[mine].append(connector.submit_batch_exists(names))

    threads = [threading.Thread(target=submit, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = sum(futures, [])
    assert len(set(numbers)) == 1600
    done = drained(connector, numbers)
    assert all(len(good) == 4 for _, _, good in done.values())
    connector.close()


def test_keys_and_batches_that_lmcache_would_not_send(shared_daemon):
    connector = make_connector(shared_daemon)
    names = ["", "\0", "\ud800", "x" * 100_000]
    data = [memoryview(content(key(i), 500)) for i in range(4)]
    stored = connector.submit_batch_set(names, data)
    assert drained(connector, [stored])[stored] == [True, "", [True] * 4]
    into = [np.full(500, UNTOUCHED, np.uint8) for _ in names]
    loaded = connector.submit_batch_get(names, [memoryview(d) for d in into])
    assert drained(connector, [loaded])[loaded] == [True, "", [True] * 4]
    assert all(np.array_equal(d, content(key(i), 500)) for i, d in enumerate(into))
    # More keys than buffers, and memory that cannot be written.
    short = connector.submit_batch_get(names, [memoryview(into[0])])
    fixed = connector.submit_batch_get(["\0"], [memoryview(bytes(500))])
    done = drained(connector, [short, fixed])
    assert not done[short][0] and done[short][2] == [False] * 4
    assert not done[fixed][0] and done[fixed][2] == [False]
    connector.close()


def test_close_is_idempotent_and_ends_everything(daemon):
    connector = make_connector(daemon)
    into = [np.full(MIB, UNTOUCHED, np.uint8) for _ in range(16)]
    names = [f"close {i}" for i in range(16)]
    for _ in range(20):
        connector.submit_batch_set(names, [memoryview(data) for data in into])
        connector.submit_batch_get(names, [memoryview(data) for data in into])
    begin = time.monotonic()
    connector.close()
    assert time.monotonic() - begin < 10
    for data in into:
        data.fill(1)
    time.sleep(0.3)
    assert all((data == 1).all() for data in into)
    connector.close()
    # Not that LMCache would, but it must do no harm.
    connector.submit_batch_exists(names)
    connector.submit_batch_set(names, [memoryview(data) for data in into])
    connector.close()


def test_close_without_a_daemon(tmp_path):
    for _ in range(20):
        connector = make_connector(str(tmp_path / "no"))
        connector.submit_batch_exists(["a"])
        connector.close()
        connector.close()


@pytest.mark.parametrize(
    "params",
    [
        {"weights": ""},
        {"weights": "no/such model"},
        {"cache_dtype": ""},
        {"parallel": ""},
        {"deadline": 0},
        {"deadline": 1e9},
        {"workers": 0},
        {"value_bytes_max": -1},
    ],
)
def test_parameters_that_cannot_be_right_are_refused(tmp_path, params):
    with pytest.raises(ValueError):
        Controllers(spec(str(tmp_path / "no"), **params))


def test_parameters_that_are_misspelt_are_refused(tmp_path):
    with pytest.raises(TypeError):
        Controllers(spec(str(tmp_path / "no"), sokcet="/run"))

"""Spaces of KV from Python, against a real daemon. What is read must be what its
key says."""

import hashlib
import math
import pathlib
import select
import threading

import numpy as np
import pytest

import larder
from larder import Group, GroupKind, Layout, Reason, Stage, State

LAYERS, HEADS, DIM, BLOCK, CHUNK = 3, 2, 64, 16, 64
BLOCKS = 40


def open_space(client, weights=b"w", **changes):
    about = dict(
        model="test",
        weights=hashlib.sha256(weights).digest(),
        cache_dtype="fp16",
        block_tokens=BLOCK,
        chunk_tokens=CHUNK,
        rope="none",
        engine_layout="test",
        groups=[
            Group(
                GroupKind.FULL_ATTENTION,
                f"0-{LAYERS - 1}",
                layer_count=LAYERS,
                kv_heads=HEADS,
                k_head_bytes=2 * DIM,
                v_head_bytes=2 * DIM,
            )
        ],
    )
    return larder.Space(client, **(about | changes))


def content(seed, layer, tokens):
    """K and V that are right for (seed, layer): [2, tokens, heads, dim]."""
    name = f"{seed}/{layer}".encode()
    rng = np.random.default_rng(np.frombuffer(hashlib.sha256(name).digest(), "<u8"))
    return rng.standard_normal((2, tokens, HEADS, DIM)).astype(np.float16)


def new_cache():
    """An engine's paged cache: [layer][K|V] -> [block, token, head, dim]."""
    return [
        [np.zeros((BLOCKS, BLOCK, HEADS, DIM), np.float16) for _ in range(2)]
        for _ in range(LAYERS)
    ]


def paged(cache):
    return larder.PagedCache([k for k, _ in cache], [v for _, v in cache], "BNHC")


def fill(cache, seed, blocks):
    for layer, planes in enumerate(cache):
        kv = content(seed, layer, len(blocks) * BLOCK)
        for plane, rows in zip(planes, kv):
            plane[blocks] = rows.reshape(len(blocks), BLOCK, HEADS, DIM)


def assert_holds(cache, seed, blocks, usable_blocks, total):
    for layer, planes in enumerate(cache):
        kv = content(seed, layer, total * BLOCK)
        for plane, rows in zip(planes, kv):
            got = plane[blocks[:usable_blocks]].reshape(-1, HEADS, DIM)
            assert np.array_equal(got, rows[: usable_blocks * BLOCK])


def save_prompt(space, tokens, seed):
    ids = space.ids(tokens)
    per_chunk = CHUNK // BLOCK
    blocks = list(range(len(tokens) // BLOCK))[::-1]
    cache = new_cache()
    fill(cache, seed, blocks)
    where = paged(cache)
    for i in range(len(ids)):
        is_tail = i == len(ids) - 1 and ids.tail_tokens
        save = space.save(ids[i], token_count=ids.tail_tokens if is_tail else 0)
        assert save is not None
        save.gather(where.blocks(blocks[i * per_chunk : (i + 1) * per_chunk]))
        save.commit(token_begin=i * CHUNK, parent=ids[i - 1] if i else None)
        save.wait(Stage.VOLATILE)
    return ids


@pytest.fixture
def client(shared_daemon):
    with larder.Client(shared_daemon.socket, name="test") as client:
        yield client


def test_saves_and_loads_a_prompt_with_its_tail(client):
    space = open_space(client)
    tokens = list(range(3 * CHUNK + 2 * BLOCK + 5))
    assert space.match(space.ids(tokens)).usable == 0
    ids = save_prompt(space, tokens, "prompt")
    assert len(ids) == 4 and ids.tail_tokens == 2 * BLOCK

    match = space.match(ids)
    assert match.usable == 4 and match.reason == Reason.NONE
    assert list(match.states) == [State.READY] * 4
    cached = None
    while cached is None:
        cached = space.match_cached(ids)
    assert cached.usable == 4

    # The second time nothing need be saved.
    assert space.save(ids[0]) is None

    cache = new_cache()
    blocks = [7, 3, 21, 0, 11, 5, 6, 1, 2, 33, 39, 17, 8, 9]
    with space.hold(ids) as hold:
        assert hold.usable == 4 and hold.valid
        loaded = space.load(ids, [paged(cache).blocks(blocks)], hold=hold)
    assert loaded.usable == 4 and loaded.tokens == 3 * CHUNK + 2 * BLOCK
    assert_holds(cache, "prompt", blocks, 14, 14)


def test_slots_arrays_and_a_started_load(client):
    space = open_space(client, b"slots")
    tokens = np.arange(2 * CHUNK, dtype=np.int64) + 1000
    ids = save_prompt(space, tokens, "slots")
    cache = new_cache()
    slots = np.arange(2 * CHUNK, dtype=np.int64) + 5 * BLOCK
    queue = client.queue()
    load = space.start_load(
        ids,
        [paged(cache).slots(slots)],
        layerwise=True,
        queue=queue,
        user_data="mine",
    )
    for layer in range(LAYERS):
        assert load.wait_layer(layer)
    assert load.layers_ready == LAYERS
    assert load.wait().usable == 2
    assert select.select([queue], [], [], 60)[0]
    (done,) = queue.poll()
    assert (done.op, done.user_data, done.good) == (larder.Op.LOAD, "mine", 2)
    assert bytes(done.per_key) == bytes(2)
    assert queue.pending == 0
    assert_holds(cache, "slots", list(range(5, 13)), 8, 8)


def test_a_load_that_watches_its_link(client):
    space = open_space(client, b"stream")
    tokens = list(range(2 * CHUNK))
    ids = save_prompt(space, tokens, "stream")
    cache = new_cache()
    views = [paged(cache).blocks(list(range(8)))]
    assert space.load(ids, views).stream is None
    for loaded in (
        space.load(ids, views, stream=larder.Stream()),
        space.start_load(ids, views, stream=larder.Stream(first_token=4)).wait(),
    ):
        assert loaded.usable == 2
        stream = loaded.stream
        assert not stream["cut"] and stream["predicted_usable"] == 2
        # All of it was in memory.
        assert stream["byte_count"] == 0 and stream["goodput"] == 0
        assert stream["time"] >= stream["predicted_at"] >= 0
        assert [one["brought"] for one in stream["chunks"]] == [True, True]
        assert [one["planes"] for one in stream["chunks"]] == [1, 1]
    assert_holds(cache, "stream", list(range(8)), 8, 8)
    with pytest.raises(larder.InvalidArgument):
        space.load(ids, views, each=True, stream=larder.Stream())
    with pytest.raises(larder.InvalidArgument):
        space.load(ids, views, stream=larder.Stream(prefill_token=-1))


def test_a_miss_is_a_shorter_prefix_with_a_reason(client):
    space = open_space(client, b"miss")
    tokens = list(range(3 * CHUNK))
    ids = save_prompt(space, tokens, "miss")
    assert space.delete(larder.Ids([ids[1]])) == 1
    cache = new_cache()
    where = paged(cache).blocks(list(range(12)))
    loaded = space.load(ids, [where])
    assert loaded.usable == 1
    assert Reason(loaded.reason) == Reason.EVICTED
    each = space.load(ids, [where], each=True)
    assert [Reason(r) for r in each.reasons] == [
        Reason.NONE,
        Reason.EVICTED,
        Reason.NONE,
    ]
    reason, text = space.why_miss(ids[1])
    assert reason == Reason.EVICTED and text
    assert space.hold(larder.Ids([bytes(32)])) is None


def test_reads_in_place(client):
    space = open_space(client, b"map")
    ids = save_prompt(space, list(range(CHUNK)), "map")
    hold = space.hold(ids)
    (piece,) = hold.map(0, layer=1)
    k = np.frombuffer(piece["k"], np.float16).reshape(HEADS, CHUNK, DIM)
    assert np.array_equal(k.transpose(1, 0, 2), content("map", 1, CHUNK)[0])
    assert memoryview(piece["k"]).readonly
    # The hold lives as long as somebody looks.
    hold.close()
    with pytest.raises(ValueError):
        hold.renew()
    assert k[0, 0, 0] == content("map", 1, CHUNK)[0][0, 0, 0]


def test_fills_staging_directly(client):
    space = open_space(client, b"staging")
    ids = space.ids(list(range(CHUNK)))
    save = space.save(ids[0])
    for layer in range(LAYERS):
        window = np.frombuffer(save.segment(layer), np.float16)
        assert len(window) == 2 * HEADS * CHUNK * DIM
        window[:] = content("staging", layer, CHUNK).transpose(0, 2, 1, 3).ravel()
    save.commit()
    save.wait(Stage.VOLATILE)
    cache = new_cache()
    assert space.load(ids, [paged(cache).blocks([4, 3, 2, 1])]).usable == 1
    assert_holds(cache, "staging", [4, 3, 2, 1], 4, 4)


def test_segments_as_they_are_kept(client):
    space = open_space(client, b"segments")
    ids = save_prompt(space, list(range(CHUNK)), "segments")
    size = 2 * HEADS * CHUNK * DIM * 2
    buffers = [bytearray(size), None, np.zeros(size, np.uint8)]
    assert space.load(ids, [larder.segments(buffers)]).usable == 1
    for layer in (0, 2):
        kept = content("segments", layer, CHUNK).transpose(0, 2, 1, 3)
        assert bytes(buffers[layer]) == kept.tobytes()
    with pytest.raises(ValueError, match="holds less"):
        space.load(ids, [larder.segments([bytearray(10)] * 3)])
    with pytest.raises(ValueError, match="one buffer per"):
        space.load(ids, [larder.segments([bytearray(size)])])


def test_refuses_what_cannot_be_right(client):
    with pytest.raises(larder.InvalidArgument, match="model"):
        open_space(client, model="")
    with pytest.raises(ValueError, match="32 bytes"):
        larder.Space(
            client, model="m", weights=b"short", cache_dtype="f", block_tokens=1,
            groups=[], rope="n", engine_layout="e",
        )
    one = open_space(client, b"one")
    with pytest.raises(larder.Mismatch, match="cache_dtype"):
        open_space(client, b"one", cache_dtype="bf16", expect=one.encoding)
    with pytest.raises(ValueError):
        one.match(larder.Ids([b"x"]))
    with pytest.raises(TypeError):
        one.ids("text")
    with pytest.raises(TypeError):
        one.ids(np.zeros(4, np.float32))
    with pytest.raises(ValueError):
        one.match(one.ids([1] * CHUNK), deadline=-1)
    ids = one.ids([1] * CHUNK)
    with pytest.raises(larder.InvalidArgument):  # a block outside the cache
        one.save(ids[0]).gather(paged(new_cache()).blocks([BLOCKS] * 4))
    with pytest.raises(ValueError, match="every dimension"):
        larder.PagedCache([np.zeros((2, 2))], None, "BNHC")
    with pytest.raises(ValueError, match="contiguous"):
        larder.PagedCache([np.zeros((4, 4, 2, 8))[..., ::2]], None, "BNHC")


def test_a_daemon_that_is_gone(daemon):
    client = larder.Client(daemon.socket, deadline=5)
    space = open_space(client)
    tokens = list(range(2 * CHUNK))
    ids = save_prompt(space, tokens, "gone")
    while daemon.larder("status", "--json").find('"durable_backlog": 0') < 0:
        if client.usage()["durable_backlog"] == 0:
            break
    daemon.kill()
    with pytest.raises(larder.Unavailable):
        client.ping()
    with pytest.raises(ConnectionError):  # the same, by Python's own name
        space.match(ids)
    cache = new_cache()
    loaded = space.load(ids, [paged(cache).blocks(list(range(8)))])
    assert loaded.usable == 0 and loaded.status < 0
    daemon.start()
    while True:
        try:
            client.ping()
            break
        except larder.Unavailable:
            pass
    loaded = space.load(ids, [paged(cache).blocks(list(range(8)))], deadline=math.inf)
    assert loaded.usable == 2
    assert_holds(cache, "gone", list(range(8)), 8, 8)
    with pytest.raises(larder.Unavailable):
        larder.Client(str(pathlib.Path(daemon.folder, "nobody")))


def test_many_threads_share_a_client(client):
    space = open_space(client, b"threads")
    wrong = []

    def work(number):
        try:
            tokens = [number * 1000 + i for i in range(2 * CHUNK)]
            ids = save_prompt(space, tokens, f"t{number}")
            cache = new_cache()
            loaded = space.load(ids, [paged(cache).blocks(list(range(8)))])
            assert loaded.usable == 2
            assert_holds(cache, f"t{number}", list(range(8)), 8, 8)
        except BaseException as error:  # noqa: BLE001: for the main thread
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_handles_may_go_in_any_order(shared_daemon):
    client = larder.Client(shared_daemon.socket)
    space = open_space(client, b"order")
    ids = save_prompt(space, list(range(CHUNK)), "order")
    hold = space.hold(ids)
    queue = client.queue()
    space.submit_match(queue, ids)
    client.close()
    with pytest.raises(ValueError, match="closed"):
        client.ping()
    del client
    del space
    assert hold.valid
    del queue
    hold.close()


def test_lists_what_is_there(client):
    space = open_space(client, b"list")
    ids = save_prompt(space, list(range(3 * CHUNK)), "list")
    seen, cursor, more = [], None, True
    while more:
        page, more = space.list(cursor, limit=2)
        seen += [entry["id"] for entry in page]
        cursor = page[-1]["id"]
        assert all(entry["tokens"] == CHUNK for entry in page)
    assert sorted(seen) == sorted(ids[i] for i in range(3))
    assert list(ids[1:]) == [ids[1], ids[2]] and ids[:1] + ids[1:] == ids


@pytest.mark.parametrize("kind", [GroupKind.FULL_ATTENTION, GroupKind.RECURRENT_STATE])
def test_opaque_pages(client, kind):
    page = 4096
    # A state is one row, however many tokens led to it.
    rows = 1 if kind == GroupKind.RECURRENT_STATE else BLOCK
    space = open_space(
        client,
        f"opaque {kind}".encode(),
        block_tokens=BLOCK,
        chunk_tokens=BLOCK,
        groups=[
            Group(
                kind,
                "0-1",
                layer_count=2,
                kv_heads=1,
                k_head_bytes=page // rows,
                v_head_bytes=0,
                layout=Layout.OPAQUE,
            )
        ],
    )
    layers = [np.arange(8 * page, dtype=np.uint32).astype(np.uint8).reshape(8, page)
              * (i + 3) for i in range(2)]
    ids = space.ids(list(range(BLOCK)))
    save = space.save(ids[0])
    save.gather(larder.PagedCache(layers, None, "BC").blocks([5]))
    save.commit()
    save.wait(Stage.VOLATILE)
    there = [np.zeros((8, page), np.uint8) for _ in range(2)]
    where = larder.PagedCache(there, None, "BC").blocks([2])
    assert space.load(ids, [where]).usable == 1
    for layer in range(2):
        assert np.array_equal(there[layer][2], layers[layer][5])


def test_an_explained_miss(client):
    space = open_space(client, b"explained")
    tokens = list(range(CHUNK))
    ids = space.ids(tokens)
    root = larder.root_content(tokens)
    save = space.save(ids[0])
    for layer in range(LAYERS):
        memoryview(save.segment(layer))[:] = bytes(len(save.segment(layer)))
    save.commit(root_content=root)
    save.wait()
    other = open_space(client, b"explained", cache_dtype="bf16")
    match = other.match(other.ids(tokens), root_content=root)
    assert match.usable == 0 and match.reason == Reason.SPACE_DIFFERS
    _, text = other.why_miss(other.ids(tokens)[0], root)
    assert "cache_dtype" in text


def test_epochs_and_keys(client):
    space = open_space(client, b"epochs")
    tokens = list(range(CHUNK))
    salted = space.ids(tokens, [(larder.KeyKind.SALT, b"alice", 0)])
    assert salted != space.ids(tokens)
    ids = save_prompt(space, tokens, "epochs")
    before = space.epoch
    assert space.match(ids).usable == 1
    assert space.advance_epoch() == before + 1
    match = space.match(ids)
    assert match.usable == 0 and match.reason == Reason.EPOCH


def test_finds_a_prompt_behind_the_callers_back(client):
    space = open_space(client, b"find")
    tokens = list(range(7000, 7005 + 3 * CHUNK + 2 * BLOCK))
    find = space.start_find(tokens)
    missed = find.wait(20)
    assert find.ended and missed.status == 0
    assert missed.tokens == 0 and missed.hold is None
    assert missed.reason == Reason.NEVER_SEEN
    ids = save_prompt(space, tokens, "find")

    queue = client.queue()
    find = space.start_find(tokens + [1] * CHUNK, queue=queue, user_data="mine")
    completion = None
    while completion is None:
        completion = next(iter(queue.poll(wait=20)), None)
    assert completion.op == larder.Op.FIND and completion.user_data == "mine"
    assert completion.job == find.job and completion.good == 3 * CHUNK + 2 * BLOCK
    assert find.poll().tokens == find.wait().tokens
    found = find.wait()
    assert found.tokens == 3 * CHUNK + 2 * BLOCK and found.hold.valid
    assert list(found.hold.ids) == list(ids) and found.hold.usable == 4
    # Whoever has the token may load: here the same process.
    attached = space.attach(found.hold.token, found.hold.ids)
    cache = new_cache()
    blocks = list(range(14))
    assert space.load(ids, [paged(cache).blocks(blocks)], hold=attached).usable == 4
    assert_holds(cache, "find", blocks, 14, 14)

    # An engine computes at least one token itself.
    exact = tokens[: 3 * CHUNK]
    shorter = space.start_find(exact, tokens_max=len(exact) - 1).wait()
    assert shorter.tokens == 3 * CHUNK - BLOCK and shorter.hold.usable == 3
    keys = [(larder.KeyKind.SALT, b"salt", 0)]
    assert space.start_find(tokens, keys).wait().tokens == 0
    with pytest.raises(larder.InvalidArgument):
        space.start_find(tokens, [(99, b"", 0)])


def test_a_find_that_is_dropped_holds_nothing(daemon):
    with larder.Client(daemon.socket) as client:
        space = open_space(client)
        tokens = list(range(2 * CHUNK))
        save_prompt(space, tokens, "dropped")
        for _ in range(20):
            space.start_find(tokens)
        kept = space.start_find(tokens)
        daemon.kill()
        found = kept.wait(20)
        assert found.tokens in (0, 2 * CHUNK)
        gone = space.start_find(tokens, deadline=0.05).wait(20)
        assert gone.tokens == 0 and gone.status < 0 and gone.hold is None

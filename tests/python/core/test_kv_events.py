"""KV events as a router in Python reads them: the schema's types, as vLLM declares
them, refuse what is not of their form."""

import contextlib
import hashlib
import os

import msgspec
import pytest
import zmq

import larder
from larder import KeyKind, Stage

from test_kv import BLOCK, CHUNK, fill, new_cache, open_space, paged

END = (-1).to_bytes(8, "big", signed=True)


class Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list
    data_parallel_rank: int | None = None


def schema(**form):
    """The types of events, as arrays (vLLM before 0.32, SGLang) or maps (0.32)."""

    class Stored(msgspec.Struct, tag="BlockStored", **form):
        block_hashes: list[int]
        parent_block_hash: int | None
        token_ids: list[int]
        block_size: int
        lora_id: int | None
        medium: str | None
        lora_name: str | None
        extra_keys: list[tuple | None] | None = None

    class Removed(msgspec.Struct, tag="BlockRemoved", **form):
        block_hashes: list[int]
        medium: str | None
        group_idx: int | None = None

    class Cleared(msgspec.Struct, tag="AllBlocksCleared", **form):
        pass

    return Stored | Removed | Cleared


class Router:
    """Follows a publisher from the first batch on that it keeps."""

    def __init__(self, events, folder):
        self._events = events
        self._context = zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.connect(f"ipc://{folder}/events")
        self._sub.subscribe("kv@pod")
        self._replay = self._context.socket(zmq.DEALER)
        self._replay.connect(f"ipc://{folder}/replay")
        self.blocks: dict[str, dict[int, object]] = {}
        self.seen: list = []
        self.next = 0

    def close(self):
        self._context.destroy(linger=0)

    def until(self, done):
        """Applies what comes until done(). Without an end of its own."""
        while not done():
            if self._sub.poll(50):
                topic, number, payload = self._sub.recv_multipart()
                assert topic == b"kv@pod@model"
                if int.from_bytes(number, "big") == self.next:
                    self._apply(payload)
            else:  # what was said before the subscription was heard
                self.replay(self.next)

    def replay(self, begin):
        self._replay.send_multipart([b"", begin.to_bytes(8, "big")])
        while True:
            empty, number, payload = self._replay.recv_multipart()
            assert empty == b""
            if number == END:
                assert payload == b""
                return
            assert int.from_bytes(number, "big") == self.next
            self._apply(payload)

    def _apply(self, payload):
        self.next += 1
        batch = msgspec.msgpack.decode(payload, type=Batch)
        for raw in batch.events:
            event = msgspec.convert(raw, type=self._events)
            self.seen.append(event)
            name = type(event).__name__
            if name == "Cleared":
                self.blocks.clear()
                continue
            held = self.blocks.setdefault(event.medium, {})
            for block in event.block_hashes:
                if name == "Stored":
                    held[block] = event
                else:
                    held.pop(block, None)

    def count(self, medium):
        return len(self.blocks.get(medium, {}))


@pytest.fixture
def encoding():
    return "arrays"


@pytest.fixture
def router(make_daemon, encoding, tmp_path):
    folder = tmp_path
    daemon = make_daemon(
        f"--kv_events.publish=ipc://{folder}/events",
        f"--kv_events.replay=ipc://{folder}/replay",
        f"--kv_events.tenants={os.getuid()}",
        "--kv_events.topic=kv@pod@model",
        f"--kv_events.encoding={encoding}",
        "--dram.capacity=64MiB",  # quickly there
        "--dram.slab=32MiB",
    )
    events = schema(array_like=True) if encoding == "arrays" else schema()
    with contextlib.closing(Router(events, folder)) as made:
        made.daemon = daemon
        yield made


def save(space, tokens, keys=()):
    ids = space.ids(tokens, keys)
    cache = new_cache()
    blocks = list(range(len(tokens) // BLOCK))
    fill(cache, "events", blocks)
    for i, id in enumerate(ids):
        part = space.save(id)
        part.gather(paged(cache).blocks(blocks[i * 4 : i * 4 + 4]))
        part.commit(
            token_begin=i * CHUNK,
            parent=ids[i - 1] if i else None,
            tokens=tokens[i * CHUNK : (i + 1) * CHUNK],
            keyed=bool(keys),
            durable=True,
        )
        part.wait(Stage.DURABLE)
    return ids


@pytest.mark.parametrize("encoding", ["arrays", "maps"])
def test_a_router_follows_chunks_through_the_tiers(router):
    with larder.Client(router.daemon.socket) as client:
        space = open_space(client)
        tokens = list(range(1000, 1000 + 2 * CHUNK))
        ids = save(space, tokens)
        blocks = 2 * CHUNK // BLOCK
        router.until(
            lambda: router.count("CPU") == blocks and router.count("STORAGE") == blocks
        )
        told = [e for e in router.seen if getattr(e, "medium", "") == "STORAGE"]
        assert [t for e in told for t in e.token_ids] == tokens
        assert told[0].parent_block_hash is None
        assert told[1].parent_block_hash == told[0].block_hashes[-1]
        assert {e.block_size for e in told} == {BLOCK}
        # The name of a chunk's last block is that of its id.
        assert [e.block_hashes[-1] for e in told] == [
            int.from_bytes(id[-8:], "big") for id in ids
        ]
        space.delete(ids)
        router.until(lambda: not any(router.blocks.values()))
        removed = [e for e in router.seen if type(e).__name__ == "Removed"]
        assert {e.medium for e in removed} == {"CPU", "STORAGE"}


def test_salted_chunks_are_told_of_without_their_tokens(router):
    with larder.Client(router.daemon.socket) as client:
        ids = save(open_space(client), list(range(CHUNK)), [(KeyKind.SALT, b"mine", 0)])
        router.until(lambda: router.count("CPU") == 1 and router.count("STORAGE") == 1)
        name, event = router.blocks["CPU"].popitem()
        assert name == int.from_bytes(ids[0][-8:], "big")
        assert (event.token_ids, event.block_size) == ([], 0)


def test_values_have_the_names_that_vllm_gives_their_blocks(router):
    with larder.Client(router.daemon.socket) as client:
        values = larder.Values(
            client,
            model="test",
            weights=hashlib.sha256(b"w").digest(),
            cache_dtype="fp16",
            value_bytes_max=4096,
            engine_layout="test",
            hash_scheme="vllm block hash and group",
            rope="none",
        )
        block = hashlib.sha256(b"block").digest()
        data = bytearray(b"pages")
        values.put([block + bytes(4)], [memoryview(data)])
        router.until(lambda: router.count("CPU") == 1)
        # As vLLM's maybe_convert_block_hash does.
        name = int.from_bytes(block, "big") & ((1 << 64) - 1)
        assert list(router.blocks["CPU"]) == [name]

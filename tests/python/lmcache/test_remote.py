"""LMCache inside the engine: the remote storage plugin, through LMCache's own
storage backends."""

import asyncio
import functools
import hashlib
import re
import threading
import time

import numpy as np
import pytest
import torch
import yaml
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.health_monitor.checks.remote_backend_check import (
    RemoteBackendHealthCheck,
)
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend import CreateStorageBackends
from patience import under_kills, until
from test_l2 import DOCS, everything_durable

LAYERS, HEADS, DIM, CHUNK = 4, 2, 32, 256
TOKEN_BYTES = LAYERS * 2 * HEADS * DIM * 2
LMCACHE_PATIENCE = 5


@pytest.fixture
def loop():
    """LMCache's event loop, in a thread of its own as in the engine."""
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join(10)
    assert not thread.is_alive()
    made.close()


def metadata(**changes):
    fields = {
        "model_name": "test/model",
        "world_size": 1,
        "local_world_size": 1,
        "worker_id": 0,
        "local_worker_id": 0,
        "kv_dtype": torch.bfloat16,
        "kv_shape": (LAYERS, 2, CHUNK, HEADS, DIM),
        "chunk_size": CHUNK,
    }
    return LMCacheMetadata(**{**fields, **changes})


def config(socket, **changes):
    fields = {
        "chunk_size": CHUNK,
        "local_cpu": False,
        "max_local_cpu_size": 0.25,
        "save_unfull_chunk": True,
        "blocking_timeout_secs": LMCACHE_PATIENCE,
        "remote_storage_plugins": ["larder"],
        "extra_config": {
            "remote_storage_plugin.larder.module_path": "larder.lmcache",
            "remote_storage_plugin.larder.class_name": "RemoteAdapter",
            "remote_storage_plugin.larder.socket": socket,
            "remote_storage_plugin.larder.weights": "test/model@1",
        },
    }
    fields["extra_config"].update(changes.pop("extra", {}))
    return LMCacheEngineConfig.from_defaults(**{**fields, **changes})


class Engine:
    """Backends made by LMCache, and objects as its engine makes them."""

    def __init__(self, config, metadata, loop):
        self.loop = loop
        self.metadata = metadata
        self.backends = CreateStorageBackends(config, metadata, loop, "cpu")
        names = [name for name in self.backends if name.startswith("RemoteBackend")]
        self.remote = self.backends[names[0]] if names else None
        self.local = self.backends["LocalCPUBackend"]

    def key(self, number, **changes):
        fields = {
            "model_name": self.metadata.model_name,
            "world_size": self.metadata.world_size,
            "worker_id": self.metadata.worker_id,
            "chunk_hash": 1 + number,
            "dtype": self.metadata.kv_dtype,
        }
        return CacheEngineKey(**{**fields, **changes})

    def allocate(self, tokens=CHUNK):
        mla = self.metadata.use_mla
        return self.local.allocate(
            self.metadata.get_shapes(tokens), self.metadata.get_dtypes(),
            MemoryFormat.KV_MLA_FMT if mla else MemoryFormat.KV_2LTD, busy_loop=False,
        )  # fmt: skip

    def object(self, key, tokens=CHUNK):
        made = self.allocate(tokens)
        assert made is not None, "memory was not given back"
        np.frombuffer(made.byte_array, np.uint8)[:] = content(key, made.get_size())
        return made

    def put(self, keys, tokens=CHUNK):
        """Stores each key's content; waits until LMCache has done with it."""
        objects = [self.object(key, tokens) for key in keys]
        done = threading.Semaphore(0)
        self.remote.batched_submit_put_task(
            keys, objects, on_complete_callback=lambda key: done.release()
        )
        for _ in keys:
            assert done.acquire(timeout=30)
        for made in objects:
            made.ref_count_down()
            assert made.get_ref_count() == 0

    def get(self, keys, tokens=CHUNK):
        """Which keys were loaded; every byte of those is proved right."""
        loaded = self.remote.batched_get_blocking(keys)
        return [self.right(k, made, tokens) for k, made in zip(keys, loaded)]

    def right(self, key, made, tokens=CHUNK):
        if made is None:
            return False
        assert made.get_shape() == self.metadata.get_shapes(tokens)[0]
        assert made.get_dtype() == self.metadata.kv_dtype
        data = np.frombuffer(made.byte_array, np.uint8)
        assert np.array_equal(data, content(key, len(data)))
        made.ref_count_down()
        return True

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def close(self):
        for backend in self.backends.values():
            backend.close()


def content(key, size):
    seed = hashlib.sha256(key.to_string().encode()).digest()[:8]
    return np.random.default_rng(list(seed)).integers(0, 256, size, np.uint8)


@pytest.fixture
def engine(loop):
    """Engines that are closed after the test."""
    made = []

    def make(daemon, meta=None, **changes):
        socket = daemon if isinstance(daemon, str) else daemon.socket
        made.append(Engine(config(socket, **changes), meta or metadata(), loop))
        return made[-1]

    yield make
    for one in made:
        one.close()


def of(name):
    return {"remote_storage_plugin.larder.weights": f"test/{name}@1"}


def test_the_documented_configuration(daemon, loop, tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert text.count("/run/larder/larderd.sock") == 1
    file = tmp_path / "lmcache.yaml"
    file.write_text(text.replace("/run/larder/larderd.sock", daemon.socket))
    assert yaml.safe_load(text)["remote_storage_plugins"] == ["larder"]
    one = Engine(LMCacheEngineConfig.from_file(str(file)), metadata(), loop)
    try:
        one.put([one.key(1)])
        assert one.get([one.key(1)]) == [True]
    finally:
        one.close()


def test_the_older_remote_url(daemon, engine):
    one = engine(daemon, remote_url=f"larder://{daemon.socket}")
    # Two doors to one space: the plugin's, and the URL's.
    other = one.backends["RemoteBackend"]
    one.put([one.key(1)])
    assert one.get([one.key(1)]) == [True]
    assert other.contains(one.key(1))


def test_put_and_get(shared_daemon, engine):
    one = engine(shared_daemon, extra=of("put and get"))
    keys = [one.key(i) for i in range(20)]
    assert one.get(keys) == [False] * 20
    assert not one.remote.contains(keys[0])
    one.put(keys)
    one.put(keys)
    assert one.get([one.key(99), *keys]) == [False] + [True] * 20
    assert one.remote.contains(keys[0]) and not one.remote.contains(one.key(99))
    assert one.remote.batched_contains([*keys[:7], one.key(99), *keys]) == 7
    assert one.remote.batched_contains(keys) == 20
    assert one.right(keys[3], one.remote.get_blocking(keys[3]))
    assert one.remote.get_blocking(one.key(99)) is None
    connection = one.remote.connection
    assert connection.exists_sync(keys[0]) and not connection.exists_sync(one.key(99))


def test_asynchronous_loading(shared_daemon, engine):
    one = engine(shared_daemon, extra=of("async"))
    keys = [one.key(i) for i in range(10)]
    one.put(keys[:6] + keys[7:])
    remote = one.remote
    assert one.run(remote.support_batched_async_contains())
    assert one.run(remote.batched_async_contains("lookup", keys)) == 6
    assert one.run(remote.support_batched_get_non_blocking())
    # The prefix only, whatever is there behind it.
    made = one.run(remote.batched_get_non_blocking("lookup", keys))
    assert [one.right(k, m) for k, m in zip(keys, made)] == [True] * 6
    assert one.run(remote.batched_get_non_blocking("lookup", keys[6:])) == []


@pytest.mark.parametrize("tokens", [1, 16, 255])
def test_a_chunk_that_is_not_full(shared_daemon, engine, tokens):
    one = engine(shared_daemon, extra=of(f"partial {tokens}"))
    one.put([one.key(1)], tokens)
    assert one.get([one.key(1)], tokens) == [True]


def test_latent_attention(shared_daemon, engine):
    mla = metadata(use_mla=True, kv_shape=(LAYERS, 1, CHUNK, 1, 576))
    one = engine(shared_daemon, mla, extra=of("mla"))
    keys = [one.key(i) for i in range(4)]
    one.put(keys)
    one.put([one.key(9)], 100)
    assert one.get(keys) == [True] * 4
    assert one.get([one.key(9)], 100) == [True]


def test_the_single_put(shared_daemon, engine):
    one = engine(shared_daemon, extra=of("single"))
    made = one.object(one.key(1))
    one.remote.submit_put_task(one.key(1), made).result(30)
    made.ref_count_down()
    assert one.get([one.key(1)]) == [True]


def test_memory_is_given_back(shared_daemon, engine):
    """Many times LMCache's buffer, hits and misses, and it never runs out."""
    one = engine(shared_daemon, extra=of("memory"))
    keys = [one.key(i) for i in range(100)]
    for _ in range(12):
        one.put(keys[:50])
        assert one.get(keys) == [True] * 50 + [False] * 50


def test_no_memory_is_a_miss(shared_daemon, engine):
    one = engine(shared_daemon, extra=of("no memory"))
    keys = [one.key(i) for i in range(8)]
    one.put(keys)
    hoard = []
    while (made := one.allocate()) is not None:
        hoard.append(made)
    for made in hoard[-3:]:
        made.ref_count_down()
    begin = time.monotonic()
    assert one.get(keys) == [True] * 3 + [False] * 5
    assert time.monotonic() - begin < LMCACHE_PATIENCE
    for made in hoard[:-3]:
        made.ref_count_down()
    assert one.get(keys) == [True] * 8


@pytest.mark.parametrize(
    "meta, extra",
    [
        ({}, of("model2")),
        ({"kv_dtype": torch.float16}, {}),
        # The same number of bytes, otherwise arranged.
        ({"kv_shape": (2 * LAYERS, 2, CHUNK, HEADS // 2, DIM)}, {}),
        ({}, {"remote_storage_plugin.larder.cache_dtype": "fp8_e4m3"}),
    ],
)
def test_what_is_not_interchangeable_is_not_shared(shared_daemon, engine, meta, extra):
    first = engine(shared_daemon)
    second = engine(shared_daemon, metadata(**meta), extra=extra)
    keys = [first.key(1000 + i) for i in range(4)]
    first.put(keys)
    assert second.remote.batched_contains(keys) == 0
    assert second.get(keys) == [False] * 4


def test_what_it_cannot_describe_is_not_stored(shared_daemon, engine):
    one = engine(shared_daemon, extra=of("unfit"))
    shape = [torch.Size([CHUNK, 64])]
    other = one.local.allocate(shape, [torch.uint8], MemoryFormat.KV_T2D)
    one.remote.submit_put_task(one.key(1), other).result(30)
    other.ref_count_down()
    assert not one.remote.contains(one.key(1))


@pytest.mark.parametrize(
    "meta, changes",
    [
        ({}, {"extra": {"remote_storage_plugin.larder.weights": ""}}),
        ({"kv_dtype": torch.uint8}, {}),
        ({}, {"extra": {"remote_storage_plugin.larder.workers": 0}}),
        ({}, {"extra": {"remote_storage_plugin.larder.kv_scale": "misspelt"}}),
        ({}, {"use_layerwise": True}),
    ],
)
def test_what_could_serve_the_wrong_kv_is_refused(
    shared_daemon, engine, meta, changes
):
    one = engine(shared_daemon, metadata(**meta), **changes)
    assert one.remote is None or one.remote.connection is None


def test_remove(shared_daemon, engine):
    one = engine(shared_daemon, extra=of("remove"))
    one.put([one.key(1), one.key(2)])
    assert one.remote.remove(one.key(1))
    assert not one.remote.remove(one.key(1))
    assert one.get([one.key(1), one.key(2)]) == [False, True]


def test_lmcaches_health_check(daemon, engine):
    limits = {"get_blocking_failed_threshold": 3, "waiting_time_for_recovery": 0}
    one = engine(daemon, extra=limits)
    check = RemoteBackendHealthCheck(one.remote)
    assert check.check()
    daemon.kill()
    assert not check.check()  # by ping
    for i in range(4):
        assert one.get([one.key(i)]) == [False]
    assert not check.check()  # by failed loads
    daemon.start()
    # It stores other bytes under one key each time and wants them back.
    until(check.check)
    for _ in range(3):
        check.failure_time = 1.0
        assert check.check()


def test_sigkill_and_restart(daemon, engine):
    one = engine(daemon)
    keys = [one.key(i) for i in range(50)]
    one.put(keys)
    everything_durable(daemon)
    daemon.kill()
    begin = time.monotonic()
    assert one.get(keys) == [False] * 50
    assert not one.remote.contains(keys[0])
    assert one.remote.batched_contains(keys) == 0
    one.put([one.key(99)])  # lost, but not raised
    assert time.monotonic() - begin < LMCACHE_PATIENCE
    daemon.start()
    until(lambda: one.remote.batched_contains(keys) == 50)
    assert one.get(keys) == [True] * 50


def test_a_daemon_that_comes_later(make_daemon, engine):
    daemon = make_daemon()
    daemon.end()
    one = engine(daemon)
    begin = time.monotonic()
    for i in range(50):
        one.put([one.key(i)])
        assert one.get([one.key(i)]) == [False]
        assert not one.remote.contains(one.key(i))
    assert one.run(one.remote.connection.ping()) != 0
    assert time.monotonic() - begin < LMCACHE_PATIENCE
    daemon.start()
    until(lambda: one.run(one.remote.connection.ping()) == 0)
    one.put([one.key(1)])
    assert one.get([one.key(1)]) == [True]


def test_sigkill_under_load(daemon, engine):
    one, hits = engine(daemon), [0]

    def work(number, mine):
        keys = [one.key((number * 7 + mine * 31 + i) % 150) for i in range(8)]
        one.put(keys)
        hits[0] += sum(one.get(keys))

    works = [functools.partial(work, mine=i) for i in range(2)]
    under_kills(daemon, works, lambda: hits[0], times=3)


def test_cancelled_operations_give_memory_back(shared_daemon, engine, loop):
    one = engine(shared_daemon, extra=of("cancel"))
    keys = [one.key(i) for i in range(32)]
    one.put(keys)

    async def cancelled(delay):
        load = asyncio.ensure_future(one.remote.connection.batched_get(keys))
        await asyncio.sleep(delay)
        load.cancel()
        try:
            for made in await load:
                made.ref_count_down()
        except asyncio.CancelledError:
            pass

    for i in range(60):
        one.run(cancelled(i * 0.0002))
    until(lambda: one.get(keys) == [True] * 32)
    # All of it can be had again: nothing leaked, nothing is still read into.
    taken = [one.object(keys[0]) for _ in range(100)]
    for made in taken:
        made.ref_count_down()


def test_close_answers_whoever_still_waits(daemon, loop):
    one = Engine(config(daemon.socket), metadata(), loop)
    keys = [one.key(i) for i in range(16)]
    one.put(keys)
    connection = one.remote.connection
    daemon.freeze()
    waiting = [
        asyncio.run_coroutine_threadsafe(call, loop)
        for call in (connection.exists(keys[0]), connection.batched_get(keys))
    ]
    time.sleep(0.1)
    begin = time.monotonic()
    one.run(connection.close())
    assert waiting[0].result(1) is False
    assert waiting[1].result(1) == [None] * 16
    assert time.monotonic() - begin < LMCACHE_PATIENCE + 2
    assert one.run(connection.exists(keys[0])) is False
    one.run(connection.close())
    daemon.thaw()
    one.close()


def test_the_loop_is_never_blocked(shared_daemon, engine):
    one = engine(shared_daemon, extra=of("blocked"))
    keys = [one.key(i) for i in range(64)]
    gaps = []

    async def watch(until):
        last = time.monotonic()
        while not until.is_set():
            await asyncio.sleep(0.001)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    over = threading.Event()
    watching = asyncio.run_coroutine_threadsafe(watch(over), one.loop)
    for _ in range(10):
        one.put(keys)
        assert one.get(keys) == [True] * 64
    over.set()
    watching.result(10)
    assert sorted(gaps)[-len(gaps) // 100 - 1] < 0.2

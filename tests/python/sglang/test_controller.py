"""SGLang's own cache controllers with their storage threads: backup of host pages
to Larder, query and prefetch of them, as its scheduler does it. Copies between
host and device are SGLang's, and need a GPU: no test here asks for one."""

import threading

import pools
import pytest
import torch
from patience import until
from pools import PAGE, fill, holds, wipe
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
    CacheRequestHandle,
    HybridCacheController,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host import HostPoolGroup, PoolEntry
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.runtime_context import get_parallel

import larder.sglang

WAIT = 60
ALONE = dict(pp_rank=0, pp_size=1, attn_dcp_rank=0, attn_dcp_size=1)


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def controller(documented, socket, host, latent=False, rank=0, size=1, **extra):
    """As the scheduler makes it, storage attached, threads running."""
    common = dict(
        size=PAGE * 8, page_size=PAGE, layer_num=pools.LAYERS, device="cpu",
        enable_memory_saver=False, dtype=host.dtype,
    )
    if latent:
        device = MLATokenToKVPool(kv_lora_rank=16, qk_rope_head_dim=8, **common)
    else:
        device = MHATokenToKVPool(
            head_num=host.head_num, head_dim=host.head_dim, enable_alt_stream=False,
            **common,
        )
    extra = pools.extra_config(documented, socket, **extra)
    with get_parallel().override(tp_rank=rank, tp_size=size, **ALONE):
        made = HiCacheController(
            PagedTokenToKVPoolAllocator(
                PAGE * 8, PAGE, host.dtype, "cpu", device, need_sort=False
            ),
            host,
            PAGE,
            tp_group=torch.distributed.group.WORLD,
            load_cache_event=threading.Event(),
            io_backend="direct",
            prefetch_threshold=PAGE,
            model_name="controlled",
            storage_backend="dynamic",
            storage_backend_extra_config=extra,
        )
    assert isinstance(made.storage_backend, larder.sglang.LarderHiCache)
    return made


def backup(made, key):
    """Writes the pages of a prompt as the scheduler does; tokens written."""
    hashes = get_storage_hash_str(key, page_size=PAGE)
    where = made.mem_pool_host.alloc(len(hashes) * PAGE)
    for i, name in enumerate(hashes):
        fill(made.mem_pool_host, int(where[i * PAGE]) // PAGE, name)
    made.write_storage(where, key, hash_value=hashes)
    done = made.ack_backup_queue.get(timeout=WAIT)
    made.mem_pool_host.free(where)
    return done.completed_tokens


def prefetch(made, key):
    """(tokens found, tokens fetched, whether what was fetched is right)."""
    made.prefetch("request", key)
    operation = made.prefetch_hit_queue.get(timeout=WAIT)
    found = operation.storage_hit_count
    if found == 0:
        return 0, 0, True
    operation.host_indices = made.alloc_prefetch_host_buffers(operation, found)
    made.prefetch_buffer.put(operation)
    fetched = 0
    while True:
        ack = made.ack_prefetch_queue.get(timeout=WAIT)
        if ack.completed_tokens is not None:
            fetched = ack.completed_tokens
        if ack.completed_req:
            break
    where = operation.host_indices
    right = all(
        holds(made.mem_pool_host, int(where[i * PAGE]) // PAGE, name)
        for i, name in enumerate(operation.hash_value[: fetched // PAGE])
    )
    made.mem_pool_host.free(where)
    return found, fetched, right


def prompt(first, pages=10, **about):
    return RadixKey(list(range(first, first + pages * PAGE)), **about)


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
@pytest.mark.parametrize("in_place", [1, 0])
def test_backup_and_prefetch(documented, shared_daemon, layout, in_place):
    about = dict(interface_v1=in_place)
    host = pools.mha(layout)
    one = controller(documented, shared_daemon.socket, host, **about)
    try:
        assert (one.page_get_func == one._page_get_zero_copy) == bool(in_place)
        assert prefetch(one, prompt(1000)) == (0, 0, True)
        assert backup(one, prompt(1000)) == 10 * PAGE
        wipe(host)
        assert prefetch(one, prompt(1000)) == (10 * PAGE, 10 * PAGE, True)
        # A prefix of it; a prompt that goes on; another tenant's.
        assert prefetch(one, prompt(1000, 4)) == (4 * PAGE, 4 * PAGE, True)
        assert prefetch(one, prompt(1000, 13)) == (10 * PAGE, 10 * PAGE, True)
        assert prefetch(one, prompt(1000, cache_salt="bob")) == (0, 0, True)
    finally:
        one.detach_storage_backend()
    # Attached again, as its HTTP interface can do.
    again = controller(documented, shared_daemon.socket, pools.mha(layout), **about)
    try:
        assert prefetch(again, prompt(1000)) == (10 * PAGE, 10 * PAGE, True)
    finally:
        again.detach_storage_backend()


def test_ranks_of_latent_attention(documented, shared_daemon):
    first = controller(documented, shared_daemon.socket, pools.mla(), True, 0, 2)
    second = controller(documented, shared_daemon.socket, pools.mla(), True, 1, 2)
    try:
        assert second.backup_skip and not first.backup_skip
        assert backup(second, prompt(5000)) == 0  # SGLang has the first one write
        assert prefetch(second, prompt(5000)) == (0, 0, True)
        assert backup(first, prompt(5000)) == 10 * PAGE
        assert prefetch(second, prompt(5000)) == (10 * PAGE, 10 * PAGE, True)
    finally:
        first.detach_storage_backend()
        second.detach_storage_backend()


def test_more_than_one_batch(documented, shared_daemon):
    """SGLang asks for at most 128 pages in a call."""
    host = pools.mha(pages=200)
    one = controller(documented, shared_daemon.socket, host)
    try:
        assert backup(one, prompt(7000, 200)) == 200 * PAGE
        wipe(host)
        assert prefetch(one, prompt(7000, 200)) == (200 * PAGE, 200 * PAGE, True)
    finally:
        one.detach_storage_backend()


def test_threads_outlive_the_daemon(documented, daemon):
    host = pools.mha()
    one = controller(documented, daemon.socket, host, durable=True, deadline_ms=5000)
    try:
        assert backup(one, prompt(9000)) == 10 * PAGE
        daemon.kill()
        assert prefetch(one, prompt(9000)) == (0, 0, True)
        assert backup(one, prompt(9500)) == 0
        threads = (one.prefetch_thread, one.prefetch_io_aux_thread, one.backup_thread)
        assert all(thread.is_alive() for thread in threads)
        daemon.start()
        wanted = (10 * PAGE, 10 * PAGE, True)
        until(lambda: prefetch(one, prompt(9000)) == wanted)
        until(lambda: backup(one, prompt(9500)) == 10 * PAGE)
        assert all(thread.is_alive() for thread in threads)
    finally:
        one.detach_storage_backend()


# ---- Several pools: the hybrid controller and its v2 calls ----


def hybrid(documented, socket, kv, indexer, window):
    """Keys and values, an indexer that follows them page by page, and a window of
    which only the end is kept."""
    device = MHATokenToKVPool(
        size=PAGE * 8, page_size=PAGE, layer_num=pools.LAYERS, device="cpu",
        enable_memory_saver=False, dtype=kv.dtype, head_num=kv.head_num,
        head_dim=kv.head_dim, enable_alt_stream=False,
    )
    entries = [
        PoolEntry(PoolName.KV, kv, device, lambda layer: layer, True),
        PoolEntry(PoolName.INDEXER, indexer, device, lambda layer: layer),
        PoolEntry(PoolName.SWA, window, device, lambda layer: layer),
    ]
    with get_parallel().override(tp_rank=0, tp_size=1, **ALONE):
        return HybridCacheController(
            PagedTokenToKVPoolAllocator(
                PAGE * 8, PAGE, kv.dtype, "cpu", device, need_sort=False
            ),
            HostPoolGroup(entries),
            PAGE,
            tp_group=torch.distributed.group.WORLD,
            load_cache_event=threading.Event(),
            io_backend="direct",
            prefetch_threshold=PAGE,
            model_name="hybrid",
            storage_backend="dynamic",
            storage_backend_extra_config=pools.extra_config(documented, socket),
        )


WINDOW = 2  # pages


def sidecars(hashes, window, where):
    """What the tree asks for beside keys and values."""
    return [
        PoolTransfer(PoolName.INDEXER, indices_from_pool=PoolName.KV),
        PoolTransfer(
            PoolName.SWA,
            host_indices=where,
            keys=hashes[-WINDOW:],
            hit_policy=PoolHitPolicy.TRAILING_PAGES,
        ),
    ]


def test_hybrid_controller(documented, shared_daemon):
    kv, indexer, window = pools.mha(), pools.mla(), pools.mha(layers=1)
    one = hybrid(documented, shared_daemon.socket, kv, indexer, window)
    try:
        key = prompt(20000)
        hashes = get_storage_hash_str(key, page_size=PAGE)
        where = kv.alloc(len(hashes) * PAGE)
        for i, name in enumerate(hashes):
            fill(kv, int(where[i * PAGE]) // PAGE, name)
            fill(indexer, int(where[i * PAGE]) // PAGE, name)
        tail = window.alloc(WINDOW * PAGE)
        for i, name in enumerate(hashes[-WINDOW:]):
            fill(window, int(tail[i * PAGE]) // PAGE, name)
        one.write_storage(
            where, key, hash_value=hashes, extra_pools=sidecars(hashes, window, tail)
        )
        done = one.ack_backup_queue.get(timeout=WAIT)
        assert done.completed_tokens == 10 * PAGE
        assert done.pool_storage_result.extra_pool_hit_pages == {
            PoolName.INDEXER: 10, PoolName.SWA: WINDOW
        }
        for pool in (kv, indexer, window):
            wipe(pool)

        def fetch(key, pages):
            hashes = get_storage_hash_str(key, page_size=PAGE)
            asked = sidecars(hashes, window, window.alloc(WINDOW * PAGE))
            one.prefetch(CacheRequestHandle("request", 0), key, extra_pools=asked)
            operation = one.prefetch_hit_queue.get(timeout=WAIT)
            assert operation.storage_hit_count == pages * PAGE
            if pages == 0:
                return
            operation.host_indices = kv.alloc(pages * PAGE)
            one.prefetch_buffer.put(operation)
            hits = {}
            while not (ack := one.ack_prefetch_queue.get(timeout=WAIT)).completed_req:
                hits.update(ack.pool_hits or {})
                if ack.completed_tokens is not None:
                    assert ack.completed_tokens == pages * PAGE
            assert hits[PoolName.SWA] == WINDOW
            for i, name in enumerate(operation.hash_value):
                page = int(operation.host_indices[i * PAGE]) // PAGE
                assert holds(kv, page, name) and holds(indexer, page, name)
            (end,) = [t for t in operation.pool_transfers if t.name == PoolName.SWA]
            for i, name in enumerate(operation.hash_value[-WINDOW:]):
                assert holds(window, int(end.host_indices[i * PAGE]) // PAGE, name)

        fetch(key, 10)
        fetch(prompt(20000, 12), 10)  # goes on: the window ends where it was kept
        fetch(prompt(20000, 9), 0)  # its window was not kept
    finally:
        one.detach_storage_backend()

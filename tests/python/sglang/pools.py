"""Real host pools on CPU, their content by key, and backends made as SGLang does."""

import hashlib
import json

import numpy as np
import torch
from sglang.srt.mem_cache.device_pool_info import (
    KVBufferLayout,
    KVBuffers,
    MHABufferInfo,
    MLABufferInfo,
)
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.storage import StorageBackendFactory

PAGE = 4  # tokens
PAGES = 64
LAYERS = 3
WEIGHTS = hashlib.sha256(b"the weights").hexdigest()


def _budget():
    # A pool of kilobytes, whatever memory the host has.
    return host_memory_budget_scope(1 << 30)


def mha_info(dtype=torch.float16, heads=2, layers=LAYERS, tokens=PAGE * 8):
    buffers = tuple(torch.zeros(tokens, heads, 8, dtype=dtype) for _ in range(layers))
    pointers = torch.zeros(layers, dtype=torch.uint64)
    return MHABufferInfo(
        buffers=KVBuffers(
            k=buffers,
            v=buffers,
            k_data_ptrs=pointers,
            v_data_ptrs=pointers,
            layout=KVBufferLayout.NHD,
        ),
        page_size=PAGE,
        head_num=heads,
        head_dim=8,
        v_head_dim=8,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def mha(layout="page_first", pages=PAGES, **about):
    info = mha_info(**about)
    with _budget():
        return MHATokenToKVPoolHost(
            info,
            host_to_device_ratio=0,
            host_size=0,
            page_size=PAGE,
            layout=layout,
            pin_memory=False,
            device_capacity_tokens=PAGE * 8,
            start_layer=0,
            end_layer=len(info.buffers.k),
            host_token_capacity=PAGE * pages,
        )


def mla(layout="page_first", dtype=torch.bfloat16):
    buffers = tuple(torch.zeros(PAGE * 8, 1, 24, dtype=dtype) for _ in range(LAYERS))
    info = MLABufferInfo(
        buffers=buffers,
        data_ptrs=torch.zeros(LAYERS, dtype=torch.uint64),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        kv_cache_dim=24,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    with _budget():
        return MLATokenToKVPoolHost(
            info,
            host_to_device_ratio=0,
            host_size=0,
            page_size=PAGE,
            layout=layout,
            pin_memory=False,
            device_capacity_tokens=PAGE * 8,
            start_layer=0,
            end_layer=LAYERS,
            target_layer_num=LAYERS,
            host_token_capacity=PAGE * PAGES,
        )


def storage_config(extra, **about):
    values = dict(
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=False,
        enable_storage_metrics=False,
        is_page_first_layout=True,
        model_name="model",
        extra_config=extra,
    )
    return HiCacheStorageConfig(**{**values, **about})


def extra_config(documented, socket, **more):
    """What SGLang passes on for the documented line."""
    extra = json.loads(documented)
    extra.update({"socket": str(socket), "weights": WEIGHTS, "deadline_ms": 20000})
    extra.update(more)
    return extra


def backend(documented, socket, pool, extra=None, **about):
    """By SGLang's factory, as its controller does."""
    config = storage_config(extra_config(documented, socket, **(extra or {})), **about)
    made = StorageBackendFactory.create_backend("dynamic", config, pool)
    made.register_mem_pool_host(pool)
    made.on_host_pools_registered()
    return made


def pages_at(*pages):
    """host_indices of these pages."""
    return torch.cat([torch.arange(PAGE) + page * PAGE for page in pages])


def content(key, nbytes):
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def raw(pool, page):
    return pool.get_data_page(page * PAGE, flat=True).contiguous().view(torch.uint8)


def fill(pool, page, key):
    """Writes what `key` says into a page, through the pool's own calls."""
    flat = pool.get_dummy_flat_data_page()
    data = torch.from_numpy(content(key, flat.nbytes))
    pool.set_from_flat_data_page(page * PAGE, data.view(flat.dtype).view(flat.shape))


def holds(pool, page, key):
    got = raw(pool, page).flatten().numpy()
    return np.array_equal(got, content(key, got.nbytes))


def names(prefix, count):
    return [hashlib.sha256(f"{prefix} {i}".encode()).hexdigest() for i in range(count)]


def wipe(pool):
    pool.kv_buffer.view(torch.uint8).fill_(0xEE)


def keep(one, pool, keys):
    """Fills pages 0... with what the keys say and saves them."""
    for page, key in enumerate(keys):
        fill(pool, page, key)
    good = one.batch_set_v1(keys, pages_at(*range(len(keys))))
    wipe(pool)
    return good

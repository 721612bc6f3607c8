"""LarderHiCache by SGLang's own factory, on SGLang's own host pools."""

import json
import subprocess
import sys
import threading
import time

import pools
import pytest
import torch
from patience import until
from pools import backend, content, fill, holds, keep, names, pages_at, raw, wipe
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from larder.sglang import LarderHiCache

MHA_LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]
MLA_LAYOUTS = ["layer_first", "page_first", "page_first_direct"]


@pytest.fixture
def make(documented, shared_daemon):
    """Backends on the shared daemon."""
    made = []

    def one(pool, extra=None, **about):
        made.append(backend(documented, shared_daemon.socket, pool, extra, **about))
        return made[-1]

    yield one
    for each in made:
        each.close()


def any_pool(kind, layout):
    return getattr(pools, kind)(layout)


LAYOUTS = [("mha", layout) for layout in MHA_LAYOUTS]
LAYOUTS += [("mla", layout) for layout in MLA_LAYOUTS]


@pytest.mark.parametrize("kind,layout", LAYOUTS)
def test_every_layout_in_place(make, kind, layout):
    pool = any_pool(kind, layout)
    one = make(pool, is_mla_model=kind == "mla")
    assert isinstance(one, LarderHiCache) and isinstance(one, HiCacheStorage)
    keys = names(f"{kind} {layout}", 12)
    assert one.batch_exists(keys) == 0
    assert keep(one, pool, keys) == [True] * 12
    assert one.batch_exists(keys) == 12
    assert one.batch_exists([*keys[:5], *names("other", 1), *keys[6:]]) == 5
    # Into other pages, in another order.
    where = [20 + i for i in range(12)][::-1]
    assert one.batch_get_v1(keys, pages_at(*where)) == [True] * 12
    assert all(holds(pool, page, key) for page, key in zip(where, keys))
    # No other page was written.
    rest = [page for page in range(pools.PAGES) if page not in where]
    assert all((raw(pool, page) == 0xEE).all() for page in rest)
    assert not one._pools["kv"].flat  # pages went from where they lie


def test_a_layout_without_addresses_is_copied(make):
    pool = pools.mha("page_first")
    pool.get_page_buffer_meta = lambda indices: (_ for _ in ()).throw(
        ValueError("Unsupported layout")
    )
    one = make(pool)
    keys = names("no addresses", 6)
    assert keep(one, pool, keys) == [True] * 6
    assert one.batch_exists(keys) == 6
    assert one.batch_get_v1(keys, pages_at(*range(30, 36))) == [True] * 6
    assert all(holds(pool, 30 + i, key) for i, key in enumerate(keys))


def test_the_largest_call_and_a_hole(make):
    pool = pools.mha()
    one = make(pool)
    keys = names("large", 60)
    assert all(keep(one, pool, keys))
    asked = [*keys[:10], *names("hole", 1), *keys[11:]]
    got = one.batch_get_v1(asked, pages_at(*range(60)))
    assert got[:10] == [True] * 10 and not got[10]
    assert all(holds(pool, i, keys[i]) for i in range(10))


def test_a_second_process_reads_what_the_first_wrote(make, documented, shared_daemon):
    pool = pools.mha()
    one = make(pool)
    keys = names("second process", 8)
    assert all(keep(one, pool, keys))
    program = f"""
import sys; sys.path.insert(0, {str(pools.__file__.rsplit('/', 1)[0])!r})
import conftest, pools
pool = pools.mha()
one = pools.backend({documented!r}, {shared_daemon.socket!r}, pool)
keys = pools.names("second process", 8)
assert one.batch_exists(keys) == 8
assert one.batch_get_v1(keys, pools.pages_at(*range(8))) == [True] * 8
assert all(pools.holds(pool, i, key) for i, key in enumerate(keys))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)


DIFFERENT = {
    "model": dict(about=dict(model_name="other model")),
    "weights": dict(extra=dict(weights="ab" * 32)),
    "cache dtype": dict(extra=dict(cache_dtype="fp8_e5m2")),
    "pool dtype": dict(pool=lambda: pools.mha(dtype=torch.bfloat16)),
    "layout": dict(pool=lambda: pools.mha("page_first_direct")),
    "heads": dict(pool=lambda: pools.mha(heads=4)),
    "layers": dict(pool=lambda: pools.mha(layers=4)),
    "tp rank": dict(about=dict(tp_rank=1, tp_size=2)),
    "tp size": dict(about=dict(tp_size=2)),
    "pp rank": dict(about=dict(pp_rank=1, pp_size=2)),
    "cp rank": dict(about=dict(attn_cp_rank=1, attn_cp_size=2)),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_differs_is_a_miss(make, what):
    pool = pools.mha()
    keys = names("differs", 4)
    first = make(pool)
    assert all(keep(first, pool, keys))
    case = DIFFERENT[what]
    other_pool = case.get("pool", pools.mha)()
    other = make(other_pool, case.get("extra"), **case.get("about", {}))
    wipe(other_pool)
    assert other.batch_exists(keys) == 0
    assert other.batch_get_v1(keys, pages_at(*range(4))) == [False] * 4
    assert (other_pool.kv_buffer.view(torch.uint8) == 0xEE).all()
    again = make(pools.mha())  # and the first's own are still there
    assert again.batch_exists(keys) == 4


@pytest.mark.parametrize("axis", ["tp", "pp", "attn_cp"])
def test_every_rank_has_its_own_pages(make, axis):
    pool, keys = pools.mha(), names(f"ranks of {axis}", 3)
    first, second = (
        make(pool, **{f"{axis}_rank": rank, f"{axis}_size": 2}) for rank in (0, 1)
    )
    assert all(keep(first, pool, keys))
    assert first.batch_exists(keys) == 3 and second.batch_exists(keys) == 0


def test_bytes_of_unknown_format_are_not_kept(make):
    """SGLang keeps both fp8 formats in uint8: without a name they would be mixed."""
    pool = pools.mha(dtype=torch.uint8)
    unnamed = make(pool)
    keys = names("fp8", 2)
    assert keep(unnamed, pool, keys) == [False, False]
    named = make(pool, dict(cache_dtype="fp8_e4m3"))
    assert keep(named, pool, keys) == [True, True]
    other = make(pools.mha(dtype=torch.uint8), dict(cache_dtype="fp8_e5m2"))
    assert other.batch_exists(keys) == 0 and named.batch_exists(keys) == 2


def test_latent_attention_is_shared_by_all_ranks(make):
    pool = pools.mla()
    keys = names("latent", 5)
    writer = make(pool, is_mla_model=True, tp_rank=0, tp_size=4)
    assert writer._config.is_storage_writer
    assert all(keep(writer, pool, keys))
    for rank in (1, 3):
        there = pools.mla()
        reader = make(there, is_mla_model=True, tp_rank=rank, tp_size=4)
        assert not reader._config.is_storage_writer
        assert reader.batch_exists(keys) == 5
        assert all(reader.batch_get_v1(keys, pages_at(*range(5))))
        assert all(holds(there, i, key) for i, key in enumerate(keys))


# ---- Keys ----


def test_keys_of_salts_and_bigrams(make):
    """SGLang's own keys: a salt or an adapter is the root of the chain, EAGLE's
    bigrams hash both tokens."""
    pool = pools.mha()
    one = make(pool)
    tokens = list(range(100, 100 + 5 * pools.PAGE + 1))
    kinds = {
        "plain": RadixKey(tokens[:-1]),
        "salt": RadixKey(tokens[:-1], cache_salt="alice"),
        "adapter": RadixKey(tokens[:-1], extra_key="lora-1"),
        "bigram": RadixKey(tokens, is_bigram=True),
    }
    try:
        chains = {
            kind: get_storage_hash_str(key, page_size=pools.PAGE)
            for kind, key in kinds.items()
        }
    except Exception as error:  # noqa: BLE001
        pytest.skip(f"SGLang's compiled hash cannot be had: {error}")
    assert all(len(chain) == 5 for chain in chains.values())
    assert len({key for chain in chains.values() for key in chain}) == 20
    for kind, chain in chains.items():
        assert one.batch_exists(chain) == 0, kind
        assert all(keep(one, pool, chain))
    for kind, chain in chains.items():
        assert one.batch_exists(chain) == 5
        assert all(one.batch_get_v1(chain, pages_at(*range(5))))
        assert all(holds(pool, i, key) for i, key in enumerate(chain)), kind


# ---- Several pools ----


def transfer(name, keys, pages, policy=PoolHitPolicy.ALL_PAGES):
    where = pages_at(*pages) if pages is not None else None
    return PoolTransfer(name=name, host_indices=where, keys=keys, hit_policy=policy)


def test_pools_beside_keys_and_values(make):
    kv, side, swa = pools.mha(), pools.mla(), pools.mha(layers=1)
    one = make(kv)
    one.register_mem_host_pool_v2(kv, PoolName.KV)
    one.register_mem_host_pool_v2(side, PoolName.INDEXER)
    one.register_mem_host_pool_v2(swa, PoolName.SWA)
    keys = names("v2", 8)
    assert all(keep(one, kv, keys))
    for page, key in enumerate(keys):
        fill(side, page, key)
        fill(swa, page, key)
    # The indexer has 6 of 8 pages, the window pages 1, 2 and 4, 5.
    written = one.batch_set_v2(
        [
            transfer(PoolName.INDEXER, keys[:6], range(6)),
            transfer(PoolName.SWA, [keys[i] for i in (1, 2, 4, 5)], (1, 2, 4, 5)),
        ]
    )
    assert written == {PoolName.INDEXER: [True] * 6, PoolName.SWA: [True] * 4}
    trailing = PoolHitPolicy.TRAILING_PAGES
    found = one.batch_exists_v2(keys, [transfer(PoolName.INDEXER, None, None)])
    assert found.kv_hit_pages == 6
    assert found.extra_pool_hit_pages == {PoolName.KV: 8, PoolName.INDEXER: 6}
    found = one.batch_exists_v2(
        keys,
        [
            transfer(PoolName.INDEXER, None, None),
            transfer(PoolName.SWA, keys[-2:], None, trailing),
        ],
    )
    assert found.kv_hit_pages == 6 and found.restorable_prefix_pages == [3, 6]
    window = transfer(PoolName.SWA, keys[:2], None, trailing)
    found = one.batch_exists_v2(keys[:5], [window])
    assert found.kv_hit_pages == 3 and found.restorable_prefix_pages == [3]
    # A policy that never decides says nothing.
    groups = transfer(PoolName.SWA, None, None, PoolHitPolicy.BLOCK_GROUPS)
    found = one.batch_exists_v2(keys, [groups])
    assert found.kv_hit_pages == 8 and PoolName.SWA not in found.extra_pool_hit_pages
    wipe(side), wipe(swa)
    got = one.batch_get_v2(
        [
            transfer(PoolName.INDEXER, keys[:7], range(20, 27)),
            transfer(PoolName.SWA, keys[4:6], (30, 31)),
        ]
    )
    assert got == {PoolName.INDEXER: [True] * 6 + [False], PoolName.SWA: [True] * 2}
    assert all(holds(side, 20 + i, keys[i]) for i in range(6))
    assert holds(swa, 30, keys[4]) and holds(swa, 31, keys[5])


def test_transfers_that_cannot_be_right(make):
    kv = pools.mha()
    one = make(kv)
    one.register_mem_host_pool_v2(kv, PoolName.KV)
    keys = names("odd", 3)
    assert one.batch_get_v2([transfer(PoolName.MAMBA, keys, range(3))]) == {
        PoolName.MAMBA: [False] * 3
    }
    assert one.batch_set_v2([transfer(PoolName.KV, keys, range(2))]) == {
        PoolName.KV: [False] * 3
    }
    assert one.batch_get_v2([transfer(PoolName.KV, keys, None)]) == {
        PoolName.KV: [False] * 3
    }
    found = one.batch_exists_v2(keys, [transfer(PoolName.MAMBA, keys, None)])
    assert found.kv_hit_pages == 0


def test_an_anchor_without_bytes(make):
    from sglang.srt.mem_cache.memory_pool_host import LogicalHostPool

    anchor, side = LogicalHostPool(pools.PAGE * pools.PAGES, pools.PAGE), pools.mla()
    one = make(anchor, is_mla_model=True)
    one.register_mem_host_pool_v2(side, PoolName.DEEPSEEK_V4_C4)
    keys = names("anchor", 4)
    assert one.batch_set_v1(keys, pages_at(*range(4))) == [True] * 4
    assert one.batch_exists(keys) == 0  # of itself it keeps nothing
    for page, key in enumerate(keys):
        fill(side, page, key)
    assert one.batch_set_v2([transfer(PoolName.DEEPSEEK_V4_C4, keys[:3], range(3))])
    found = one.batch_exists_v2(keys, [transfer(PoolName.DEEPSEEK_V4_C4, None, None)])
    assert found.kv_hit_pages == 3
    assert one.batch_get_v1(keys, pages_at(*range(4))) == [True] * 4


# ---- The copying interface ----


def test_without_interface_v1(make):
    pool = pools.mha("layer_first")
    one = make(pool, dict(interface_v1=0))
    keys = names("generic", 5)
    for page, key in enumerate(keys):
        fill(pool, page, key)
    data = [pool.get_data_page(page * pools.PAGE) for page in range(5)]
    assert one.batch_set(keys[:4], data[:4]) and one.set(keys[4], data[4])
    assert one.exists(keys[0]) and not one.exists(names("not there", 1)[0])
    assert one.batch_exists(keys) == 5
    blanks = [pool.get_dummy_flat_data_page() for _ in keys]
    got = one.batch_get([*keys[:4], names("not there", 1)[0]], blanks)
    assert got[4] is None
    for key, page in zip(keys[:4], got):
        assert page.dtype == pool.dtype
        assert page.view(torch.uint8).flatten().tolist() == content(
            key, page.nbytes
        ).tolist()
    assert one.get(keys[4], blanks[4]) is blanks[4]
    in_place = make(pools.mha("layer_first"))  # another order of bytes
    assert in_place.batch_exists(keys) == 0


# ---- The rest ----


def test_clear_and_metrics(make):
    pool = pools.mha()
    one = make(pool, dict(weights="cd" * 32), enable_storage_metrics=True)
    keys = names("clear", 6)
    assert all(keep(one, pool, keys)) and one.batch_exists(keys) == 6
    assert all(one.batch_get_v1(keys, pages_at(*range(6))))
    stats = one.get_stats()
    assert stats.backup_pgs == [6] and stats.prefetch_pgs == [6]
    assert stats.backup_bandwidth[0] > 0 and one.get_stats().backup_pgs == []
    one.clear()
    assert one.batch_exists(keys) == 0
    assert all(keep(one, pool, keys)) and one.batch_exists(keys) == 6


def test_wrong_settings_stop_the_server(documented, shared_daemon):
    pool = pools.mha()
    with pytest.raises(ValueError, match="does not know sokcet; it knows cache_dtype"):
        backend(documented, shared_daemon.socket, pool, dict(sokcet="x"))
    with pytest.raises(ValueError, match="64 hexadecimal"):
        backend(documented, shared_daemon.socket, pool, dict(weights="abcd"))
    with pytest.raises(FileNotFoundError):
        backend(documented, shared_daemon.socket, pool, dict(weights=None))
    with pytest.raises(ValueError, match="deadline_ms"):
        backend(documented, shared_daemon.socket, pool, dict(deadline_ms=0))


def test_weights_of_a_folder(documented, shared_daemon, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    pool = pools.mha()
    extra = dict(weights=None, model_path=str(tmp_path))

    def made():
        return backend(documented, shared_daemon.socket, pool, extra)

    keys = names("folder", 2)
    assert all(keep(made(), pool, keys)) and made().batch_exists(keys) == 2
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    assert made().batch_exists(keys) == 0


def test_three_threads_as_sglang_has_them(make):
    pool = pools.mha()
    one = make(pool)
    wrong = []

    def work(number):
        try:
            for turn in range(20):
                keys = names(f"thread {number} {turn}", 4)
                mine = [number * 20 + i for i in range(4)]
                for page, key in zip(mine, keys):
                    fill(pool, page, key)
                assert all(one.batch_set_v1(keys, pages_at(*mine)))
                assert one.batch_exists(keys) == 4
                there = [number * 20 + 10 + i for i in range(4)]
                assert all(one.batch_get_v1(keys, pages_at(*there)))
                assert all(holds(pool, page, key) for page, key in zip(there, keys))
        except BaseException as error:  # noqa: BLE001: for the main thread
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong


# ---- Failures ----


def everything_misses(one, keys):
    """Within the deadlines, and without an exception."""
    started = time.monotonic()
    count = len(keys)
    where = pages_at(*range(count))
    assert one.batch_exists(keys) == 0
    assert one.batch_get_v1(keys, where) == [False] * count
    assert one.batch_set_v1(keys, where) == [False] * count
    assert one.batch_exists_v2(keys, []).kv_hit_pages == 0
    each = transfer(PoolName.KV, keys, range(count))
    assert one.batch_get_v2([each]) == {PoolName.KV: [False] * count}
    assert one.batch_set_v2([each]) == {PoolName.KV: [False] * count}
    page = one.mem_pool_host.get_dummy_flat_data_page()
    assert one.get(keys[0], page) is None and not one.set(keys[0], page)
    assert one.batch_get(keys[:1], [page]) == [None] and not one.exists(keys[0])
    one.clear()
    one.get_stats()
    return time.monotonic() - started


def test_no_daemon_at_first(documented, make_daemon, tmp_path):
    pool = pools.mha()
    one = backend(documented, tmp_path / "nobody", pool)
    assert everything_misses(one, names("nobody", 3)) < 5
    one.close()


def test_killed_and_started_again(documented, daemon):
    pool = pools.mha()
    one = backend(documented, daemon.socket, pool, dict(durable=True))
    keys = names("killed", 8)
    assert all(keep(one, pool, keys))
    daemon.kill()
    assert everything_misses(one, names("away", 3)) < 5
    assert (pool.kv_buffer.view(torch.uint8) == 0xEE).all()
    daemon.start()
    until(lambda: one.batch_exists(keys) == 8)
    assert all(one.batch_get_v1(keys, pages_at(*range(8))))
    assert all(holds(pool, i, key) for i, key in enumerate(keys))
    assert all(one.batch_set_v1(names("after", 2), pages_at(0, 1)))


def test_a_daemon_that_hangs(documented, daemon):
    """Every call ends at its deadline."""
    pool = pools.mha()
    one = backend(documented, daemon.socket, pool, dict(deadline_ms=300))
    keys = names("hangs", 4)
    until(lambda: all(keep(one, pool, keys)))
    daemon.freeze()
    try:
        for call in (
            lambda: one.batch_exists(names("hung", 3)),
            lambda: sum(one.batch_get_v1(names("hung", 3), pages_at(0, 1, 2))),
            lambda: sum(one.batch_set_v1(names("hung", 3), pages_at(0, 1, 2))),
        ):
            started = time.monotonic()
            assert call() == 0
            assert time.monotonic() - started < 3
    finally:
        daemon.thaw()
    until(lambda: one.batch_exists(keys) == 4)


def test_damaged_pages_are_misses(documented, daemon):
    pool = pools.mha()
    one = backend(documented, daemon.socket, pool, dict(durable=True))
    keys = names("damaged", 16)
    assert all(keep(one, pool, keys))
    daemon.kill()
    size = pool.get_dummy_flat_data_page().nbytes
    needles = [content(key, size).tobytes()[:16] for key in keys[::2]]
    files = [file for file in (daemon.folder / "nvme").rglob("*") if file.is_file()]
    assert sum(damage(file, needles) for file in files) == 8
    daemon.start()
    one = backend(documented, daemon.socket, pool)
    got = [one.batch_get_v1([key], pages_at(i))[0] for i, key in enumerate(keys)]
    assert got == [False, True] * 8
    assert all(holds(pool, i, keys[i]) for i in range(1, 16, 2))


def damage(file, needles):
    """Turns a bit behind each needle's beginning; how many there were."""
    data, found = bytearray(file.read_bytes()), 0
    for needle in needles:
        at = data.find(needle)
        if at >= 0:
            data[at + 3] ^= 0x40
            found += 1
    file.write_bytes(data)
    return found


def test_closed_means_misses(make):
    pool = pools.mha()
    one = make(pool)
    keys = names("closed", 3)
    assert all(keep(one, pool, keys))
    one.close()
    one.close()
    everything_misses(one, keys)


def test_the_documented_line_is_read_by_sglang(documented):
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import (
        HybridCacheController,
    )

    extra, *_ = HybridCacheController.parse_storage_backend_extra_config(documented)
    assert extra == json.loads(documented)
    assert extra["module_path"] == "larder.sglang" and extra["interface_v1"] == 1

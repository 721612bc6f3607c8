"""LarderTier through vLLM's released tiering classes: the factory, and the manager
that moves chunks between its host slab and the tiers behind it."""

import hashlib
import time
import types

import numpy as np
import pytest
from vllm.v1.kv_offload.base import LookupResult, OffloadingSpec, ReqContext
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.base import make_offload_key
from vllm.v1.kv_offload.tiering.base import TransferJob
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

import larder.vllm

ROWS, ROW = 24, 64 * 1024
CONTEXT = ReqContext(req_id="r")
PATIENCE = 60


class Spec(OffloadingSpec):
    def get_manager(self):
        raise NotImplementedError

    def get_worker(self, kv_caches):
        raise NotImplementedError


def spec(**changes):
    about = dict(
        groups=(OffloadingGroupConfig(16, ("l0", "l1"), 0),),
        worker_kv_bytes_per_block=ROW,
        enable_kv_cache_events=False,
        extra_config={},
        engine_id="e",
        model=OffloadingModelConfig("model", "bfloat16"),
        cache=OffloadingCacheConfig(16, 1),
        parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, False),
        kv_cache_layout="LBNHC",
    )
    return Spec(OffloadingConfig(**(about | changes)))


def key(number):
    return make_offload_key(hashlib.sha256(str(number).encode()).digest(), 0)


def content(number):
    return np.random.default_rng(number).integers(-128, 128, ROW, dtype=np.int8)


class Tier:
    """A tier and the slab it serves."""

    def __init__(self, socket, spec, weights="ab" * 32, **more):
        self.slab = np.zeros((ROWS, ROW), np.int8)
        larder.vllm.register()
        self.tier = SecondaryTierFactory.create_secondary_tier(
            {"type": "larder", "socket": socket, "weights": weights, **more},
            memoryview(self.slab),
            spec,
        )
        self.jobs = 0

    def connected(self):
        until = time.monotonic() + PATIENCE
        while self.tier._connection.space() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        return self

    def submit(self, what, keys, rows):
        self.jobs += 1
        job = TransferJob(self.jobs, keys, np.array(rows), what == "load", CONTEXT)
        getattr(self.tier, f"submit_{what}")(job)
        return self.jobs

    def wait(self, *jobs):
        done, until = {}, time.monotonic() + PATIENCE
        while set(done) != set(jobs):
            assert time.monotonic() < until
            done |= {result.job_id: result for result in self.tier.get_finished_jobs()}
        assert not self.tier.has_pending_work()
        return [done[job] for job in jobs]

    def lookup(self, key):
        until = time.monotonic() + PATIENCE
        while (found := self.tier.lookup(key, CONTEXT)) in (
            LookupResult.RETRY,
            LookupResult.HIT_PENDING,
        ):
            assert time.monotonic() < until
        return found


@pytest.fixture
def make(request):
    made = []

    def make(daemon, spec_=None, **more):
        made.append(Tier(daemon.socket, spec_ or spec(), **more))
        return made[-1]

    yield make
    for one in made:
        one.tier.shutdown()


def test_rows_go_out_and_come_back(shared_daemon, make):
    one = make(shared_daemon).connected()
    for i in range(8):
        one.slab[i] = content(i)
    (stored,) = one.wait(one.submit("store", [key(i) for i in range(8)], range(8)))
    assert stored.success
    two = make(shared_daemon).connected()
    assert [two.lookup(key(i)) for i in range(9)] == [LookupResult.HIT] * 8 + [
        LookupResult.MISS
    ]
    rows = [20, 3, 9, 1, 7, 15, 2, 23]
    (loaded,) = two.wait(two.submit("load", [key(i) for i in range(8)], rows))
    assert loaded.success
    for i, row in enumerate(rows):
        assert np.array_equal(two.slab[row], content(i))
    untouched = set(range(ROWS)) - set(rows)
    assert not two.slab[list(untouched)].any()


def test_a_missing_chunk_fails_by_itself(shared_daemon, make):
    tier = make(shared_daemon, weights="cd" * 32).connected()
    tier.slab[0] = content(0)
    tier.wait(tier.submit("store", [key(0)], [0]))
    (partly,) = tier.wait(tier.submit("load", [key(0), key(99)], [5, 6]))
    assert not partly.success and list(partly.successful_keys) == [key(0)]
    assert np.array_equal(tier.slab[5], content(0)) and not tier.slab[6].any()
    (wrong,) = tier.wait(tier.submit("load", [key(0)], [ROWS]))
    assert not wrong.success


@pytest.mark.parametrize(
    "change",
    [
        dict(model=OffloadingModelConfig("model", "float16")),
        dict(kv_cache_layout="LBHNC"),
        dict(parallel=OffloadingParallelConfig(0, 2, 2, 1, 1, 1, 0, 1, None, False)),
        dict(groups=(OffloadingGroupConfig(32, ("l0", "l1"), 0),)),
    ],
    ids=["dtype", "layout", "ranks", "blocks"],
)
def test_another_geometry_misses(shared_daemon, make, change):
    one = make(shared_daemon, weights="ef" * 32).connected()
    one.wait(one.submit("store", [key(0)], [0]))
    assert one.lookup(key(0)) == LookupResult.HIT
    other = make(shared_daemon, spec(**change), weights="ef" * 32).connected()
    assert other.lookup(key(0)) == LookupResult.MISS


def test_without_a_daemon_and_after_it_died(make_daemon, make):
    daemon = make_daemon()
    tier = make(daemon, durable=True).connected()
    tier.slab[0] = content(0)
    assert tier.wait(tier.submit("store", [key(0)], [0]))[0].success
    daemon.kill()
    jobs = [tier.submit("load", [key(0)], [1]), tier.submit("store", [key(1)], [0])]
    assert [result.success for result in tier.wait(*jobs)] == [False, False]
    assert tier.tier.lookup(key(5), CONTEXT) in (LookupResult.MISS, LookupResult.RETRY)
    late = make(types.SimpleNamespace(socket=daemon.socket))
    assert late.tier.lookup(key(0), CONTEXT) == LookupResult.MISS
    assert not late.wait(late.submit("load", [key(0)], [1]))[0].success
    late.tier.drain_jobs()
    daemon.start()
    for one in (tier, late.connected()):
        until = time.monotonic() + PATIENCE
        while not one.wait(one.submit("load", [key(0)], [2]))[0].success:
            assert time.monotonic() < until
        assert np.array_equal(one.slab[2], content(0))


def test_drain_leaves_nothing_under_way(shared_daemon, make):
    tier = make(shared_daemon, weights="12" * 32).connected()
    jobs = [tier.submit("store", [key(i)], [i]) for i in range(ROWS)]
    tier.tier.drain_jobs()
    assert not tier.tier.has_pending_work()
    assert {result.job_id for result in tier.tier.get_finished_jobs()} == set(jobs)

"""LarderTier behind vLLM's own OffloadingConnector, TieringOffloadingSpec, its manager
and its CPU tier, under vLLM's own scheduler.

Only the copies between a GPU and vLLM's slab are not vLLM's: both sides are host
memory here, and a copy is a copy. Every page that comes back is checked against the
tokens that led to it."""

import ctypes
import gc
import pathlib
import time

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (
    OffloadingConnector,
)
from vllm.plugins import load_general_plugins
from vllm.v1.kv_offload.base import LookupResult
from vllm.v1.kv_offload.cpu import gpu_worker
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
from vllm.v1.request import RequestStatus

import tiny
from engine import Engine

PATIENCE = 60
ROWS, CHUNK = 24, 32  # of vLLM's CPU tier; tokens of a row


class OnHost(torch.Tensor):
    """A host tensor that says it is on a GPU."""

    is_cuda = property(lambda self: True)


class AtOnce:
    """A stream, or an event of one: what is ordered has happened."""

    def __init__(self, **_):
        pass

    def record(self, stream):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0

    def synchronize(self):
        pass

    def wait_stream(self, other):
        pass

    def wait_event(self, other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class HostPlatform:
    Stream = AtOnce

    @staticmethod
    def current_stream():
        return AtOnce()

    @staticmethod
    def stream(one):
        return one

    @staticmethod
    def is_xpu():
        return False


class HostHandler(gpu_worker.SingleDirectionOffloadingHandler):
    """vLLM's pointers, copied by memmove."""

    def __init__(self, gpu_tensors, **more):
        super().__init__([t.as_subclass(OnHost) for t in gpu_tensors], **more)
        self._swap_blocks_batch = self._copy

    @staticmethod
    def _copy(sources, targets, sizes, **_):
        for source, target, size in zip(sources.tolist(), targets.tolist(), sizes.tolist()):
            ctypes.memmove(target, source, size)


class HostSpec(TieringOffloadingSpec):
    """vLLM's, without its question for a GPU."""

    def get_worker(self, kv_caches):
        if self._worker is None:
            self._worker = self.create_worker(kv_caches)
        return self._worker


class TierEngine(Engine):
    """vLLM with OffloadingConnector: GPU pages, CPU tier, Larder."""

    @staticmethod
    def _connector(socket, weights, extra):
        tier = {"type": "larder", "socket": socket, "weights": weights, "deadline": 20.0}
        return dict(
            kv_connector="OffloadingConnector",
            kv_connector_extra_config={
                "spec_name": "HostSpec",
                "spec_module_path": __name__,
                "cpu_bytes_to_use": ROWS * 4096,
                "block_size": CHUNK,
                "secondary_tiers": [tier | extra],
            },
        )

    def _worker(self, cache):
        return OffloadingConnector(self.config, KVConnectorRole.WORKER, cache)

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.manager = self.scheduler.connector.connector_scheduler.manager
        (self.tier,) = self.manager.secondary_tiers
        self.stored: dict[str, list] = {}  # a request's keys
        submit = self.tier.submit_store

        def submit_store(job):
            self.stored.setdefault(job.req_context.req_id, []).extend(job.keys)
            submit(job)

        self.tier.submit_store = submit_store

    def ask(self, name, tokens, count=4):
        """Of a GPU that has forgotten all; how many tokens came from elsewhere."""
        assert self.scheduler.reset_prefix_cache()
        self.add(name, tokens, tokens=count)
        self.run()
        assert not self.manager._jobs and not self.manager.has_pending_work()
        return self.external[name]

    def in_primary(self, name):
        """How many of a request's chunks vLLM's CPU tier has."""
        found = [self.manager.primary_tier._policy.get(key) for key in self.stored[name]]
        return len(found) - found.count(None)

    def evict(self, name):
        """Asks other questions until vLLM's CPU tier has none of a request's chunks."""
        seed = 1000
        while self.in_primary(name):
            seed += 1
            assert seed < 1100
            self.ask(f"{name} {seed}", tiny.prompt(seed, 200))

    def in_larder(self, name):
        """Whether Larder says that it has all of a request's chunks."""
        return all(self.found(key) == LookupResult.HIT for key in self.stored[name])

    def found(self, key):
        """Larder's answer; old ones are given for a moment, and renewed meanwhile."""
        until = time.monotonic() + 2
        while (said := self.tier.lookup(key, None)) != LookupResult.HIT:
            if time.monotonic() > until:
                break
        return said

    def connected(self):
        until = time.monotonic() + PATIENCE
        while self.tier._connection.space() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        return self


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make(shared_daemon, model, request, monkeypatch):
    monkeypatch.setattr(gpu_worker, "current_platform", HostPlatform)
    monkeypatch.setattr(gpu_worker, "SingleDirectionOffloadingHandler", HostHandler)
    monkeypatch.setattr(torch, "Event", AtOnce)
    load_general_plugins()  # as every process of vLLM does
    assert "larder" in SecondaryTierFactory._registry
    made = []

    def make(**options):
        options.setdefault("seed_of_weights", request.node.nodeid)
        made.append(TierEngine(model, options.pop("socket", shared_daemon.socket), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


A = tiny.prompt(1, 200)  # 6 chunks and a rest
WHOLE = 200 // CHUNK * CHUNK


def test_evicted_chunks_are_promoted_again(make):
    one = make().connected()
    assert one.ask("a", A) == 0
    assert one.in_primary("a") == len(one.stored["a"]) == WHOLE // CHUNK
    assert one.ask("from the primary", A) == WHOLE
    one.evict("a")
    assert one.in_larder("a")
    # Every page is checked as it is read: see Engine.
    assert one.ask("from larder", A) == WHOLE
    assert one.outputs["from larder"] == one.outputs["a"]


def test_another_instance_finds_them(make):
    one = make().connected()
    prompts = {f"p{i}": tiny.prompt(50 + i, 150 + 20 * i) for i in range(6)}
    prompts["shares"] = prompts["p3"][:100] + tiny.prompt(9, 70)
    for name, tokens in prompts.items():
        one.ask(name, tokens)
    # Twice as much as fits into its primary tier, all at once.
    two = make().connected()
    for name, tokens in prompts.items():
        two.add(name, tokens)
    two.run()
    assert two.outputs == one.outputs
    assert sum(two.external[name] for name in prompts) > 0
    for name, tokens in prompts.items():
        assert two.ask(f"{name} again", tokens) >= len(tokens) // CHUNK * CHUNK - CHUNK


def test_a_dead_daemon_costs_its_chunks_only(make, make_daemon):
    daemon = make_daemon()
    one = make(socket=daemon.socket).connected()
    right = make()  # with another daemon
    for which in (one, right):
        which.ask("a", A)
    daemon.kill()
    one.evict("a")
    assert one.ask("without", A) == 0
    assert one.ask("from the primary", A) == WHOLE
    daemon.start()
    for again in range(500):
        name = f"again {again}"
        one.ask(name, tiny.prompt(2000 + again, 200))
        if one.in_larder(name):
            break
    else:
        raise AssertionError("nothing is stored any more")
    one.evict(name)
    assert one.ask("with", tiny.prompt(2000 + again, 200)) == WHOLE
    assert one.outputs["without"] == right.outputs["a"]
    # Killed while chunks are on their way up.
    one.evict(name)
    assert one.in_larder(name)
    assert one.scheduler.reset_prefix_cache()
    one.add("killed under", tiny.prompt(2000 + again, 200))
    steps_until_promotion(one)
    daemon.kill()
    one.run()
    assert one.outputs["killed under"] == one.outputs["with"]


def steps_until_promotion(one):
    until = time.monotonic() + PATIENCE
    while not any(job.transfer_job.is_promotion for job in one.manager._jobs.values()):
        assert time.monotonic() < until
        one.step()


@pytest.mark.parametrize("what", ["aborted", "reset"])
def test_under_a_promotion(make, what):
    make().connected().ask("a", A)
    two = make().connected()
    right = two.ask("other", tiny.prompt(2, 200))
    assert right == 0
    two.add("a", A)
    steps_until_promotion(two)
    if what == "aborted":
        two.scheduler.finish_requests(["a"], RequestStatus.FINISHED_ABORTED)
    else:
        assert two.scheduler.reset_connector_cache()
        assert not two.manager._jobs
    two.run()
    assert two.ask("again", A) == WHOLE
    assert two.in_larder("other")
    assert two.ask("other again", tiny.prompt(2, 200)) == WHOLE
    assert two.outputs["other again"] == two.outputs["other"]


def test_shutdown_lets_go_of_the_slab(make):
    one = make().connected()
    one.ask("a", A)
    slab = f"vllm_offload_{one.config.kv_transfer_config.engine_id}"
    maps = pathlib.Path("/proc/self/maps")
    assert slab in maps.read_text()
    # As vLLM ends: chunks are still under way.
    one.add("b", tiny.prompt(3, 200))
    while not one.manager._jobs:
        one.step()
    one.close()
    gc.collect()
    assert slab not in maps.read_text()
    assert not pathlib.Path(f"/dev/shm/{slab}.mmap").exists()

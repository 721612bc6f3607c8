"""LarderTier behind vLLM's own OffloadingConnector, TieringOffloadingSpec, its manager
and its CPU tier, under vLLM's own scheduler.

Only the copies between a GPU and vLLM's slab are not vLLM's: both sides are host
memory here, and a copy is a copy. Every page that comes back is checked against the
tokens that led to it."""

import ctypes
import os
import pathlib
import sys

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

from engine import Engine

import tiny

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

    @property
    def manager(self):
        return self.scheduler.connector.connector_scheduler.manager

    @property
    def tier(self):
        return self.manager.secondary_tiers[0]

    def ask(self, name, tokens, count=4):
        """Of a GPU that has forgotten all; how many tokens came from elsewhere."""
        assert self.scheduler.reset_prefix_cache()
        self.add(name, tokens, tokens=count)
        self.run()
        return self.external[name]

    def in_primary(self, name):
        """Which chunks of a request vLLM's CPU tier still has."""
        return [
            key in self.manager.primary_tier._policy.chunks
            if hasattr(self.manager.primary_tier._policy, "chunks")
            else None
            for key in name
        ]


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


def test_try(make):
    one = make()
    print(one.ask("a", tiny.prompt(1, 200)))
    print(one.ask("b", tiny.prompt(1, 200)))
    for i in range(8):
        print(one.ask(f"c{i}", tiny.prompt(10 + i, 200)))
    print(one.ask("d", tiny.prompt(1, 200)))
    two = make()
    print(two.ask("d", tiny.prompt(1, 200)))
    print(os.listdir("/dev/shm"))

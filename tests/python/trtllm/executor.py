"""Plays TensorRT-LLM's executor for a connector, after the documented interface:
TensorRT-LLM itself cannot be had without its CUDA wheels. Which calls come when,
what SchedulerOutput says, and that the metadata is pickled for every rank, is as in
its connectors/kv_cache_connector.py.

The "model" writes KV that depends on every token up to it, on the salt, the layer
and the rank; it reads all of it back before each token, as attention does.
"""

import contextlib
import dataclasses
import pickle
import types
import zlib
from unittest import mock

import torch

import larder.trtllm

BLOCK = 8  # tokens
LAYERS = 3
WIDTH = 12  # heads * head size


class WrongKv(AssertionError):
    """The model read KV that is not this prompt's."""


@dataclasses.dataclass
class RequestData:
    request_id: int
    new_tokens: list
    new_block_ids: list
    computed_position: int
    num_scheduled_tokens: int
    block_hashes: list = dataclasses.field(default_factory=list)
    priorities: list | None = None
    cache_salt: str | None = None
    new_block_ids_by_layer_group: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class SchedulerOutput:
    new_requests: list = dataclasses.field(default_factory=list)
    cached_requests: list = dataclasses.field(default_factory=list)


class Request:
    def __init__(self, number, tokens, **about):
        self.request_id = number
        self.tokens = list(tokens)
        self.__dict__.update(about)

    def get_tokens(self, beam):
        assert beam == 0
        return list(self.tokens)


class Stream:
    """Opaque to the connector but for this."""

    synchronized = 0

    def synchronize(self):
        self.synchronized += 1


def llm_args(**about):
    values = dict(
        model="model",
        dtype="float16",
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        context_parallel_size=1,
        enable_attention_dp=False,
        quant_config=None,
        kv_cache_config=types.SimpleNamespace(tokens_per_block=BLOCK, dtype="auto"),
    )
    return types.SimpleNamespace(**{**values, **about})


class Executor:
    """One model instance: rank 0's scheduler, and a worker with a pool per rank."""

    def __init__(
        self,
        ranks=1,
        blocks=64,
        dtype=torch.float16,
        scheduler=larder.trtllm.LarderScheduler,
        worker=larder.trtllm.LarderWorker,
        **about,
    ):
        args = llm_args(tensor_parallel_size=ranks, **about)
        self.stream = Stream()
        self.pools = []
        self.workers = []
        for rank in range(ranks):
            with mock.patch.object(larder.trtllm, "_rank", lambda rank=rank: rank):
                self.workers.append(worker(args))
            pool = torch.zeros(blocks, LAYERS, 2, BLOCK * WIDTH, dtype=dtype)
            pool.view(torch.uint8).fill_(0xEE)
            self.pools.append(pool)
        self.scheduler = scheduler(args)
        for one, pool in zip(self.workers, self.pools):
            one.register_kv_caches(pool)
        self.free = list(range(blocks))[::-1]
        self.number = 0
        # Tokens that the last prompt did not compute.
        self.loaded = 0

    def run(
        self,
        tokens,
        generate=1,
        on_device=0,
        chunk=None,
        window=None,
        between=None,
        **about,
    ):
        """One request from its arrival to its end; the tokens it generates.

        `on_device`: a prefix that the pool has already. `chunk`: prefill in pieces.
        `window`: blocks before it are given back as -1. `between`: called after the
        promise.
        """
        self.number += 1
        request = Request(self.number, tokens, **about)
        salt = about.get("cache_salt")
        prompt = len(tokens)
        own = [self.free.pop() for _ in range(-(-(prompt + generate) // BLOCK))]
        self._compute(request, own, 0, on_device, salt)
        matched, later = self.scheduler.get_num_new_matched_tokens(request, on_device)
        assert later is False and matched >= 0
        assert on_device + matched < prompt
        if matched:
            assert (on_device + matched) % BLOCK == 0
        self.scheduler.update_state_after_alloc(request, own)
        if between is not None:
            between()
        self.loaded = matched
        position, new, made, told, first = on_device + matched, True, [], 0, True
        shown = own
        if window is not None:
            shown = [-1 if i < window else block for i, block in enumerate(own)]
        told_blocks = 0
        while len(made) < generate:
            total = len(request.tokens)
            if position < prompt:
                count = min(chunk or prompt, prompt - position)
                begin = position
            else:
                count, begin = 1, total - 1
            have = -(-(begin + count) // BLOCK) if not first else len(shown)
            data = RequestData(
                request.request_id,
                request.tokens[told:],
                shown[told_blocks : max(have, told_blocks)],
                begin - (matched if first else 0),
                count,
                cache_salt=salt,
            )
            told, told_blocks = total, max(have, told_blocks)
            output = SchedulerOutput([data] if new else [], [] if new else [data])
            self._step(output, request, own, begin, count, salt)
            new = first = False
            position = begin + count
            if position >= prompt:
                made.append(self._next(request))
                request.tokens.append(made[-1])
        assert self.scheduler.request_finished(request, shown) is False
        self.free.extend(reversed(own))
        return made

    def _step(self, output, request, own, begin, count, salt):
        meta = pickle.dumps(self.scheduler.build_connector_meta(output))
        for one in self.workers:
            one.bind_connector_meta(pickle.loads(meta))
            one.start_load_kv(self.stream)
        for layer in range(LAYERS):
            for one in self.workers:
                one.wait_for_layer_load(layer, self.stream)
        self._compute(request, own, begin, begin + count, salt)
        for layer in range(LAYERS):
            for one in self.workers:
                one.save_kv_layer(layer, self.stream)
        for one in self.workers:
            one.wait_for_save(self.stream)
            assert one.get_finished([], []) == ([], [])

    def _compute(self, request, own, begin, end, salt):
        """Reads all KV before `begin`, writes that of [begin, end)."""
        states = kv_states(request.tokens[:end], salt)
        for rank, pool in enumerate(self.pools):
            for position in range(end):
                place = pool[own[position // BLOCK]].view(LAYERS, 2, BLOCK, WIDTH)
                place = place[:, :, position % BLOCK]
                right = kv_of(states[position], rank, pool.dtype)
                if position >= begin:
                    place.copy_(right)
                elif not torch.equal(place.view(torch.uint8), right.view(torch.uint8)):
                    raise WrongKv(f"rank {rank} token {position}")

    @staticmethod
    def _next(request):
        return zlib.crc32(repr(request.tokens).encode()) % 1000


def kv_states(tokens, salt):
    """One number per position, of all tokens up to it."""
    state, states = zlib.crc32(str(salt).encode()), []
    for token in tokens:
        state = zlib.crc32(f"{state} {token}".encode())
        states.append(state)
    return states


def kv_of(state, rank, dtype):
    numbers = torch.arange(LAYERS * 2 * WIDTH).view(LAYERS, 2, WIDTH)
    return ((numbers * 7 + state + rank * 131) % 251).to(dtype)


@contextlib.contextmanager
def environment(**values):
    """LARDER_... variables."""
    named = {f"LARDER_{name.upper()}": str(value) for name, value in values.items()}
    with mock.patch.dict("os.environ", named):
        yield

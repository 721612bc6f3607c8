"""vLLM's own scheduler and LarderConnector around a model that is none: a token's
KV says which tokens led to it, so that every page read checks itself.

Everything but the forward pass is vLLM's released code.
"""

import hashlib
import pathlib

import numpy as np
import torch
from vllm.config import KVTransferConfig, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from larder.vllm.connector import LarderConnector

BLOCK = 16
HEAD = 8  # bytes of a key, and of a value


class Engine:
    """One vLLM instance of `ranks` workers. step() is one pass of its loop."""

    def __init__(
        self,
        model: pathlib.Path,
        socket: str,
        *,
        blocks: int = 256,
        window: int = 0,
        ranks: int = 1,
        latent: bool = False,
        budget: int = 64,
        seed_of_weights: str = "a",
        policy: str = "recompute",
        implementation: str = "auto",
        **extra,
    ):
        arguments = EngineArgs(
            model=str(model),
            model_impl=implementation,
            max_model_len=1024,
            max_num_batched_tokens=budget,
            max_num_seqs=8,
            block_size=BLOCK,
            enforce_eager=True,
            async_scheduling=False,
            kv_transfer_config=KVTransferConfig(
                kv_role="kv_both",
                kv_load_failure_policy=policy,
                **self._connector(
                    socket,
                    hashlib.sha256(seed_of_weights.encode()).hexdigest(),
                    extra,
                ),
            ),
        )
        self.config = arguments.create_engine_config()
        self.config.parallel_config.tensor_parallel_size = ranks
        self.config.cache_config.block_size = BLOCK
        self.config.cache_config.num_gpu_blocks = blocks
        self.latent = latent
        # A latent is as large as a key and a value here.
        specs = [
            MLAAttentionSpec(**self._spec() | {"head_size": 2 * HEAD})
            if latent
            else FullAttentionSpec(**self._spec())
        ]
        if window:
            specs.append(SlidingWindowSpec(sliding_window=window, **self._spec()))
        self.groups = [
            KVCacheGroupSpec([f"g{g}.l{i}" for i in range(2)], spec)
            for g, spec in enumerate(specs)
        ]
        self.window = [0, window]
        page = specs[0].page_size_bytes
        cache = KVCacheConfig(
            num_blocks=blocks,
            kv_cache_tensors=[
                KVCacheTensor(
                    size=2 * page * blocks,
                    layers=group.layer_names,
                    layer_stride=page * blocks,
                    block_stride=page,
                )
                for group in self.groups
            ],
            kv_cache_groups=self.groups,
        )
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        with set_current_vllm_config(self.config):
            self.scheduler = Scheduler(
                vllm_config=self.config,
                kv_cache_config=cache,
                structured_output_manager=StructuredOutputManager(self.config),
                block_size=BLOCK,
                hash_block_size=BLOCK,
                log_stats=False,
            )
            self.workers = []
            for rank in range(ranks):
                self.config.parallel_config.rank = rank
                self.workers.append(self._worker(cache))
        self.caches = []
        for worker in self.workers:
            tensors = {
                name: torch.zeros((blocks, 1, BLOCK, 2 * HEAD), dtype=torch.int8)
                for group in self.groups
                for name in group.layer_names
            }
            worker.register_kv_caches(tensors)
            self.caches.append(tensors)
        self.outputs: dict[str, list[int]] = {}
        self.requests: dict[str, Request] = {}
        self.external: dict[str, int] = {}
        self.lost_blocks: set[int] = set()
        self.lost_requests: set[str] = set()
        self.aggregator = KVOutputAggregator(ranks)
        self.waits = 0

    @staticmethod
    def _connector(socket: str, weights: str, extra: dict) -> dict:
        """Of the transfer's configuration: which connector, and what it is told."""
        return dict(
            kv_connector="LarderConnector",
            kv_connector_module_path="larder.vllm",
            kv_connector_extra_config={
                "socket": socket,
                "weights": weights,
                "chunk_tokens": 64,
                "lookup_deadline": 10.0,
                "save_deadline": 10.0,
                "load_deadline": 20.0,
            }
            | extra,
        )

    def _worker(self, cache: KVCacheConfig):
        return LarderConnector(self.config, KVConnectorRole.WORKER, cache)

    @staticmethod
    def _spec() -> dict:
        return dict(block_size=BLOCK, num_kv_heads=1, head_size=HEAD, dtype=torch.int8)

    def request(self, name: str, prompt: list[int], tokens: int = 4, **more) -> Request:
        return Request(
            request_id=name,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=tokens, ignore_eos=True),
            pooling_params=None,
            block_hasher=self.hasher,
            **more,
        )

    def add(self, name: str, prompt: list[int], tokens: int = 4, **more) -> None:
        request = self.request(name, prompt, tokens, **more)
        self.requests[name] = request
        self.outputs[name] = []
        self.scheduler.add_request(request)

    def run(self) -> None:
        """Until nothing is left to do."""
        for _ in range(100_000):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def step(self) -> None:
        output = self.scheduler.schedule()
        if not output.num_scheduled_tokens:
            self.waits += 1
        sync = output.has_sync_kv_loads
        results = []
        tables = {
            name: self.scheduler.kv_cache_manager.get_block_ids(name)
            for name in output.num_scheduled_tokens
        }
        for new in output.scheduled_new_reqs:
            self.external.setdefault(new.req_id, new.num_computed_tokens)
        for rank, worker in enumerate(self.workers):
            worker.handle_preemptions(output.kv_connector_metadata)
            worker.bind_connector_metadata(output.kv_connector_metadata)
            if sync:
                worker.start_load_kv(None)
            self._forward(rank, worker, output, tables)
            if not sync:
                worker.start_load_kv(None)
            worker.wait_for_save()
            done = worker.get_transfer_results(output.finished_req_ids)
            results.append(
                KVConnectorOutput(
                    finished_sending=done.finished_sending,
                    finished_recving=done.finished_recving,
                    failed_recving=done.failed_recving,
                    invalid_block_ids=worker.get_block_ids_with_load_errors(),
                    kv_connector_worker_meta=worker.build_connector_worker_meta(),
                )
            )
            worker.clear_connector_metadata()
        names = list(output.num_scheduled_tokens)
        sampled = [[self._sample(n, output)] if self._samples(n, output) else []
                   for n in names]
        answers = [
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=sampled,
                kv_connector_output=result,
            )
            for result in results
        ]
        answer = self.aggregator.aggregate(answers)
        assert answer is not None and answer.kv_connector_output is not None
        self.lost_blocks |= answer.kv_connector_output.invalid_block_ids
        self.lost_requests |= answer.kv_connector_output.failed_recving
        self.scheduler.update_from_output(output, answer)
        for name in names:
            self.outputs[name] = list(self.requests[name].output_token_ids)

    def _forward(self, rank, worker, output, tables) -> None:
        computed = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens))
        for group_index, group in enumerate(self.groups):
            for layer, name in enumerate(group.layer_names):
                worker.wait_for_layer_load(name)
                pages = self.caches[rank][name]
                for request_id, count in output.num_scheduled_tokens.items():
                    before = computed[request_id]
                    blocks = tables[request_id][group_index]
                    window = self.window[group_index]
                    first = max(0, before + 1 - window) if window else 0
                    for position in range(first, before):
                        self._check(rank, request_id, name, pages, blocks, position)
                    for position in range(before, before + count):
                        row = pages[blocks[position // BLOCK], 0, position % BLOCK]
                        row[:] = self._kv(rank, request_id, name, position)
                worker.save_kv_layer(name, pages, None)

    def _check(self, rank, request_id, name, pages, blocks, position) -> None:
        block = blocks[position // BLOCK]
        if block in self._void():
            return
        right = self._kv(rank, request_id, name, position)
        got = pages[block, 0, position % BLOCK]
        assert torch.equal(got, right), (
            f"{request_id} reads a wrong byte at {position} of {name} (block {block})"
        )

    def _void(self) -> set[int]:
        """Blocks that a load within this step has lost: the step is void."""
        halves = [getattr(worker, "_worker", None) for worker in self.workers]
        return set().union(*(getattr(half, "_failed", ()) for half in halves))

    def _kv(self, rank, request_id, name, position) -> torch.Tensor:
        request = self.requests[request_id]
        tokens = np.array(request.all_token_ids[: position + 1], "<u4").tobytes()
        if self.latent:
            rank = 0  # the same on all
        about = f"{rank}|{name}|{request.cache_salt}|{self._lora(request)}|"
        for feature in request.mm_features:
            if feature.mm_position.offset <= position:
                about += f"{feature.identifier}@{feature.mm_position.offset}|"
        digest = hashlib.sha256(about.encode() + tokens).digest()[: 2 * HEAD]
        return torch.from_numpy(np.frombuffer(digest, np.int8).copy())

    @staticmethod
    def _lora(request) -> str:
        if request.lora_request is None:
            return ""
        path = pathlib.Path(request.lora_request.lora_path) / "adapter_model.bin"
        return path.read_text()

    def _samples(self, name, output) -> bool:
        request = self.requests[name]
        return request.num_computed_tokens >= request.num_tokens

    def _sample(self, name, output) -> int:
        tokens = np.array(self.requests[name].all_token_ids, "<u4").tobytes()
        return int.from_bytes(hashlib.sha256(tokens).digest()[:2], "little")

    def close(self) -> None:
        self.scheduler.shutdown()
        for worker in self.workers:
            worker.shutdown()

"""vLLM's KVConnectorBase_V1 over Larder."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from .._engine import Complaints
from .scheduler import SchedulerHalf
from .settings import Geometry, Settings, Unsupported
from .steps import Step
from .worker import IdleWorker, WorkerHalf

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.larder")


class LarderMetadata(KVConnectorMetadata):
    """A Step, pickled from the scheduler to the workers."""

    def __init__(self, step: Step):
        self.step = step


class LarderConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps vLLM's KV in Larder, as chunks named by their tokens.

    The scheduler's half asks the daemon behind its back and answers "ask
    again" meanwhile; what it promises is held, so that it will not be evicted.
    The workers' half loads between steps (or layer by layer within one) and saves
    whole chunks as the prompt is computed.

    Nothing raises into vLLM after the start: whatever fails is a miss, logged and
    counted. A mistake in the configuration is refused at the start. Larder being
    away is no mistake: it is used as soon as it answers.
    """

    def __init__(
        self,
        vllm_config: "VllmConfig",
        role: KVConnectorRole,
        kv_cache_config: Any,
    ):
        super().__init__(vllm_config, role, kv_cache_config)
        settings = Settings.of(self._kv_transfer_config.kv_connector_extra_config)
        complain = Complaints(logger)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | IdleWorker | None = None
        try:
            geometry = Geometry(vllm_config, kv_cache_config, settings)
            several = len(geometry.groups) > 1
            if several and not hasattr(KVConnectorBase_V1, "get_transfer_results"):
                raise Unsupported("several groups, and no way to tell of a lost load")
        except Unsupported as error:
            logger.error("Larder cannot keep the KV of this vLLM: %s", error)
            if role == KVConnectorRole.WORKER:
                # The scheduler's half may see another geometry, and order.
                self._worker = IdleWorker()
            return
        if several and settings.load == "layerwise":
            # vLLM has no way to report a load within a step that was lost.
            logger.warning("Larder: with several groups of layers loads are async")
            settings.load = "async"
        if role == KVConnectorRole.SCHEDULER:
            if self._kv_transfer_config.kv_load_failure_policy != "recompute":
                logger.warning(
                    'Larder: set "kv_load_failure_policy": "recompute", or a chunk '
                    "that is lost between lookup and load fails its request"
                )
            self._scheduler = SchedulerHalf(geometry, complain)
        else:
            self._worker = WorkerHalf(
                geometry, vllm_config.parallel_config.rank, complain
            )

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a lost save is a later miss

    # ---- The scheduler's half ----

    def on_new_request(self, request: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.begin(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        return self._scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Any, blocks: Any, num_external_tokens: int
    ) -> None:
        if self._scheduler is not None and num_external_tokens > 0:
            self._scheduler.allocated(
                request, blocks.get_block_ids(), num_external_tokens
            )

    def build_connector_meta(self, scheduler_output: Any) -> LarderMetadata:
        if self._scheduler is None:
            return LarderMetadata(Step())
        return LarderMetadata(self._scheduler.step(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.loads_ended(
                connector_output.finished_recving or (),
                connector_output.invalid_block_ids,
                getattr(connector_output, "failed_recving", ()),
            )

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is None:
            return False, None
        return self._scheduler.finished(request, block_ids), None

    # ---- The workers' half ----

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return extra_config.get("load") == "layerwise"

    def register_kv_caches(self, kv_caches: dict[str, "torch.Tensor"]) -> None:
        if self._worker is not None:
            self._worker.register(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.start_loads(self._step())

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.wait_layer(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: a chunk is saved once its last layer is computed, in one piece."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.save(self._step())

    def get_finished(
        self, finished_req_ids: set[str]
    ) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        return self._worker.finished()

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results = super().get_transfer_results(finished_req_ids)
        if self._worker is not None:
            results.failed_recving |= self._worker.take_failed_requests()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set() if self._worker is None else self._worker.take_failed_blocks()

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
        if self._scheduler is not None:
            self._scheduler.shutdown()

    def take_events(self) -> Iterable[Any]:
        return ()

    def reset_cache(self) -> bool | None:
        """vLLM's /reset_prefix_cache: what Larder keeps stays right, and stays."""
        return True

    def _step(self) -> Step:
        return self._get_connector_metadata().step  # type: ignore[attr-defined]

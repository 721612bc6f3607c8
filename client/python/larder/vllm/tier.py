"""vLLM's SecondaryTierManager over Larder: rows of its host slab as values.

All methods run on the scheduler's thread and never wait, but for drain_jobs(),
which waits no longer than the deadline of the jobs.
"""

import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import (
    JobResult,
    SecondaryTierManager,
    TransferJob,
)

import larder
from larder import Op, State

from .._engine import Complaints, Connection, weights_told
from .settings import _distribution, layout_text, version_of

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import OffloadingSpec

logger = logging.getLogger("vllm.larder")

Opened = tuple[larder.Values, larder.Queue]

_RESULTS = {
    State.MISS: LookupResult.MISS,
    State.READY: LookupResult.HIT,
    State.DURABLE: LookupResult.HIT,
    State.PEER: LookupResult.HIT,
    State.PENDING: LookupResult.HIT_PENDING,
    State.UNKNOWN: LookupResult.RETRY,
}


class LarderTier(SecondaryTierManager):
    """Chunks of vLLM's CPU tier, kept in Larder.

    Args beside vLLM's own: `socket`, `token` (of larderd); `weights` (SHA-256 in
    hex; None: of the model's files); `deadline` (seconds that a job may take);
    `durable` (a store is done only when it survives power loss).
    """

    medium: ClassVar[Medium] = Medium.CPU

    def __init__(
        self,
        offloading_spec: "OffloadingSpec",
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        socket: str | None = None,
        token: str | None = None,
        weights: str | None = None,
        deadline: float = 10.0,
        durable: bool = False,
        locality: str | None = None,
    ):
        super().__init__(
            offloading_spec, primary_kv_view, tier_type, backpressure_detector
        )
        # An address and a stride; the array keeps the view alive.
        self._slab: np.ndarray | None = np.asarray(primary_kv_view).view(np.uint8)
        self._row_bytes = self._slab.shape[1]
        self._deadline = deadline
        self._durable = durable
        self._complain = Complaints(logger)
        self._finished: list[JobResult] = []
        self._jobs: dict[int, list[OffloadKey]] = {}
        if weights is not None:
            weights_told(weights, None)  # refused at the start
        config = offloading_spec.config

        def connect(deadline: float) -> larder.Client:
            return larder.Client(
                socket, token=token, name="vllm tier", connect_deadline=deadline
            )

        def open_values(client: larder.Client, _deadline: float, _of: Any) -> Opened:
            return self._open(client, config, weights), client.queue()

        # In the background, since weights may have to be read.
        self._connection: Connection[Opened] = Connection(
            connect, open_values, self._complain, deadline=1.0, in_background=True
        )
        self._connection.space()

    def _open(
        self, client: larder.Client, config: Any, weights: str | None
    ) -> larder.Values:
        parallel = config.parallel
        about = {
            "engine": "vllm tier",
            "version": version_of(_distribution()),
            "row": self._row_bytes,
            "layout": config.kv_cache_layout,
            "canonical": config.canonical_layout,
            "replicated": config.replicated_layout,
            "tokens_per_hash": config.cache.tokens_per_hash,
            "blocks_per_chunk": config.cache.blocks_per_chunk,
            "sizes": [
                parallel.world_size,
                parallel.tp_size,
                parallel.pp_size,
                parallel.pcp_size,
                parallel.dcp_size,
            ],
            "groups": [
                [group.tokens_per_block, *group.layer_names] for group in config.groups
            ],
        }
        return larder.Values(
            client,
            model=config.model.name,
            weights=weights_told(weights, config.model.name),
            cache_dtype=config.model.dtype,
            value_bytes_max=self._row_bytes,
            engine_layout=layout_text(about),
            hash_scheme="vllm block hash and group",
        )

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if (opened := self._connection.space()) is None:
            return LookupResult.MISS
        values, _ = opened
        try:
            ids = values.ids_from_hashes([bytes(key)])
            return _RESULTS[State(values.lookup_cached(ids)[0])]
        except larder.Error as error:
            self._complain("lookup", error)
            return LookupResult.MISS

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, "submit_put", durable=self._durable)

    def submit_load(self, job_metadata: TransferJob) -> None:
        self._submit(job_metadata, "submit_get")

    def _submit(self, job: TransferJob, call: str, **more: Any) -> None:
        keys = list(job.keys)
        try:
            opened = self._connection.space()
            if opened is None or self._slab is None:
                raise larder.Unavailable("not connected")
            values, queue = opened
            base, stride = self._slab.ctypes.data, self._slab.strides[0]
            rows = [
                (base + int(row) * stride, self._row_bytes) for row in job.chunk_ids
            ]
            if any(not 0 <= int(row) < len(self._slab) for row in job.chunk_ids):
                raise larder.InvalidArgument("a row outside the slab")
            getattr(values, call)(
                queue,
                [bytes(key) for key in keys],
                rows,
                user_data=job.job_id,
                deadline=self._deadline,
                **more,
            )
            self._jobs[job.job_id] = keys
        except Exception as error:  # noqa: BLE001: a failed job
            self._complain(call, error)
            self._finished.append(JobResult(job_id=job.job_id, success=False))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        self._take(0.0)
        finished, self._finished = self._finished, []
        return finished

    def _take(self, wait: float) -> None:
        opened = self._connection.space()
        while opened is not None and (done := opened[1].poll(wait=wait)):
            for completion in done:
                keys = self._jobs.pop(completion.user_data)
                good = completion.status == 0 and completion.good == len(keys)
                result = JobResult(job_id=completion.user_data, success=good)
                if not good and completion.op == Op.GET:
                    result.successful_keys = [
                        key for key, why in zip(keys, completion.per_key) if why == 0
                    ]
                self._finished.append(result)

    def has_pending_work(self) -> bool:
        return bool(self._jobs)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def drain_jobs(self) -> None:
        until = time.monotonic() + 2 * self._deadline
        while self._jobs and time.monotonic() < until:
            self._take(0.1)

    def shutdown(self) -> None:
        self.drain_jobs()
        if self._jobs:
            # vLLM keeps the slab mapped then.
            raise larder.DeadlineExceeded("Larder still copies to or from the slab")
        self._connection.close()
        self._slab = None

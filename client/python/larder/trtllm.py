"""Larder as TensorRT-LLM's KV cache connector: `LarderScheduler` on rank 0 and
`LarderWorker` on every rank. docs/trtllm.md has the configuration.

The scheduler's half asks how much of a prompt is there and holds it; the workers
load what is held into the pool before the step, and save whole chunks after it. A
chunk is there once every rank has saved its piece.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import threading
from typing import Any

import larder
from larder import Group, GroupKind, KeyKind, Layout

from ._engine import Complaints, Connection, weights_told

try:  # newer releases, then older ones
    from tensorrt_llm._torch.pyexecutor.connectors import kv_cache_connector as _base
except ImportError:
    try:
        from tensorrt_llm._torch.pyexecutor import kv_cache_connector as _base
    except ImportError:
        _base = None  # type: ignore[assignment]

_Scheduler: Any = object if _base is None else _base.KvCacheConnectorScheduler
_Worker: Any = object if _base is None else _base.KvCacheConnectorWorker

logger = logging.getLogger(__name__)


class LoadFailed(RuntimeError):
    """What was promised to the scheduler cannot be loaded. TensorRT-LLM has no way
    to take a promise back, and to go on would be to answer from wrong memory."""


@dataclasses.dataclass
class Settings:
    """From the environment: TensorRT-LLM's configuration has no place for more."""

    socket: str | None = None
    token: str | None = None
    # SHA-256 of the weights in hex; None: of the files of the model.
    weights: str | None = None
    chunk_tokens: int = 256
    lookup_deadline_ms: int = 100
    load_deadline_ms: int = 5000
    save_deadline_ms: int = 250
    # The worst KV that is loaded: 0 exact, 1 to 199 lossy up to that level. From
    # its first load of lossy KV on a worker saves nothing as better than that.
    worst_lineage: int = 0

    @classmethod
    def of_environment(cls) -> "Settings":
        """LARDER_SOCKET, LARDER_CHUNK_TOKENS, ...: the fields in capitals."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            text = os.environ.get(f"LARDER_{field.name.upper()}")
            if text:
                found[field.name] = int(text) if field.type is int else text
        return cls(**found)

    def connection(self, name: str, complain: Complaints) -> "Connection[larder.Space]":
        """To be asked for the space of a Geometry."""
        return Connection(
            lambda deadline: larder.Client(
                self.socket,
                token=self.token,
                name=f"trtllm {name}",
                deadline=self.lookup_deadline_ms / 1000,
                connect_deadline=deadline,
            ),
            lambda client, deadline, geometry: geometry.open(client, deadline),
            complain,
            deadline=self.lookup_deadline_ms / 1000,
        )


class Unsupported(Exception):
    """TensorRT-LLM is configured for something that Larder cannot keep."""


class Geometry:
    """The pool of one rank as a group of the space: pages as they are, a piece for
    each rank."""

    # What pages of vLLM's have as well; see vllm/pages.py.
    index = 0

    def __init__(self, llm_args: Any, pool: Any, settings: Settings):
        """`pool`: [blocks, layers, K and V, a block's tokens and heads]."""
        for name in ("pipeline_parallel_size", "context_parallel_size"):
            if (getattr(llm_args, name, None) or 1) > 1:
                raise Unsupported(f"{name} > 1")
        if getattr(llm_args, "enable_attention_dp", False):
            raise Unsupported("enable_attention_dp")
        if pool.dim() < 3:
            raise Unsupported(f"a pool of shape {tuple(pool.shape)}")
        self.ranks = getattr(llm_args, "tensor_parallel_size", None) or 1
        self.block_tokens = int(llm_args.kv_cache_config.tokens_per_block)
        self.chunk_tokens = (
            max(1, settings.chunk_tokens // self.block_tokens) * self.block_tokens
        )
        self.layers = int(pool.shape[1])
        self.page_bytes = pool[0, 0].numel() * pool.element_size()
        if self.page_bytes % self.block_tokens != 0:
            raise Unsupported(f"pages of {self.page_bytes} bytes")
        self._args = llm_args
        self._settings = settings
        self._pool = f"{tuple(pool.shape[1:])} {pool.dtype}"

    @functools.cached_property
    def weights(self) -> bytes:
        """Reads all of them the first time: not for a thread that serves.

        Raises ValueError or FileNotFoundError.
        """
        return weights_told(self._settings.weights, str(self._args.model))

    def open(self, client: larder.Client, deadline: float) -> larder.Space:
        """Raises larder.Error."""
        args = self._args
        cache_dtype = getattr(args.kv_cache_config, "dtype", "auto")
        about = {
            "version": _version(),
            "pool": self._pool,
            "tp": self.ranks,
            "block": self.block_tokens,
            "dtype": str(getattr(args, "dtype", None)),
            "quantization": str(getattr(args, "quant_config", None)),
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return larder.Space(
            client,
            model=str(args.model),
            weights=self.weights,
            cache_dtype=f"{cache_dtype}/{self._pool.rsplit('.', 1)[-1]}",
            rope="config.json",
            kv_scales="in the weights",
            block_tokens=self.block_tokens,
            chunk_tokens=self.chunk_tokens,
            engine_layout=f"trtllm tp={self.ranks} sha256:{digest[:32]}",
            hash_scheme="larder",
            groups=[
                Group(
                    GroupKind.FULL_ATTENTION,
                    f"0-{self.layers - 1}",
                    layer_count=self.layers,
                    kv_heads=1,
                    k_head_bytes=self.page_bytes // self.block_tokens,
                    v_head_bytes=0,
                    layout=Layout.OPAQUE,
                    interleave=self.ranks,
                )
            ],
            deadline=deadline,
        )


def _version() -> str:
    try:
        import tensorrt_llm

        return str(tensorrt_llm.__version__)
    except ImportError:
        return "none"


def _rank() -> int:
    if _base is None:
        return 0
    from tensorrt_llm._utils import mpi_rank

    return int(mpi_rank())


class _Local:
    """What rank 0's worker knows and its scheduler, in the same process and made
    with the same arguments, needs: the pool's geometry."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: list[tuple[Any, Geometry]] = []

    def put(self, llm_args: Any, geometry: Geometry) -> None:
        with self._lock:
            self._known = [each for each in self._known if each[0] is not llm_args]
            self._known.append((llm_args, geometry))

    def get(self, llm_args: Any) -> Geometry | None:
        with self._lock:
            return next((g for args, g in self._known if args is llm_args), None)


_local = _Local()


# ---- From the scheduler to the workers, pickled ----


@dataclasses.dataclass
class LoadOrder:
    request_id: int
    hold_token: int
    held_ids: list[bytes]
    # Chunks [first, first + len(blocks) / blocks of a chunk) of what is held.
    first: int
    blocks: list[int]  # below 0: is there already


@dataclasses.dataclass
class SaveOrder:
    id: bytes
    parent: bytes | None
    token_begin: int
    blocks: list[int]


@dataclasses.dataclass
class Step:
    loads: list[LoadOrder] = dataclasses.field(default_factory=list)
    saves: list[SaveOrder] = dataclasses.field(default_factory=list)


# ---- Rank 0 ----


class _Request:
    """From its first question to its end."""

    def __init__(self, keys: list[tuple[int, bytes, int]]):
        self.keys = keys
        self.tokens: list[int] = []
        self.blocks: list[int] = []
        self.ids: list[bytes] = []
        self.saved = 0  # chunks before this one are there or were tried
        self.hold: larder.Hold | None = None
        self.held: list[bytes] = []
        self.promised = 0  # tokens

    def close(self) -> None:
        if self.hold is not None:
            self.hold.close()
            self.hold = None
        self.promised = 0


class LarderScheduler(_Scheduler):
    """KvCacheConnectorScheduler. On the executor's thread; a question takes one
    round trip, at most `lookup_deadline_ms`. Whatever fails is a miss."""

    def __init__(self, llm_args: Any):
        if _base is not None:
            super().__init__(llm_args)
        self._llm_args = llm_args
        self._settings = Settings.of_environment()
        self._complain = Complaints(logger)
        self._connection = self._settings.connection("scheduler", self._complain)
        self._requests: dict[int, _Request] = {}

    def wait_for_initialization(self) -> None:
        """Nothing to wait for."""

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """(tokens that will be loaded before the step, False)."""
        old = self._requests.pop(request.request_id, None)
        if old is not None:  # its allocation died, it comes again
            old.close()
        keys = _request_keys(request)
        geometry = _local.get(self._llm_args)
        if keys is None or geometry is None:
            return 0, False
        tracked = self._requests[request.request_id] = _Request(keys)
        try:
            self._match(tracked, request, num_computed_tokens, geometry)
        except Exception as error:  # noqa: BLE001
            self._complain("lookup", error)
            tracked.close()
        return tracked.promised, False

    def _match(
        self, tracked: _Request, request: Any, computed: int, geometry: Geometry
    ) -> None:
        space = self._connection.space(geometry)
        block, chunk = geometry.block_tokens, geometry.chunk_tokens
        if space is None or computed % block != 0:
            return
        tokens = list(request.get_tokens(0))
        whole = len(tokens) // chunk * chunk
        if whole == 0:
            return
        tracked.ids = list(space.ids(tokens[:whole], tracked.keys))
        # One token at least is computed, or there would be no logits.
        most = (len(tokens) - 1) // block * block
        tracked.held = tracked.ids[: -(-most // chunk)]
        if not tracked.held:
            return
        tracked.hold = space.hold(
            larder.Ids(tracked.held), lineage=self._settings.worst_lineage
        )
        if tracked.hold is None:
            return
        usable = tracked.hold.usable
        tracked.saved = usable
        tracked.promised = max(0, min(usable * chunk, most) - computed)
        if tracked.promised == 0:
            tracked.close()

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        """The blocks come with the step."""

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        step = Step()
        geometry = _local.get(self._llm_args)
        if geometry is None:
            return step
        for data in scheduler_output.new_requests:
            tracked = self._requests.get(data.request_id)
            if tracked is None:
                continue
            tracked.tokens = list(data.new_tokens)
            tracked.blocks = list(data.new_block_ids)
            # Does not count what was promised.
            begin = data.computed_position
            end = begin + tracked.promised
            if tracked.promised:
                step.loads.append(self._load(tracked, data, begin, end, geometry))
            self._plan_saves(step, tracked, end + data.num_scheduled_tokens, geometry)
        for data in scheduler_output.cached_requests:
            tracked = self._requests.get(data.request_id)
            if tracked is None:
                continue
            tracked.tokens.extend(data.new_tokens)
            tracked.blocks.extend(data.new_block_ids)
            end = data.computed_position + data.num_scheduled_tokens
            self._plan_saves(step, tracked, end, geometry)
        return step

    @staticmethod
    def _load(
        tracked: _Request, data: Any, begin: int, end: int, geometry: Geometry
    ) -> LoadOrder:
        assert tracked.hold is not None
        block, chunk = geometry.block_tokens, geometry.chunk_tokens
        first, last = begin // chunk, -(-end // chunk)
        wanted = range(begin // block, end // block)
        blocks = [
            tracked.blocks[i] if i in wanted else -1
            for i in range(first * chunk // block, last * chunk // block)
        ]
        return LoadOrder(
            data.request_id, tracked.hold.token, tracked.held, first, blocks
        )

    def _plan_saves(
        self, step: Step, tracked: _Request, end: int, geometry: Geometry
    ) -> None:
        """After this step tokens [0, end) have KV."""
        space = self._connection.space(geometry)
        if space is None:
            return
        chunk, per_chunk = geometry.chunk_tokens, geometry.chunk_tokens // (
            geometry.block_tokens
        )
        end = min(end, len(tracked.tokens))
        try:
            while (tracked.saved + 1) * chunk <= end:
                at = tracked.saved
                while len(tracked.ids) <= at:
                    begin = len(tracked.ids) * chunk
                    parent = tracked.ids[-1] if tracked.ids else None
                    keys = tracked.keys if parent is None else []
                    tracked.ids.append(
                        space.next_id(
                            parent, tracked.tokens[begin : begin + chunk], keys
                        )
                    )
                blocks = tracked.blocks[at * per_chunk : (at + 1) * per_chunk]
                # Below 0: out of a sliding window, its KV is gone.
                if len(blocks) == per_chunk and min(blocks) >= 0:
                    parent = tracked.ids[at - 1] if at else None
                    step.saves.append(
                        SaveOrder(tracked.ids[at], parent, at * chunk, blocks)
                    )
                tracked.saved += 1
        except Exception as error:  # noqa: BLE001
            self._complain("cannot name a chunk", error)

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        """False: what was to be saved is, at the end of each step."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is not None:
            tracked.close()
        return False


def _request_keys(request: Any) -> list[tuple[int, bytes, int]] | None:
    """What else than tokens the KV of a request depends on. None: something that
    has no digest here; such requests are neither loaded nor saved."""
    for name in ("lora_task_id", "prompt_embedding_table", "multimodal_hashes",
                 "multimodal_embedding", "mrope_rotary_cos_sin", "encoder_tokens"):
        if getattr(request, name, None) is not None:
            return None
    for name in ("cache_salt", "cache_salt_id"):
        if (salt := getattr(request, name, None)) is not None:
            return [(KeyKind.SALT, f"{name}={salt}".encode(), 0)]
    return []


# ---- Every rank ----


class LarderWorker(_Worker):
    """KvCacheConnectorWorker. On the executor's thread. Loads are over when
    start_load_kv returns, saves when wait_for_save does; both within their
    deadlines, a piece at a time.

    Raises LoadFailed from start_load_kv, and nothing else.
    """

    def __init__(self, llm_args: Any):
        if _base is not None:
            super().__init__(llm_args)
        self._llm_args = llm_args
        self._metadata: Step | None = None
        self._settings = Settings.of_environment()
        self._complain = Complaints(logger)
        self._rank = _rank()
        self._connection = self._settings.connection(
            f"worker {self._rank}", self._complain
        )
        self._geometry: Geometry | None = None
        self._pages: Any = None
        self._lineage = 0  # of the worst that was ever delivered

    if _base is None:

        def bind_connector_meta(self, metadata: Any) -> None:
            self._metadata = metadata

    def register_forward_pass_callable(self) -> None:
        """Nothing to do at the end of a forward pass."""

    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        from .vllm.pages import pages_of

        try:
            geometry = Geometry(self._llm_args, kv_cache_tensor, self._settings)
            layers = [kv_cache_tensor[:, layer] for layer in range(geometry.layers)]
            rank = self._rank % geometry.ranks
            self._pages = pages_of(layers, geometry, rank, geometry.ranks)
            _ = geometry.weights  # read now, not when the daemon comes
        except (Unsupported, ValueError, OSError) as error:
            self._complain("cannot keep this cache, nothing will be", error)
            return
        self._geometry = geometry
        if self._rank == 0:
            _local.put(self._llm_args, geometry)
        self._connection.space(geometry)

    def start_load_kv(self, stream: Any) -> None:
        """Fills the promised blocks. Device memory: by the current stream, which
        TensorRT-LLM passes as `stream`."""
        for order in self._metadata.loads if self._metadata else ():
            try:
                self._load(order)
            except Exception as error:
                raise LoadFailed(f"request {order.request_id}: {error}") from error

    def _load(self, order: LoadOrder) -> None:
        geometry = self._geometry
        if geometry is None or (space := self._connection.space(geometry)) is None:
            raise larder.Unavailable("not connected")
        count = len(order.blocks) * geometry.block_tokens // geometry.chunk_tokens
        ids = larder.Ids(order.held_ids)
        hold = space.attach(order.hold_token, ids)
        try:
            view, landing = self._pages.to_load(order.blocks)
            loaded = space.load(
                ids[order.first : order.first + count],
                [view],
                hold=hold,
                hold_first=order.first,
                lineage=self._settings.worst_lineage,
                deadline=self._settings.load_deadline_ms / 1000,
            )
        finally:
            hold.close()
        # TensorRT-LLM shares blocks between requests: whatever is computed from now
        # on may be computed over these.
        self._lineage = max(self._lineage, loaded.lineage)
        if loaded.usable < count:
            why = larder.reason_name(loaded.reason)
            raise larder.Error(f"{loaded.usable} of {count} chunks came: {why}")
        if landing is not None:
            landing.land()

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """All layers were there before the step began."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Chunks are saved whole, after the step."""

    def wait_for_save(self, stream: Any) -> None:
        """Copies the step's whole chunks into shared memory."""
        saves = self._metadata.saves if self._metadata else []
        if not saves:
            return
        try:
            # The step that computes them must be over.
            if hasattr(stream, "synchronize"):
                stream.synchronize()
            for order in saves:
                self._save(order)
        except larder.Exhausted as error:
            self._complain("no room, not saved", error)
        except Exception as error:  # noqa: BLE001: a later miss
            self._complain("cannot save", error)

    def _save(self, order: SaveOrder) -> None:
        geometry = self._geometry
        if geometry is None or (space := self._connection.space(geometry)) is None:
            return
        save = space.save(
            order.id,
            interleave_index=self._rank % geometry.ranks,
            interleave_count=geometry.ranks,
            deadline=self._settings.save_deadline_ms / 1000,
        )
        if save is None:  # is there
            return
        save.gather(self._pages.to_save(order.blocks))
        save.commit(
            token_begin=order.token_begin, parent=order.parent, lineage=self._lineage
        )

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Nothing goes on between steps."""
        return [], []

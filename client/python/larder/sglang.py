"""Larder as the storage backend of SGLang's hierarchical cache (HiCache).

SGLang loads `LarderHiCache` through its `dynamic` backend; docs/sglang.md has the
line. One instance per rank. A page of a host pool is one value: its pieces are read
and written where the pool keeps them, no byte is copied in between.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolTransfer,
    PoolTransferResult,
)

import larder
from larder import State

from ._engine import Complaints, weights_digest

logger = logging.getLogger(__name__)

_RECONNECT_SECONDS = 1.0
_THERE = (State.READY, State.DURABLE)
# What SGLang itself reads from the same dictionary.
_SGLANG_KEYS = ("backend_name", "module_path", "class_name", "interface_v1")

Piece = tuple[int, int]  # address, bytes


@dataclasses.dataclass
class Settings:
    """--hicache-storage-backend-extra-config, without SGLang's own keys. Unknown
    ones are refused, with the known ones named."""

    socket: str | None = None
    token: str | None = None
    # Of each question to the daemon: a call asks one for each of its pools, and
    # the first one, or after a restart, up to three more to connect.
    deadline_ms: int = 2000
    # SHA-256 of the weights in hex; None: of the files of `model_path`.
    weights: str | None = None
    # None: the one that SGLang was started with.
    model_path: str | None = None
    # None: SGLang's --kv-cache-dtype and the pool's.
    cache_dtype: str | None = None
    # Pages count as written only when they survive power loss.
    durable: bool = False

    @classmethod
    def of(cls, extra: dict[str, Any]) -> "Settings":
        mine = {k: v for k, v in extra.items() if k not in _SGLANG_KEYS}
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(mine) - known:
            raise ValueError(
                f"hicache-storage-backend-extra-config: Larder does not know "
                f"{', '.join(sorted(unknown))}; it knows {', '.join(sorted(known))}"
            )
        made = cls(**mine)
        if made.deadline_ms <= 0:
            raise ValueError("deadline_ms must be positive")
        return made


@dataclasses.dataclass
class Model:
    """What the KV depends on beside its tokens and its place in a pool."""

    name: str
    weights: bytes
    # SGLang's arguments that change the KV, as it was given them.
    cache_dtype: str | None
    kv_scales: str
    rope: str
    compute: str

    @classmethod
    def of(cls, config: HiCacheStorageConfig, settings: Settings) -> "Model":
        """Raises ValueError or FileNotFoundError if the weights are not known."""
        arguments = _server_arguments()
        path = (
            settings.model_path
            or getattr(arguments, "model_path", None)
            or config.model_name
        )
        if settings.weights is not None:
            weights = bytes.fromhex(settings.weights)
            if len(weights) != 32:
                raise ValueError("weights: a SHA-256 has 64 hexadecimal digits")
        elif path:
            weights = weights_digest(path)
        else:
            raise ValueError("neither weights nor model_path is known")
        scales = getattr(arguments, "quantization_param_path", None)
        rope = getattr(arguments, "json_model_override_args", None)
        return cls(
            name=config.model_name or str(path),
            weights=weights,
            cache_dtype=settings.cache_dtype
            or getattr(arguments, "kv_cache_dtype", None),
            kv_scales=_file_digest(scales) if scales else "in the weights",
            rope=f"config.json + {rope}" if rope and rope != "{}" else "config.json",
            compute=" ".join(
                f"{name}={getattr(arguments, name, None)}"
                for name in ("dtype", "quantization", "revision")
            ),
        )


def _server_arguments() -> Any:
    """SGLang's arguments; None outside of a scheduler."""
    try:
        from sglang.srt.runtime_context import get_server_args

        return get_server_args()
    except Exception:  # noqa: BLE001: however it says that there are none
        return None


def _file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Pool:
    """One of SGLang's host pools, and the space that keeps its pages.

    `flat`: pages go through get_data_page and back, as in SGLang's copying
    interface and for layouts that have no addresses of pages. Such pages have
    another order of bytes, hence a space of their own.
    """

    def __init__(
        self,
        name: str,
        host_pool: Any,
        config: HiCacheStorageConfig,
        model: Model,
        flat: bool = False,
    ):
        self.name = name
        self.host_pool = host_pool
        # No tensor: only other pools' pages exist (DeepSeek V4's anchor).
        self.logical = getattr(host_pool, "kv_buffer", self) is None
        self.page_tokens = (
            getattr(host_pool, "logical_page_size", None) or host_pool.page_size or 1
        )
        pieces = None if flat or self.logical else self._pieces_of_first_page()
        self.flat = pieces is None
        if pieces is None:
            self.piece_bytes = [_bytes_of(host_pool.get_dummy_flat_data_page()).nbytes]
        else:
            self.piece_bytes = [size for _, size in pieces]
        self.page_bytes = sum(self.piece_bytes)
        self._model = model
        self._layout = self._describe(config)
        self.space: larder.Values | None = None

    def _pieces_of_first_page(self) -> list[Piece] | None:
        """None: the pool cannot say where its pages lie."""
        try:
            return self.pieces(torch.arange(self.page_tokens))[0]
        except (ValueError, NotImplementedError, AttributeError, TypeError):
            return None

    def pieces(self, indices: torch.Tensor) -> list[list[Piece]]:
        """For each page that begins in `indices` where its bytes lie."""
        addresses, sizes = self.host_pool.get_page_buffer_meta(indices)
        pages = len(indices) // self.page_tokens
        count = len(addresses) // pages
        if count * pages != len(addresses) or len(indices) % self.page_tokens != 0:
            raise ValueError(f"{len(addresses)} pieces of {pages} pages")
        both = list(zip(addresses, sizes))
        return [both[i * count : (i + 1) * count] for i in range(pages)]

    def _describe(self, config: HiCacheStorageConfig) -> str:
        """What the bytes of a page depend on, but for model and dtype."""
        pool = self.host_pool
        about: dict[str, Any] = {
            "engine": "sglang",
            "version": importlib.metadata.version("sglang"),
            "pool": self.name,
            "layout": str(getattr(pool, "layout", None)),
            "flat": self.flat,
            "page": self.page_tokens,
            "class": type(pool).__name__,
            "pieces": self.piece_bytes,
            "geometry": {
                name: getattr(pool, name, None)
                for name in (
                    "layer_num", "start_layer", "end_layer", "target_layer_num",
                    "head_num", "head_dim", "v_head_dim", "head_group_num",
                    "kv_lora_rank", "qk_rope_head_dim", "kv_cache_dim",
                    "storage_format_tag",
                )
            },
            "pp": [config.pp_rank, config.pp_size],
            "cp": [config.attn_cp_rank, config.attn_cp_size],
            # 0.5.22 has none.
            "dcp": [getattr(config, "dcp_rank", 0), getattr(config, "dcp_size", 1)],
            "compute": self._model.compute,
        }
        if not _same_on_all_ranks(self.name, pool, config):
            about["tp"] = [config.tp_rank, config.tp_size]
        text = json.dumps(about, sort_keys=True, default=str)
        short = f"sglang {self.name} {about['layout']} tp={about.get('tp', 'any')}"
        return f"{short} sha256:{hashlib.sha256(text.encode()).hexdigest()[:32]}"

    def open(self, client: larder.Client, deadline: float) -> None:
        dtype = str(getattr(self.host_pool, "dtype", "none")).removeprefix("torch.")
        said = self._model.cache_dtype
        if said is None and dtype == "uint8":
            # SGLang keeps every fp8 format in a pool of bytes.
            raise ValueError("the pool's dtype says nothing; set cache_dtype")
        self.space = larder.Values(
            client,
            model=self._model.name,
            weights=self._model.weights,
            cache_dtype=f"{said or 'auto'}/{dtype}",
            value_bytes_max=self.page_bytes,
            engine_layout=self._layout,
            hash_scheme="sglang:sha256",
            rope=self._model.rope,
            kv_scales=self._model.kv_scales,
            deadline=deadline,
        )


def _same_on_all_ranks(name: str, pool: Any, config: HiCacheStorageConfig) -> bool:
    """Whether every tensor-parallel rank has the same bytes: latent attention.
    Then SGLang lets one of them write. States are a rank's own even there, and so
    are the heads of a draft model."""
    return config.is_mla_model and name != "mamba" and not hasattr(pool, "head_num")


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _key(key: str) -> bytes:
    """SGLang's keys are 64 hexadecimal digits; anything else is hashed."""
    if re.fullmatch("[0-9a-f]{64}", key):
        return bytes.fromhex(key)
    return hashlib.sha256(b"larder key " + key.encode()).digest()


def _falls_back(empty: Callable[..., Any]) -> Callable[[Any], Any]:
    """An exception in a call would end SGLang's thread, and with it the cache: it
    is logged, and the answer is `empty` of the arguments."""

    def wrap(call: Any) -> Any:
        @functools.wraps(call)
        def safe(self: "LarderHiCache", *arguments: Any, **named: Any) -> Any:
            try:
                return call(self, *arguments, **named)
            except Exception as error:  # noqa: BLE001
                self._complain(call.__name__, error)
                return empty(*arguments, **named)

        return safe

    return wrap


def _none_of(keys: Sequence[str], *_: Any, **__: Any) -> list[bool]:
    return [False] * len(keys)


def _none_of_each(transfers: Sequence[PoolTransfer], *_: Any, **__: Any) -> Any:
    return {each.name: [False] * len(each.keys or []) for each in transfers}


class LarderHiCache(HiCacheStorage):
    """One rank's door to the daemon.

    Constructed by SGLang's StorageBackendFactory; raises ValueError or
    FileNotFoundError there if the settings are wrong or the weights have no
    digest: a server that keeps KV under a wrong name must not start. From then on
    nothing raises and every wait is bounded by `deadline_ms`: what fails is a
    miss, or a page not written. Without a daemon everything misses at once; when
    it is there (again) it is found within a second.

    Any number of threads may call; they wait for each other only while one of
    them connects.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Any = None):
        self._config = storage_config
        self._settings = Settings.of(storage_config.extra_config or {})
        self._model = Model.of(storage_config, self._settings)
        self._deadline = self._settings.deadline_ms / 1000
        self._complain = Complaints(logger)
        self._lock = threading.Lock()
        self._client: larder.Client | None = None
        self._next_try = 0.0
        self._closed = False
        self._pools: dict[str, Pool] = {}
        self._flat: Pool | None = None
        self._stats_lock = threading.Lock()
        self._stats = _Counters()
        self.registered_pools: dict[Any, Any] = {}

    # ---- Pools ----

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The pool of keys and values."""
        super().register_mem_pool_host(mem_pool_host)
        self._register("kv", mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Any further pool (indexer, states, draft, ...); may come later."""
        self.registered_pools[host_pool_name] = host_pool
        self._register(str(host_pool_name), host_pool)

    @_falls_back(lambda *_: None)
    def _register(self, name: str, host_pool: Any) -> None:
        with self._lock:
            known = self._pools.get(name)
            if known is not None and known.host_pool is host_pool:
                return
            self._pools[name] = Pool(name, host_pool, self._config, self._model)
            if name == "kv":
                self._flat = Pool(
                    name, host_pool, self._config, self._model, flat=True
                )

    def _open(self, pool: Pool | None) -> larder.Values | None:
        """The pool's space; None: nothing can be had now."""
        if pool is None or pool.logical:
            return None
        if pool.space is not None:
            return pool.space
        if time.monotonic() < self._next_try:
            return None
        # Bounded: whoever has the lock connects, within the deadline.
        if not self._lock.acquire(timeout=self._deadline):
            return None
        try:
            if pool.space is None and not self._closed:
                if self._client is None:
                    self._client = larder.Client(
                        self._settings.socket,
                        token=self._settings.token,
                        name=f"sglang tp{self._config.tp_rank}",
                        deadline=self._deadline,
                        connect_deadline=self._deadline,
                    )
                pool.open(self._client, self._deadline)
            return pool.space
        except (larder.Error, ValueError):
            self._next_try = time.monotonic() + _RECONNECT_SECONDS
            raise
        finally:
            self._lock.release()

    # ---- Pages where they lie ----

    @_falls_back(lambda *_, **__: 0)
    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        """How many pages, from the first on, are there."""
        return _run(self._present(self._kv(), keys))

    @_falls_back(_none_of)
    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Fills the pages that begin at `host_indices`; which of them are right.
        The bytes of a page that is not mean nothing."""
        return self._move(self._pools.get("kv"), keys, host_indices, write=False)

    @_falls_back(_none_of)
    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Keeps the pages that begin at `host_indices`; True: kept, now or before."""
        return self._move(self._pools.get("kv"), keys, host_indices, write=True)

    # ---- Several pools at once ----

    @_falls_back(lambda *_, **__: PoolTransferResult(0, {}, []))
    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """The longest prefix that every pool can serve by its own policy, and all
        lengths at which they can."""
        kv = self._kv()
        logical = kv is not None and kv.logical
        pages = len(keys) if logical else _run(self._present(kv, keys))
        hits: dict[str, int] = {"kv": pages} if pages else {}
        restorable = list(range(1, pages + 1))
        for transfer in pool_transfers or []:
            if not restorable:
                break
            if transfer.hit_policy == PoolHitPolicy.BLOCK_GROUPS:
                continue  # never decides; not reported: no verdict
            there = self._present(self._pools.get(str(transfer.name)), keys[:pages])
            if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
                good = set(range(1, _run(there) + 1))
            else:  # TRAILING_PAGES: the window that ends there
                window = max(1, len(transfer.keys or []))
                good = {
                    end
                    for end in range(1, pages + 1)
                    if all(there[max(0, end - window) : end])
                }
            if good:
                hits[transfer.name] = max(good)
            restorable = [end for end in restorable if end in good]
        return PoolTransferResult(restorable[-1] if restorable else 0, hits, restorable)

    @_falls_back(_none_of_each)
    def batch_get_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        return {each.name: self._transfer(each, write=False) for each in transfers}

    @_falls_back(_none_of_each)
    def batch_set_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        return {each.name: self._transfer(each, write=True) for each in transfers}

    def _transfer(self, transfer: PoolTransfer, write: bool) -> list[bool]:
        keys = transfer.keys or []
        try:
            if transfer.host_indices is None:
                raise ValueError("a transfer without host_indices")
            pool = self._pools.get(str(transfer.name))
            return self._move(pool, keys, transfer.host_indices, write)
        except Exception as error:  # noqa: BLE001: the other pools go on
            self._complain(f"pool {transfer.name}", error)
            return [False] * len(keys)

    # ---- SGLang's copying interface (without "interface_v1": 1) ----

    @_falls_back(lambda *_, **__: False)
    def exists(self, key: str) -> bool:
        return self._present(self._flat, [key])[0]

    @_falls_back(lambda *_, **__: None)
    def get(
        self, key: str, target_location: Any = None, target_sizes: Any = None
    ) -> torch.Tensor | None:
        """Fills the tensor `target_location`, a flat page."""
        return self.batch_get([key], [target_location])[0]

    @_falls_back(lambda keys, *_, **__: [None] * len(keys))
    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        space = self._open(self._flat)
        if space is None or not keys:
            return [None] * len(keys)
        # view: a page that is not in one piece is the caller's mistake.
        buffers = [page.view(-1).view(torch.uint8) for page in target_locations]
        reasons, sizes = space.get(
            [_key(key) for key in keys], _memory(buffers), deadline=self._deadline
        )
        return [
            page if reason == 0 and size == page.nbytes else None
            for page, reason, size in zip(target_locations, reasons, sizes)
        ]

    @_falls_back(lambda *_, **__: False)
    def set(
        self,
        key: str,
        value: Any = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        return self.batch_set([key], [value])

    @_falls_back(lambda *_, **__: False)
    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        space = self._open(self._flat)
        if space is None:
            return False
        pages = [_bytes_of(page) for page in values]
        reasons = space.put(
            [_key(key) for key in keys],
            _memory(pages),
            durable=self._settings.durable,
            deadline=self._deadline,
        )
        self._note_refused(reasons)
        return not any(reasons)

    # ---- What they share ----

    def _kv(self) -> Pool | None:
        """Where SGLang's pages of keys and values are, by the interface in use."""
        in_place = (self._config.extra_config or {}).get("interface_v1", 0)
        return self._pools.get("kv") if in_place else self._flat

    def _present(self, pool: Pool | None, keys: Sequence[str]) -> list[bool]:
        space = self._open(pool)
        if space is None or not keys:
            return [False] * len(keys)
        ids = space.ids_from_hashes([_key(key) for key in keys])
        states = space.lookup(ids, deadline=self._deadline)
        return [state in _THERE for state in states]

    def _move(
        self, pool: Pool | None, keys: list[str], indices: torch.Tensor, write: bool
    ) -> list[bool]:
        if pool is not None and pool.logical:
            return [True] * len(keys)  # there is nothing to move
        space = self._open(pool)
        if space is None or pool is None or not keys:
            return [False] * len(keys)
        if len(indices) != len(keys) * pool.page_tokens:
            raise ValueError(f"{len(indices)} indices for {len(keys)} pages")
        started = time.monotonic()
        packed = [_key(key) for key in keys]
        if pool.flat:
            good = self._move_flat(pool, space, packed, indices, write)
        elif write:
            reasons = space.put(
                packed,
                pool.pieces(indices),
                durable=self._settings.durable,
                deadline=self._deadline,
            )
            self._note_refused(reasons)
            good = [reason == 0 for reason in reasons]
        else:
            # What is behind the first miss is of no use to SGLang's KV; windows
            # of the other pools are read whole.
            reasons, sizes = space.get(
                packed,
                pool.pieces(indices),
                prefix=pool.name == "kv",
                deadline=self._deadline,
            )
            good = [
                reason == 0 and size == pool.page_bytes
                for reason, size in zip(reasons, sizes)
            ]
        if self._config.enable_storage_metrics:
            with self._stats_lock:
                self._stats.add(write, sum(good), pool, time.monotonic() - started)
        return good

    def _move_flat(
        self,
        pool: Pool,
        space: larder.Values,
        keys: list[bytes],
        indices: torch.Tensor,
        write: bool,
    ) -> list[bool]:
        """For layouts whose pages have no address: one page at a time, copied."""
        host, good = pool.host_pool, []
        until = time.monotonic() + self._deadline
        for key, index in zip(keys, indices[:: pool.page_tokens].tolist()):
            left = until - time.monotonic()
            if left <= 0:
                break
            if write:
                page = _bytes_of(host.get_data_page(index, flat=True))
                (reason,) = space.put(
                    [key],
                    _memory([page]),
                    durable=self._settings.durable,
                    deadline=left,
                )
                good.append(reason == 0)
            else:
                page = host.get_dummy_flat_data_page().contiguous()
                reasons, sizes = space.get(
                    [key], _memory([_bytes_of(page)]), deadline=left
                )
                good.append(reasons[0] == 0 and sizes[0] == page.nbytes)
                if good[-1]:
                    host.set_from_flat_data_page(index, page)
        return good + [False] * (len(keys) - len(good))

    def _note_refused(self, reasons: bytes) -> None:
        if refused := [reason for reason in reasons if reason != 0]:
            self._complain(
                "pages were not kept",
                f"{len(refused)} of {len(reasons)}, {larder.reason_name(refused[0])}",
            )

    # ---- The rest ----

    @_falls_back(lambda *_: None)
    def clear(self) -> None:
        """Nothing kept before is found again by this rank's pools (or another
        rank's, where they share pages)."""
        for pool in (*self._pools.values(), self._flat):
            space = self._open(pool)
            if space is not None:
                space.advance_epoch(deadline=self._deadline)

    @_falls_back(lambda *_: None)
    def get_stats(self) -> Any:
        """Pages and GB/s since the last call, if SGLang collects metrics."""
        if not self._config.enable_storage_metrics:
            return None
        from sglang.srt.observability.metrics_collector import StorageMetrics

        with self._stats_lock:
            now, self._stats = self._stats, _Counters()
        return StorageMetrics(**dataclasses.asdict(now))

    def close(self) -> None:
        """Lets the daemon go; later calls miss."""
        with self._lock:
            self._closed = True
            for pool in (*self._pools.values(), self._flat):
                if pool is not None:
                    pool.space = None
            if self._client is not None:
                self._client.close()
                self._client = None


@dataclasses.dataclass
class _Counters:
    """As in SGLang's StorageMetrics."""

    prefetch_pgs: list[int] = dataclasses.field(default_factory=list)
    backup_pgs: list[int] = dataclasses.field(default_factory=list)
    prefetch_bandwidth: list[float] = dataclasses.field(default_factory=list)
    backup_bandwidth: list[float] = dataclasses.field(default_factory=list)

    def add(self, write: bool, pages: int, pool: Pool, seconds: float) -> None:
        if pages == 0:
            return
        rate = pages * pool.page_bytes / max(seconds, 1e-9) / 1e9
        (self.backup_pgs if write else self.prefetch_pgs).append(pages)
        (self.backup_bandwidth if write else self.prefetch_bandwidth).append(rate)


def _run(there: list[bool]) -> int:
    """How many are True from the first on."""
    return there.index(False) if False in there else len(there)


def _memory(pages: Sequence[torch.Tensor]) -> list[Piece]:
    return [(page.data_ptr(), page.nbytes) for page in pages]

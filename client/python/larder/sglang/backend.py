"""SGLang's HiCacheStorage over Larder."""

import dataclasses
import functools
import hashlib
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
from larder._words import THERE

from .._engine import Complaints, Connection
from .pool import Pool, bytes_of, memory_of
from .settings import Model, Settings

logger = logging.getLogger(__name__)


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
    return {each.name: _none_of(each.keys or []) for each in transfers}


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
        self._connection: Connection[larder.Values] = Connection(
            self._connect,
            lambda client, deadline, pool: pool.open(client, deadline),
            self._complain,
            deadline=self._deadline,
        )
        self._lock = threading.Lock()  # who registers a pool
        self._pools: dict[str, Pool] = {}
        self._flat: Pool | None = None
        self._stats_lock = threading.Lock()
        self._stats = _Counters()
        self.registered_pools: dict[Any, Any] = {}

    def _connect(self, deadline: float) -> larder.Client:
        return larder.Client(
            self._settings.socket,
            token=self._settings.token,
            name=f"sglang tp{self._config.tp_rank}",
            deadline=self._deadline,
            connect_deadline=deadline,
        )

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

    def _space(self, pool: Pool | None) -> larder.Values | None:
        """None: nothing can be had now."""
        if pool is None or pool.logical:
            return None
        return self._connection.space(pool)

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
            return _none_of(keys)

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
        space = self._space(self._flat)
        if space is None or not keys:
            return [None] * len(keys)
        # view: a page that is not in one piece is the caller's mistake.
        pages = [page.view(-1).view(torch.uint8) for page in target_locations]
        good = self._read(space, keys, memory_of(pages))
        return [page if right else None for page, right in zip(target_locations, good)]

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
        space = self._space(self._flat)
        if space is None:
            return False
        pages = [bytes_of(page) for page in values]
        return all(self._write(space, keys, memory_of(pages)))

    # ---- What they share ----

    def _kv(self) -> Pool | None:
        """Where SGLang's pages of keys and values are, by the interface in use."""
        in_place = (self._config.extra_config or {}).get("interface_v1", 0)
        return self._pools.get("kv") if in_place else self._flat

    def _present(self, pool: Pool | None, keys: Sequence[str]) -> list[bool]:
        space = self._space(pool)
        if space is None or not keys:
            return _none_of(keys)
        ids = space.ids_from_hashes([_key(key) for key in keys])
        states = space.lookup(ids, deadline=self._deadline)
        return [state in THERE for state in states]

    def _read(
        self,
        space: larder.Values,
        keys: Sequence[str],
        memory: list[Any],
        prefix: bool = False,
        deadline: float | None = None,
    ) -> list[bool]:
        """Fills `memory`; which of it is right."""
        reasons, _ = space.get(
            [_key(key) for key in keys],
            memory,
            prefix=prefix,
            exact=True,
            deadline=deadline or self._deadline,
        )
        return [reason == 0 for reason in reasons]

    def _write(
        self,
        space: larder.Values,
        keys: Sequence[str],
        memory: list[Any],
        deadline: float | None = None,
    ) -> list[bool]:
        """Keeps `memory`; what of it is kept, now or before."""
        reasons = space.put(
            [_key(key) for key in keys],
            memory,
            durable=self._settings.durable,
            deadline=deadline or self._deadline,
        )
        if refused := [reason for reason in reasons if reason != 0]:
            self._complain(
                "pages were not kept",
                f"{len(refused)} of {len(reasons)}, {larder.reason_name(refused[0])}",
            )
        return [reason == 0 for reason in reasons]

    def _move(
        self, pool: Pool | None, keys: list[str], indices: torch.Tensor, write: bool
    ) -> list[bool]:
        if pool is not None and pool.logical:
            return [True] * len(keys)  # there is nothing to move
        space = self._space(pool)
        if space is None or pool is None or not keys:
            return _none_of(keys)
        if len(indices) != len(keys) * pool.page_tokens:
            raise ValueError(f"{len(indices)} indices for {len(keys)} pages")
        started = time.monotonic()
        if pool.flat:
            good = self._move_flat(pool, space, keys, indices, write)
        elif write:
            good = self._write(space, keys, pool.pieces(indices))
        else:
            # What is behind the first miss is of no use to SGLang's KV; windows
            # of the other pools are read whole.
            prefix = pool.name == "kv"
            good = self._read(space, keys, pool.pieces(indices), prefix)
        if self._config.enable_storage_metrics:
            with self._stats_lock:
                self._stats.add(write, sum(good), pool, time.monotonic() - started)
        return good

    def _move_flat(
        self,
        pool: Pool,
        space: larder.Values,
        keys: list[str],
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
                page = bytes_of(host.get_data_page(index, flat=True))
                good += self._write(space, [key], memory_of([page]), deadline=left)
            else:
                page = host.get_dummy_flat_data_page().contiguous()
                good += self._read(
                    space, [key], memory_of([bytes_of(page)]), deadline=left
                )
                if good[-1]:
                    host.set_from_flat_data_page(index, page)
        return good + [False] * (len(keys) - len(good))

    # ---- The rest ----

    @_falls_back(lambda *_: None)
    def clear(self) -> None:
        """Nothing kept before is found again by this rank's pools (or another
        rank's, where they share pages)."""
        for pool in (*self._pools.values(), self._flat):
            space = self._space(pool)
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
        self._connection.close()


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


def _key(key: str) -> bytes:
    """SGLang's keys are 64 hexadecimal digits; anything else is hashed."""
    if re.fullmatch("[0-9a-f]{64}", key):
        return bytes.fromhex(key)
    return hashlib.sha256(b"larder key " + key.encode()).digest()


def _run(there: list[bool]) -> int:
    """How many are True from the first on."""
    return there.index(False) if False in there else len(there)

"""The door for LMCache inside the engine: a remote storage plugin."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryObj
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.connector import (
    ConnectorAdapter,
    ConnectorContext,
    extract_plugin_type,
)
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

from .store import Settings, Store, lmcache_version, present, weights_of

logger = logging.getLogger(__name__)

_SCHEME = "larder://"
_PLUGIN = "larder"
# Of the KV itself, as opposed to how to reach it.
_ABOUT = ("weights", "cache_dtype", "kv_scales", "rope")


class RemoteAdapter(ConnectorAdapter):
    """What LMCache makes `Connector`s with.

    Reads extra_config's "remote_storage_plugin.<plugin>.<name>" for each name
    of `Settings`, and `weights` (required: "org/model@revision", or what else
    `weights_of` takes), `cache_dtype` (default: LMCache's; required if the
    engine keeps KV as plain bytes), `kv_scales` and `rope`. The older
    remote_url "larder:///path/of/socket" reads them under the plugin's name
    "larder".
    """

    def __init__(self) -> None:
        super().__init__(_SCHEME)

    def can_parse(self, url: str) -> bool:
        if url.startswith("plugin://"):
            return bool(extract_plugin_type(url.removeprefix("plugin://")) == _PLUGIN)
        return url.startswith(_SCHEME)

    def create_connector(self, context: ConnectorContext) -> RemoteConnector:
        """Raises ValueError or TypeError, which LMCache logs and goes on
        without, for a configuration that could serve the wrong KV."""
        extra = (context.config.extra_config if context.config else None) or {}
        prefix = f"remote_storage_plugin.{context.plugin_name or _PLUGIN}."
        found = {
            name.removeprefix(prefix): value
            for name, value in extra.items()
            if name.startswith(prefix)
        }
        # LMCache's own, and those of other instances ("larder.second").
        for name in list(found):
            if name in ("module_path", "class_name") or "." in name:
                del found[name]
        if context.url.startswith(_SCHEME):
            found.setdefault("socket", context.url.removeprefix(_SCHEME) or None)
        about = {name: str(found.pop(name)) for name in _ABOUT if name in found}
        assert context.config is not None and context.metadata is not None
        if context.config.use_layerwise:
            raise ValueError("use_layerwise: not served by Larder")
        return Connector(
            context.config,
            context.metadata,
            context.loop,
            context.local_cpu_backend,
            _description(context.metadata, about),
            _settings(context.config, found),
        )


def _settings(config: LMCacheEngineConfig, found: dict[str, Any]) -> Settings:
    # LMCache gives up after blocking_timeout_secs; so does Larder then.
    limit = float(config.blocking_timeout_secs)
    found["deadline"] = min(float(found.get("deadline", limit)), limit)
    return Settings(**found)


def _description(
    metadata: LMCacheMetadata, about: dict[str, str]
) -> dict[str, Any]:
    """Everything that LMCache and the user say about the KV."""
    if not about.get("weights"):
        raise ValueError("weights: must be named")
    dtypes = [str(d).removeprefix("torch.") for d in metadata.get_dtypes()]
    dtype = about.get("cache_dtype")
    if dtype is None:
        if "uint8" in dtypes:
            raise ValueError("cache_dtype: LMCache only knows that it is bytes")
        dtype = ",".join(dtypes)
    shapes = ";".join("x".join(map(str, s)) for s in metadata.get_shapes())
    layout = "MLA" if metadata.use_mla else "2LTD"
    return {
        "model": metadata.model_name,
        "weights": weights_of(about["weights"]),
        "cache_dtype": dtype,
        "kv_scales": about.get("kv_scales", "none"),
        "rope": about.get("rope", "model"),
        "engine_layout": (
            f"lmcache {lmcache_version()} {layout} {shapes}"
            f" world {metadata.world_size}"
        ),
        "hash_scheme": "lmcache engine key, sha256",
    }


class Connector(RemoteConnector):
    """LMCache's RemoteConnector over values in Larder.

    The coroutines run on LMCache's loop and never block it: operations run on
    the client library's threads, their completions wake the loop through the
    queue's descriptor. The `_sync` calls wait in their caller, up to the
    deadline. Nothing raises: what Larder does not do is a miss, or a store that
    did not happen.

    An object's bytes are its value, no header: its shape, type and format are
    those of the space, and a chunk that is not full tells its tokens by its
    size. Objects that are something else (another remote_serde than "naive")
    are not stored.
    """

    def __init__(
        self,
        config: LMCacheEngineConfig,
        metadata: LMCacheMetadata,
        loop: asyncio.AbstractEventLoop,
        local_cpu_backend: LocalCPUBackend,
        description: dict[str, Any],
        settings: Settings,
    ) -> None:
        super().__init__(config, metadata)
        self._loop = loop
        self._local = local_cpu_backend
        self._settings = settings
        self._one_group = len(self.meta_shapes) == 1
        self._told_unfit = False
        self._fd: int | None = None
        self._closed = False
        self._store = Store(settings, description, opened=self._watch)

    # ---- Completions ----

    def _watch(self, fd: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._add_reader, fd)

    def _add_reader(self, fd: int) -> None:
        if not self._closed:
            self._fd = fd
            self._loop.add_reader(fd, self._drain)

    def _drain(self) -> None:
        for done in self._store.poll():
            done.user_data(done)

    async def _run(
        self,
        operation: str,
        keys: Sequence[CacheEngineKey],
        buffers: list[Any] | None = None,
        abandoned: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> Any | None:
        """Runs an operation; None if it was not taken. If the caller is
        cancelled, `abandoned` is called once Larder has done with the
        buffers."""
        answer: asyncio.Future[Any] = self._loop.create_future()

        def complete(done: Any) -> None:
            if answer.done():
                abandoned()
            else:
                answer.set_result(done)

        job = self._store.submit(
            operation,
            [key.to_string() for key in keys],
            buffers,
            user_data=complete,
            **options,
        )
        if job is None:
            return None
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.cancelled():
                self._store.cancel(job)
            else:  # it had completed, but nobody had looked yet
                abandoned()
            raise

    # ---- Presence ----

    async def exists(self, key: CacheEngineKey) -> bool:
        return (await self._present([key]))[0]

    def exists_sync(self, key: CacheEngineKey) -> bool:
        return self._store.lookup([key.to_string()])[0]

    async def batched_async_contains(
        self, lookup_id: str, keys: list[CacheEngineKey], pin: bool = False
    ) -> int:
        return _leading(await self._present(keys))

    def support_batched_contains(self) -> bool:
        return True

    def batched_contains(self, keys: list[CacheEngineKey]) -> int:
        return _leading(self._store.lookup([key.to_string() for key in keys]))

    async def _present(self, keys: Sequence[CacheEngineKey]) -> list[bool]:
        done = await self._run("lookup", keys)
        if done is None or done.status != 0:
            return [False] * len(keys)
        return present(done.per_key)

    # ---- Get ----

    async def get(self, key: CacheEngineKey) -> MemoryObj | None:
        return (await self.batched_get([key]))[0]

    def support_batched_get(self) -> bool:
        return True

    async def batched_get(
        self, keys: list[CacheEngineKey]
    ) -> list[MemoryObj | None]:
        return await self._load(keys, prefix=False)

    async def batched_get_non_blocking(
        self, lookup_id: str, keys: list[CacheEngineKey]
    ) -> list[MemoryObj]:
        """The objects in front of the first that misses."""
        loaded = await self._load(keys, prefix=True)
        hits = _leading([memory is not None for memory in loaded])
        _release([memory for memory in loaded[hits:] if memory is not None])
        return loaded[:hits]

    async def _load(
        self, keys: Sequence[CacheEngineKey], prefix: bool
    ) -> list[MemoryObj | None]:
        objects: list[MemoryObj] = []
        for _ in keys:
            # Not in a busy loop: it would wait for stores that complete on
            # this loop.
            memory = self._local.allocate(
                self.meta_shapes, self.meta_dtypes, self.meta_fmt, busy_loop=False
            )
            if memory is None:
                break
            objects.append(memory)
        if not objects:
            return [None] * len(keys)
        done = await self._run(
            "get",
            keys[: len(objects)],
            [memory.byte_array for memory in objects],
            lambda: _release(objects),
            prefix=prefix,
        )
        sizes = [0] * len(objects) if done is None else done.sizes
        loaded = [
            self._trimmed(memory, size)
            for memory, size in zip(objects, sizes, strict=True)
        ]
        return loaded + [None] * (len(keys) - len(loaded))

    def _trimmed(self, memory: MemoryObj, size: int) -> MemoryObj | None:
        """`memory` cut to the tokens that `size` bytes hold; None and released
        if it holds none."""
        if size == self.full_chunk_size_bytes:
            return memory
        # Of several groups of layers each has its share of the object; LMCache
        # cannot say where they begin in one that is not full.
        if size > 0 and size % self.single_token_size == 0 and self._one_group:
            return self.reshape_partial_chunk(memory, size)
        memory.ref_count_down()
        return None

    # ---- Put ----

    async def put(self, key: CacheEngineKey, memory_obj: MemoryObj) -> None:
        # LMCache's health check stores other bytes each time under one key, and
        # wants those back. Here the first that were stored would stay.
        if key.model_name == "test" and key.chunk_hash == 0:
            await self._run("delete", [key])
        await self.batched_put([key], [memory_obj])

    def support_batched_put(self) -> bool:
        return True

    async def batched_put(
        self, keys: list[CacheEngineKey], memory_objs: list[MemoryObj]
    ) -> None:
        fit = [
            (key, memory)
            for key, memory in zip(keys, memory_objs, strict=True)
            if self._fits(memory)
        ]
        if not fit:
            return
        objects = [memory for _, memory in fit]
        # LMCache takes its references back when this coroutine is cancelled,
        # whether or not Larder still reads.
        for memory in objects:
            memory.ref_count_up()
        done = await self._run(
            "put",
            [key for key, _ in fit],
            [memory.byte_array for memory in objects],
            lambda: _release(objects),
        )
        _release(objects)
        if done is None or done.good != done.count:
            stored = 0 if done is None else done.good
            logger.debug("Larder stored %d of %d chunks", stored, len(fit))

    def _fits(self, memory: MemoryObj) -> bool:
        """Whether its shape can be told from its size alone."""
        shapes, full = memory.get_shapes(), self.meta_shapes
        fits = (
            memory.get_memory_format() == self.meta_fmt
            and memory.get_dtypes() == self.meta_dtypes
            and (
                shapes == full
                or len(shapes) == len(full) == 1
                and _same_but_tokens(shapes[0], full[0])
            )
        )
        if not fits and not self._told_unfit:
            self._told_unfit = True
            logger.warning(
                "Larder does not store chunks that are not %s of %s (as %s is): "
                "is remote_serde something else than naive?",
                self.meta_dtypes,
                self.meta_shapes,
                shapes,
            )
        return fits

    # ---- The rest ----

    def remove_sync(self, key: CacheEngineKey) -> bool:
        return self._store.delete([key.to_string()]) > 0

    async def list(self) -> list[str]:
        """Nothing: Larder keeps digests of keys."""
        return []

    def support_ping(self) -> bool:
        return True

    async def ping(self) -> int:
        """0 if the daemon answers, which LMCache's health monitor asks."""
        answers = await self._loop.run_in_executor(None, self._store.ping, 1.0)
        return 0 if answers else 1

    async def close(self) -> None:
        self._closed = True
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            self._fd = None
        # Whoever still waits must not wait for ever.
        for done in await self._loop.run_in_executor(None, self._store.close):
            done.user_data(done)


def _leading(found: Sequence[bool]) -> int:
    """How many are true in front of the first that is not."""
    return next((i for i, hit in enumerate(found) if not hit), len(found))


def _release(objects: Sequence[MemoryObj]) -> None:
    for memory in objects:
        memory.ref_count_down()


def _same_but_tokens(shape: torch.Size, full: torch.Size) -> bool:
    """[K and V, layers, tokens, hidden] with up to as many tokens."""
    return (
        len(shape) == len(full) == 4
        and (shape[0], shape[1], shape[3]) == (full[0], full[1], full[3])
        and 0 < shape[2] <= full[2]
    )

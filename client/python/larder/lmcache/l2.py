"""The door for LMCache's MP mode: a `native_plugin` L2 adapter."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import larder

from .store import Settings, Store, lmcache_version, present, weights_of

# What LMCache takes out of drain_completions: the operation, whether it was
# carried out, what went wrong, and a bool for each key.
Completion = tuple[int, bool, str, list[bool]]


class L2Connector:
    """What LMCache 0.5's NativeConnectorL2Adapter wraps.

    Any thread may submit; one thread waits for `event_fd` and drains. Nothing
    here waits but the constructor (a second, for a daemon that does not answer)
    and `close`. Nothing raises but the constructor, for parameters that cannot
    be right. A daemon that is not there, dies or does not answer is a batch of
    misses, in time; LMCache goes on without, and with it again once it is back.

    A batch completes with one bool for each key: stored, loaded, there, or
    deleted. The buffer of a key that was not loaded is as it was, unless its
    stored copy turned out to be damaged while it was read or the deadline
    passed meanwhile. After a completion nobody touches its buffers.

    LMCache's keys name the model, the rank, the group and the chunk. What else
    decides whether KV is interchangeable has to be said here and becomes part
    of the space:

    Args:
        weights: "org/model@revision", or what else `weights_of` takes.
        cache_dtype: of the KV as the engine keeps it, such as "bf16".
        parallel: how ranks share a model, such as "tp2" or "tp2,pp2". LMCache's
            rank numbers are the same for both halves of tp2 and of pp2.
        kv_scales: names the scales of quantized KV; "none" if there are none.
        rope: names a changed RoPE scaling; "model" is that of the weights.
        exact: an object of another size than its buffer is a miss. To be
            turned off only for a serde that fills its buffers partly.
        settings: the fields of `Settings`.
    """

    def __init__(
        self,
        *,
        weights: str,
        cache_dtype: str,
        parallel: str,
        kv_scales: str = "none",
        rope: str = "model",
        exact: bool = True,
        **settings: Any,
    ) -> None:
        for name, text in (
            ("weights", weights),
            ("cache_dtype", cache_dtype),
            ("parallel", parallel),
        ):
            if not isinstance(text, str) or not text:
                raise ValueError(f"{name}: must say something")
        self._exact = bool(exact)
        self._lock = threading.Lock()
        self._last = 0
        # What never reached Larder completes here.
        self._refused: deque[Completion] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # LMCache asks for the descriptor once, when the queue may not exist
        # yet. That of an epoll is readable when any of its members is.
        self._epoll = select.epoll()
        self._epoll.register(self._bell, select.EPOLLIN)
        self._closed = False
        self._store = Store(
            Settings(**settings),
            {
                "model": "lmcache",  # each key names its own
                "weights": weights_of(weights),
                "cache_dtype": cache_dtype,
                "kv_scales": kv_scales,
                "rope": rope,
                "engine_layout": f"lmcache {lmcache_version()} mp {parallel}",
                "hash_scheme": "lmcache object key, sha256",
            },
            opened=self._watch,
        )

    def _watch(self, fd: int) -> None:
        with self._lock:
            if not self._closed:
                self._epoll.register(fd, select.EPOLLIN)

    def event_fd(self) -> int:
        """Readable while a completion waits."""
        return self._epoll.fileno()

    def submit_batch_set(self, keys: Sequence[str], buffers: Sequence[Any]) -> int:
        """Stores; a key that is there already counts as stored."""
        return self._submit("put", keys, list(buffers))

    def submit_batch_get(self, keys: Sequence[str], buffers: Sequence[Any]) -> int:
        """Loads into the buffers."""
        return self._submit("get", keys, list(buffers), exact=self._exact)

    def submit_batch_exists(self, keys: Sequence[str]) -> int:
        """Asks which keys there are."""
        return self._submit("lookup", keys)

    def submit_batch_delete(self, keys: Sequence[str]) -> int:
        """Drops keys from every tier."""
        return self._submit("delete", keys)

    def _submit(
        self,
        operation: str,
        keys: Sequence[str],
        buffers: list[Any] | None = None,
        **options: Any,
    ) -> int:
        with self._lock:
            self._last += 1
            number = self._last
        job = self._store.submit(
            operation, keys, buffers, user_data=number, **options
        )
        if job is None:
            self._refused.append((number, False, "not taken", [False] * len(keys)))
            self._ring()
        return number

    def _ring(self) -> None:
        with self._lock:
            if not self._closed:
                os.eventfd_write(self._bell, 1)

    def drain_completions(self) -> list[Completion]:
        """What completed since the last call. Never waits."""
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            pass
        drained = []
        while self._refused:
            drained.append(self._refused.popleft())
        for done in self._store.poll():
            drained.append(_told(done))
        return drained

    def close(self) -> None:
        """Ends what is under way; after the return no buffer is touched.
        Idempotent."""
        self._store.close()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._epoll.close()
            os.close(self._bell)


def _told(done: Any) -> Completion:
    if done.op == larder.Op.DELETE:
        # One answer for all: afterwards none is there.
        good = [done.status == 0] * done.count
    elif len(done.per_key) != done.count:  # cancelled before it began
        good = [False] * done.count
    elif done.op == larder.Op.LOOKUP:
        good = present(done.per_key)
    else:
        good = [reason == larder.Reason.NONE for reason in done.per_key]
    # A load or lookup whose keys partly miss was carried out. A store was only
    # if every key is there now: LMCache knows nothing in between.
    ok = all(good) if done.op == larder.Op.PUT else done.status == 0
    return done.user_data, ok, "" if ok else "not carried out", good

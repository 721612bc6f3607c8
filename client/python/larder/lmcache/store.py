"""What both doors stand on: values at a daemon that may be absent."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import re
import threading
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import larder
from larder._engine import Complaints, weights_digest

logger = logging.getLogger(__name__)

# Between attempts to reach a daemon that was never reached, in seconds. Once it
# was, the client library reconnects by itself.
_PAUSE_MIN = 0.05
_PAUSE_MAX = 1.0
_OPEN_DEADLINE = 1.0

_LOADABLE = (larder.State.READY, larder.State.DURABLE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to reach the daemon, and the bounds of every operation.

    Attributes:
        socket: the daemon's Unix socket; None: /run/larder/larderd.sock.
        token: the tenant's token; None: the daemon goes by the user.
        deadline: seconds that any operation may take, its queueing included.
        workers: threads that copy. Loads do not wait behind one store.
        staging_bytes: memory that stores are copied into; 0: 256 MiB.
        value_bytes_max: the largest object there may be. Part of the space:
            only processes that say the same number share.
    """

    socket: str | None = None
    token: str | None = None
    deadline: float = 10.0
    workers: int = 4
    staging_bytes: int = 0
    value_bytes_max: int = 256 << 20

    def __post_init__(self) -> None:
        if not 0 < self.deadline < 3600:
            raise ValueError("deadline: a number of seconds, above 0, below 3600")
        for name in ("workers", "value_bytes_max"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be positive")


def digest_of(text: str) -> bytes:
    """What stands for `text` where 32 bytes are wanted."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def weights_of(text: str) -> bytes:
    """The digest of the weights that a configuration names: 64 hexadecimal
    digits are the digest itself, "name@revision" stands for an immutable
    revision, and anything else is a file, a folder or a model in the local
    Hugging Face cache, which is read. ValueError if there is none."""
    if re.fullmatch("[0-9a-f]{64}", text):
        return bytes.fromhex(text)
    if re.fullmatch(r"[^@]+@[^@]+", text):
        return digest_of(text)
    try:
        return weights_digest(text)
    except OSError as error:
        raise ValueError(f"weights: {error}; or say name@revision") from error


def lmcache_version() -> str:
    """Major and minor: what may change the meaning of LMCache's bytes."""
    try:
        version = metadata.version("lmcache")
    except metadata.PackageNotFoundError:
        return "unknown"
    return ".".join(version.split(".")[:2])


def present(states: bytes) -> list[bool]:
    """Of a lookup's answer: which can be loaded."""
    return [state in _LOADABLE for state in states]


class Store:
    """A space of values, a queue for its completions, and their coming to be.

    The constructor tries once, for a second at most, to open them. If that
    fails, a thread goes on trying until it succeeds or the store is closed;
    meanwhile `submit` refuses, which its callers report as misses. `opened` is
    called once, with the queue's descriptor, by whichever thread succeeded.

    Thread-safe, but for `poll`, which has one caller at a time, and none during
    `close`. Nothing here
    raises for what the daemon does or fails to do.
    """

    def __init__(
        self,
        settings: Settings,
        description: dict[str, Any],
        opened: Callable[[int], None],
    ) -> None:
        self._settings = settings
        self._description = description
        self._opened = opened
        self._lock = threading.Lock()
        self._client: larder.Client | None = None
        self._values: Any = None
        self._queue: Any = None
        self._closed = threading.Event()
        self._complain = Complaints(logger)
        if not self._try_open():
            threading.Thread(
                target=self._keep_trying, name="larder-open", daemon=True
            ).start()

    def _try_open(self) -> bool:
        try:
            client = larder.Client(
                self._settings.socket,
                token=self._settings.token,
                name="lmcache",
                deadline=self._settings.deadline,
                connect_deadline=_OPEN_DEADLINE,
                staging_bytes=self._settings.staging_bytes,
                worker_threads=self._settings.workers,
            )
            values = larder.Values(
                client,
                value_bytes_max=self._settings.value_bytes_max,
                deadline=_OPEN_DEADLINE,
                **self._description,
            )
            queue = client.queue()
        except Exception as error:  # pylint: disable=broad-except
            self._complain("not in use, everything misses", error)
            return False
        with self._lock:
            if self._closed.is_set():
                return True
            self._client, self._values, self._queue = client, values, queue
        self._opened(queue.fileno())
        logger.info("Larder is in use")
        return True

    def _keep_trying(self) -> None:
        pause = _PAUSE_MIN
        while not self._closed.wait(pause):
            if self._try_open():
                return
            pause = min(2 * pause, _PAUSE_MAX)

    def submit(
        self,
        operation: str,
        keys: Sequence[str],
        buffers: list[Any] | None = None,
        **options: Any,
    ) -> int | None:
        """Starts a "put", "get", "lookup" or "delete". The job, or None if it
        was not taken. `buffers` are kept alive until the completion."""
        named = [digest_of(key) for key in keys]
        with self._lock:
            values = self._values
            if values is None:
                return None
            try:
                over = (
                    (values.ids_from_hashes(named),)
                    if buffers is None
                    else (named, buffers)
                )
                job: int = getattr(values, "submit_" + operation)(
                    self._queue,
                    *over,
                    deadline=self._settings.deadline,
                    **options,
                )
                return job
            except Exception as error:  # pylint: disable=broad-except
                self._complain(f"did not take a {operation}", error)
                return None

    def poll(self) -> list[Any]:
        """Completions that wait, none if there are none. Does not wait."""
        with self._lock:
            queue = self._queue
        return [] if queue is None else queue.poll()

    def cancel(self, job: int) -> None:
        """Takes a job back; its completion still comes, and soon."""
        with self._lock, contextlib.suppress(larder.Error):
            if self._client is not None:
                self._client.cancel(job)

    def lookup(self, keys: Sequence[str]) -> list[bool]:
        """Which keys there are. Waits for the daemon's answer."""
        return present(self._ask("lookup", keys, bytes(len(keys))))

    def delete(self, keys: Sequence[str]) -> int:
        """Drops keys from every tier; how many there were. Waits."""
        return int(self._ask("delete", keys, 0))

    def _ask(self, method: str, keys: Sequence[str], otherwise: Any) -> Any:
        named = [digest_of(key) for key in keys]
        with self._lock:
            values = self._values
        if values is None:
            return otherwise
        try:
            return getattr(values, method)(
                values.ids_from_hashes(named), deadline=self._settings.deadline
            )
        except Exception as error:  # pylint: disable=broad-except
            self._complain(f"did not answer a {method}", error)
            return otherwise

    def ping(self, deadline: float) -> bool:
        """Whether the daemon answers."""
        with self._lock:
            client = self._client
        try:
            if client is not None:
                client.ping(deadline=deadline)
        except Exception:  # pylint: disable=broad-except
            return False
        return client is not None

    def close(self) -> list[Any]:
        """After the return nothing touches anybody's memory. Returns the
        completions that nobody had polled. Idempotent."""
        self._closed.set()
        with self._lock:
            client, queue = self._client, self._queue
            self._client = self._values = self._queue = None
        if client is None or queue is None:
            return []
        left: list[Any] = []
        try:
            with contextlib.suppress(larder.DeadlineExceeded):
                client.drain(deadline=_OPEN_DEADLINE)
            # Cancelled by now. What waits for a daemon that does not answer has
            # its own deadline.
            while queue.pending:
                left += queue.poll(wait=0.1)
        except Exception as error:  # pylint: disable=broad-except
            self._complain("at the end", error)
        del queue
        client.close()
        return left

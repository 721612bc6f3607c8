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
from larder._engine import Complaints, Connection, weights_digest
from larder._words import THERE

logger = logging.getLogger(__name__)

# Seconds that the constructor waits for a daemon, and close() for what is under way.
_OPEN_DEADLINE = 1.0


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
    return [state in THERE for state in states]


class _Opened:
    """A space, and a queue for its completions."""

    def __init__(self, client: larder.Client, values: larder.Values) -> None:
        self.client, self.values, self.queue = client, values, client.queue()


class Store:
    """A space of values and a queue for its completions, at a daemon that may come
    late.

    The constructor waits for the daemon's answer, a second at most. Until there is
    one `submit` refuses, which its callers report as misses. `opened` is called
    once, with the queue's descriptor, by whichever thread opened it.

    Thread-safe, but for `poll`, which has one caller at a time, and none during
    `close`. Nothing here raises for what the daemon does or fails to do.
    """

    def __init__(
        self,
        settings: Settings,
        description: dict[str, Any],
        opened: Callable[[int], None],
    ) -> None:
        self._settings = settings
        self._description = description
        self._told = opened
        self._lock = threading.Lock()  # no submit() once close() has begun
        self._complain = Complaints(logger)
        self._connection: Connection[_Opened] = Connection(
            self._connect,
            self._open,
            self._complain,
            deadline=_OPEN_DEADLINE,
            in_background=True,
        )
        self._connection.wait(_OPEN_DEADLINE)

    def _connect(self, deadline: float) -> larder.Client:
        return larder.Client(
            self._settings.socket,
            token=self._settings.token,
            name="lmcache",
            deadline=self._settings.deadline,
            connect_deadline=deadline,
            staging_bytes=self._settings.staging_bytes,
            worker_threads=self._settings.workers,
        )

    def _open(self, client: larder.Client, deadline: float, of: object) -> _Opened:
        values = larder.Values(
            client,
            value_bytes_max=self._settings.value_bytes_max,
            deadline=deadline,
            **self._description,
        )
        opened = _Opened(client, values)
        self._told(opened.queue.fileno())
        logger.info("Larder is in use")
        return opened

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
            if (opened := self._connection.space()) is None:
                return None
            try:
                over = (
                    (opened.values.ids_from_hashes(named),)
                    if buffers is None
                    else (named, buffers)
                )
                job: int = getattr(opened.values, "submit_" + operation)(
                    opened.queue,
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
        opened = self._connection.space()
        return [] if opened is None else opened.queue.poll()

    def cancel(self, job: int) -> None:
        """Takes a job back; its completion still comes, and soon."""
        if (opened := self._connection.space()) is not None:
            with contextlib.suppress(larder.Error):
                opened.client.cancel(job)

    def lookup(self, keys: Sequence[str]) -> list[bool]:
        """Which keys there are. Waits for the daemon's answer."""
        return present(self._ask("lookup", keys, bytes(len(keys))))

    def delete(self, keys: Sequence[str]) -> int:
        """Drops keys from every tier; how many there were. Waits."""
        return int(self._ask("delete", keys, 0))

    def _ask(self, method: str, keys: Sequence[str], otherwise: Any) -> Any:
        named = [digest_of(key) for key in keys]
        if (opened := self._connection.space()) is None:
            return otherwise
        try:
            return getattr(opened.values, method)(
                opened.values.ids_from_hashes(named), deadline=self._settings.deadline
            )
        except Exception as error:  # pylint: disable=broad-except
            self._complain(f"did not answer a {method}", error)
            return otherwise

    def ping(self, deadline: float) -> bool:
        """Whether the daemon answers."""
        if (opened := self._connection.space()) is None:
            return False
        try:
            opened.client.ping(deadline=deadline)
        except Exception:  # pylint: disable=broad-except
            return False
        return True

    def close(self) -> list[Any]:
        """After the return nothing touches anybody's memory. Returns the
        completions that nobody had polled. Idempotent."""
        with self._lock:
            was = self._connection.close()
        left: list[Any] = []
        for opened in was:
            try:
                with contextlib.suppress(larder.DeadlineExceeded):
                    opened.client.drain(deadline=_OPEN_DEADLINE)
                # Cancelled by now. What waits for a daemon that does not answer has
                # its own deadline.
                while opened.queue.pending:
                    left += opened.queue.poll(wait=0.1)
            except Exception as error:  # pylint: disable=broad-except
                self._complain("at the end", error)
        return left

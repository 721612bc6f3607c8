"""What adapters of inference engines share: settings that are checked, the digest
of a model's weights, a log that does not repeat itself, and a connection to a
daemon that may be absent."""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ._larder import Client

Made = TypeVar("Made")
Opened = TypeVar("Opened")

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def settings_from(cls: type[Made], given: dict[str, Any], where: str) -> Made:
    """The dataclass `cls` of what the user wrote at `where`. ValueError for keys
    that it does not have, with those that it has."""
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := set(given) - known:
        raise ValueError(
            f"{where}: Larder does not know {', '.join(sorted(unknown))}; "
            f"it knows {', '.join(sorted(known))}"
        )
    return cls(**given)


# Of a text of a space: kMaxSpaceFieldBytes.
_TEXT_BYTES_MAX = 1024


def rope_text(
    rope: dict[str, Any], separators: tuple[str, str] | None = None
) -> str:
    """What a space says of how keys are rotated, in words that its codec knows
    (codec/kvc1/rope.h): the parameters, all of them. LongRoPE's many factors are
    shortened to the floats that engines make of them; what is too long even so is
    told by its digest, and keys are then coded as they are."""

    def told(value: Any) -> str:
        return json.dumps(value, sort_keys=True, separators=separators, default=str)

    text = told(rope)
    if len(text) <= _TEXT_BYTES_MAX:
        return text
    shorter = told(_as_floats(rope))
    if len(shorter) <= _TEXT_BYTES_MAX:
        return shorter
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _as_floats(value: Any) -> Any:
    """The same with the numbers of lists as short as tells their floats."""
    if isinstance(value, dict):
        return {name: _as_floats(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_shortest(v) if isinstance(v, float) else v for v in value]
    return value


def _shortest(value: float) -> float:
    try:
        packed = struct.pack("f", value)
        for digits in range(1, 9):
            short = float(f"{value:.{digits}g}")
            if struct.pack("f", short) == packed:
                return short
    except OverflowError:
        pass
    return value


def cache_folder() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "larder"


def file_digest(path: pathlib.Path) -> str:
    """SHA-256 of a file. A Hugging Face blob carries it as its name; others are
    read once, and again when size, time or inode changed."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name
    stat = real.stat()
    life = f"{real}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}"
    note = cache_folder() / "digests" / hashlib.sha256(life.encode()).hexdigest()
    try:
        known = note.read_text()
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    except OSError:
        pass
    digest = hashlib.sha256()
    with open(real, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        part = note.with_name(f"{note.name}.{os.getpid()}")
        part.write_text(digest.hexdigest())
        part.replace(note)
    except OSError:
        pass  # it is only a note
    return digest.hexdigest()


def weights_digest(model: str) -> bytes:
    """SHA-256 over the weight files and config.json of a model: a file, a folder,
    or the name of one in the local Hugging Face cache. 32 bytes.

    Raises FileNotFoundError if there is nothing to read.
    """
    path = pathlib.Path(model)
    if not path.exists():
        path = _cached_snapshot(model)
    if path.is_file():
        files = [path]
    else:
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix in _WEIGHT_FILES or file.name == "config.json"
        )
    if not any(file.suffix in _WEIGHT_FILES for file in files):
        raise FileNotFoundError(f"no weights in {path}")
    total = hashlib.sha256(b"larder weights 1")
    for file in files:
        name = file.name if path.is_file() else str(file.relative_to(path))
        total.update(json.dumps([name, file_digest(file)]).encode())
    return total.digest()


def weights_told(digest: str | None, model: str | None) -> bytes:
    """`digest`, as the user wrote it; without one weights_digest(model).

    Raises ValueError or FileNotFoundError.
    """
    if digest is None:
        if not model:
            raise ValueError("weights: neither their digest nor the model's files")
        return weights_digest(model)
    if not re.fullmatch("[0-9a-fA-F]{64}", digest):
        raise ValueError("weights: a SHA-256 has 64 hexadecimal digits")
    return bytes.fromhex(digest)


def _cached_snapshot(name: str) -> pathlib.Path:
    try:
        from huggingface_hub import snapshot_download

        return pathlib.Path(snapshot_download(name, local_files_only=True))
    except Exception as error:  # noqa: BLE001: the hub has many of its own
        raise FileNotFoundError(f"{name} is no folder and not cached: {error}") from None


class Complaints:
    """Logs what goes wrong, the same thing at most every `every` seconds."""

    def __init__(self, logger: logging.Logger, every: float = 30.0):
        self._logger = logger
        self._every = every
        self._last: dict[str, tuple[float, int]] = {}

    def __call__(self, what: str, error: object) -> None:
        now = time.monotonic()
        when, silent = self._last.get(what, (-self._every, 0))
        if now - when < self._every:
            self._last[what] = (when, silent + 1)
            return
        self._last[what] = (now, 0)
        more = f" ({silent} more since the last line)" if silent else ""
        self._logger.warning("Larder: %s: %s%s", what, error, more)


class Connection(Generic[Opened]):
    """A client of the daemon and the spaces opened from it, each had as soon as it
    can be. The daemon may start late, or be gone for a while.

    space() opens what is not open yet, and returns None if it cannot: at most once
    per `pause` seconds is it tried again, in between None comes at once. What once
    was opened stays, for the client library reconnects by itself.

    `connect(deadline)` and `open_space(client, deadline, of)` have what is left of
    `deadline` seconds, in which space() returns. They should not read weights on
    the way; where they must, `in_background` leaves it all to a thread of its own,
    which goes on trying until it succeeds or close() comes: then space() never
    waits.

    For any number of threads. Nothing raises; `complain` and `error` have why.
    """

    def __init__(
        self,
        connect: Callable[[float], Client],
        open_space: Callable[[Client, float, Any], Opened],
        complain: Complaints,
        *,
        deadline: float,
        in_background: bool = False,
        pause: float = 1.0,
    ):
        self._connect = connect
        self._open_space = open_space
        self._complain = complain
        self._deadline = deadline
        self._in_background = in_background
        self._pause = pause
        self._lock = threading.Lock()  # whoever has it connects or opens
        self._client: Client | None = None
        self._spaces: dict[Any, Opened] = {}
        # When to try again; of the client under _connect.
        self._again: dict[Any, float] = {}
        self._threads: dict[Any, threading.Thread] = {}
        self._tried = threading.Event()
        self._closed = threading.Event()
        # Of the last try that failed, if none succeeded since.
        self.error: Exception | None = None

    def space(self, of: Any = None) -> Opened | None:
        """What was opened, or now is, for `of`: whatever tells spaces apart."""
        if self._closed.is_set():
            return None
        if (opened := self._spaces.get(of)) is not None:
            return opened
        if not self._in_background:
            return self._try(of)
        thread = threading.Thread(
            target=self._keep_trying, args=(of,), name="larder-open", daemon=True
        )
        if self._threads.setdefault(of, thread) is thread:
            thread.start()
        return None

    def wait(self, seconds: float, of: Any = None) -> Opened | None:
        """In the background: waits for the end of the first try, so that a daemon
        that is there is used from the start."""
        if self.space(of) is None:
            self._tried.wait(seconds)
        return self.space(of)

    def close(self) -> list[Opened]:
        """From now on space() is None. The client lives until nobody has it or what
        was opened from it; this returns what was, for whoever must end it first.
        Waits for nothing; idempotent."""
        self._closed.set()
        return self._forget()

    def _forget(self) -> list[Opened]:
        spaces, self._spaces, self._client = self._spaces, {}, None
        return list(spaces.values())

    def _due(self, of: Any) -> float:
        """When a try may be made, by time.monotonic()."""
        what = self._connect if self._client is None else of
        return self._again.get(what, 0.0)

    def _try(self, of: Any) -> Opened | None:
        until = time.monotonic() + self._deadline

        def left() -> float:
            return max(0.001, until - time.monotonic())

        if time.monotonic() < self._due(of):
            return None
        if not self._lock.acquire(timeout=self._deadline):
            return None
        try:
            opened = self._spaces.get(of)
            if opened is not None or time.monotonic() < self._due(of):
                return opened  # somebody else has just tried
            if self._closed.is_set():
                return None
            try:
                if self._client is None:
                    self._client = self._connect(left())
                opened = self._open_space(self._client, left(), of)
            except Exception as error:  # noqa: BLE001: a miss, whatever it is
                self.error = error
                what = self._connect if self._client is None else of
                self._again[what] = time.monotonic() + self._pause
                self._complain("not in use, everything misses", error)
                return None
            self.error = None
            self._spaces[of] = opened
            return opened
        finally:
            self._lock.release()
            self._tried.set()
            if self._closed.is_set():  # meanwhile
                self._forget()

    def _keep_trying(self, of: Any) -> None:
        while self._try(of) is None:
            if self._closed.wait(max(0.0, self._due(of) - time.monotonic())):
                return

"""What adapters of inference engines share: the digest of a model's weights and
a log that does not repeat itself."""

import hashlib
import json
import logging
import os
import pathlib
import re
import time

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


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

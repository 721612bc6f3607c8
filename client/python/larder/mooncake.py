"""Larder behind the calls of Mooncake's Python store.

For programs written for `mooncake.store.MooncakeDistributedStore`: the same calls
and the same codes (0 or a size, below 0 an error of Mooncake's), but the values
lie in the larderd of this host. Either ask for it,

    >>> from larder.mooncake import MooncakeDistributedStore

or put it in Mooncake's place, before anything imports that:

    >>> larder.mooncake.install("/run/larder/larderd.sock")
    $ python -m larder.mooncake --socket /run/larder/larderd.sock program.py ...

client/python/docs/mooncake.md says what differs. Nothing of Mooncake is needed.
"""

import argparse
import ctypes
import hashlib
import importlib
import logging
import runpy
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ._errors import DeadlineExceeded, Error, Unavailable
from ._larder import Client, Ids, Values
from ._words import THERE, Reason

__all__ = [
    "BufferHandle",
    "MooncakeDistributedStore",
    "ReplicateConfig",
    "install",
]

_log = logging.getLogger(__name__)

# Mooncake's ErrorCode.
OK = 0
INTERNAL_ERROR = -1
NO_AVAILABLE_HANDLE = -200
INVALID_PARAMS = -600
OBJECT_NOT_FOUND = -704
RPC_FAIL = -900
RPC_TIMEOUT = -901
UNAVAILABLE_IN_CURRENT_STATUS = -1010  # before setup, after close
UNAVAILABLE_IN_CURRENT_MODE = -1011  # Larder has nothing like it

VALUE_BYTES_MAX = 256 << 20

Pieces = list[Any]  # of a value's memory: buffers, or (address, bytes)
Answers = tuple[bytes, list[int]]  # reasons, and what is said where there is none

# What is not here is a miss, as it is with Mooncake.
_CODES = {
    Reason.BUSY: NO_AVAILABLE_HANDLE,
    Reason.NOT_TRIED: INVALID_PARAMS,
    Reason.DEADLINE: RPC_TIMEOUT,
    Reason.CANCELLED: RPC_FAIL,
    Reason.UNAVAILABLE: RPC_FAIL,
}

# What install() and the command line said; setup() may say otherwise.
_defaults: dict[str, str | None] = {"socket": None, "token": None}


class ReplicateConfig:
    """Accepted wherever Mooncake takes one, and ignored: a value is kept once, in
    the tiers of this host's daemon."""

    def __init__(self) -> None:
        self.replica_num = 1
        self.with_soft_pin = False
        self.with_hard_pin = False
        self.preferred_segment = ""
        self.preferred_segments: list[str] = []
        self.prefer_alloc_in_same_node = False
        self.group_ids: list[str] | None = None
        self.soft_pin_ttl_ms: int | None = None


class BufferHandle(bytearray):
    """A value in memory of its own: a buffer, with its address and size."""

    def ptr(self) -> int:
        return ctypes.addressof((ctypes.c_char * len(self)).from_buffer(self))

    def size(self) -> int:
        return len(self)


class MooncakeDistributedStore:
    """Mooncake's store, kept by Larder.

    setup() connects; whatever comes before it or after close() returns -1010.
    Nothing raises but what takes another type than Mooncake does. Every call ends
    by the client's deadline (`deadline` seconds). For any number of threads.
    """

    def __init__(self) -> None:
        self._client: Client | None = None
        self._values: Values | None = None
        self._hostname = ""
        self._registered: dict[int, int] = {}

    # ---- Life ----

    def setup(
        self,
        local_hostname: str | dict[str, Any],
        metadata_server: str = "",
        global_segment_size: int = 0,
        local_buffer_size: int = 0,
        protocol: str = "tcp",
        rdma_devices: str = "",
        master_server_addr: str = "",
        engine: object = None,
        enable_ssd_offload: bool = False,
        ssd_offload_path: str = "",
        tenant_id: str = "default",
        enable_client_http_server: bool = False,
        client_http_port: int = 9300,
        *,
        deadline: float = 5.0,
    ) -> int:
        """Connects to larderd. Of the addresses, "larder://PATH" as the master's or
        the metadata server's names its socket; all else that is about memory and
        wires is the daemon's own business. `tenant_id`: a space of its own."""
        if isinstance(local_hostname, dict):
            known = dict(local_hostname)
            return self.setup(
                str(known.get("local_hostname", "")),
                str(known.get("metadata_server", "")),
                master_server_addr=str(known.get("master_server_addr", "")),
                tenant_id=str(known.get("tenant_id", "default")),
                deadline=deadline,
            )
        socket = _defaults["socket"]
        for address in (master_server_addr, metadata_server):
            if address.startswith("larder://"):
                socket = address.removeprefix("larder://") or socket
        try:
            self._client = Client(
                socket,
                token=_defaults["token"],
                name="mooncake",
                deadline=deadline,
                connect_deadline=deadline,
            )
            self._values = Values(
                self._client,
                model=f"mooncake/{tenant_id}",
                # Whatever else matters, Mooncake's users put into their keys.
                weights=hashlib.sha256(b"larder.mooncake").digest(),
                cache_dtype="bytes",
                value_bytes_max=VALUE_BYTES_MAX,
                engine_layout="mooncake",
                hash_scheme="sha256(key)",
            )
        except Error as error:
            _log.error("setup: %s", error)
            self._client = self._values = None
            return _code_of(error)
        self._hostname = local_hostname
        return OK

    def close(self) -> int:
        """Ends the connection; what was stored stays. 0, also the second time."""
        self._values = self._client = None
        self._registered.clear()
        return OK

    def health_check(self) -> int:
        """0 if the daemon answers."""
        client = self._client
        if client is None:
            return UNAVAILABLE_IN_CURRENT_STATUS
        try:
            client.ping()
        except Error as error:
            return _code_of(error)
        return OK

    def get_hostname(self) -> str:
        return self._hostname

    # ---- Put: the first value of a key stays ----

    def put(self, key: str, value: Any, config: object = None) -> int:
        return self.put_parts(key, value)

    def put_batch(
        self, keys: Sequence[str], values: Sequence[Any], config: object = None
    ) -> int:
        """The first error, or 0."""
        return _first_error(self._put, keys, values)

    def put_parts(self, key: str, *parts: Any, config: object = None) -> int:
        return self._put([key], [_buffers(parts)])[0] if parts else OK

    def put_from(
        self, key: str, buffer_ptr: int, size: int, config: object = None
    ) -> int:
        return self._put([key], [[(buffer_ptr, size)]])[0]

    def batch_put_from(
        self,
        keys: Sequence[str],
        buffer_ptrs: Sequence[int],
        sizes: Sequence[int],
        config: object = None,
    ) -> list[int]:
        return self._put(keys, _one_each(buffer_ptrs, sizes))

    def batch_put_from_multi_buffers(
        self,
        keys: Sequence[str],
        all_buffer_ptrs: Sequence[Sequence[int]],
        all_sizes: Sequence[Sequence[int]],
        config: object = None,
    ) -> list[int]:
        return self._put(keys, _several_each(all_buffer_ptrs, all_sizes))

    # ---- Upsert: remove, then put. Readers may see the moment between ----

    def upsert(self, key: str, value: Any, config: object = None) -> int:
        return self.upsert_parts(key, value)

    def upsert_batch(
        self, keys: Sequence[str], values: Sequence[Any], config: object = None
    ) -> int:
        return _first_error(self._upsert, keys, values)

    def upsert_parts(self, key: str, *parts: Any, config: object = None) -> int:
        return self._upsert([key], [_buffers(parts)])[0] if parts else OK

    def upsert_from(
        self, key: str, buffer_ptr: int, size: int, config: object = None
    ) -> int:
        return self._upsert([key], [[(buffer_ptr, size)]])[0]

    def batch_upsert_from(
        self,
        keys: Sequence[str],
        buffer_ptrs: Sequence[int],
        sizes: Sequence[int],
        config: object = None,
    ) -> list[int]:
        return self._upsert(keys, _one_each(buffer_ptrs, sizes))

    # ---- Get ----

    def get(self, key: str) -> bytes:
        """The value; b"" if it is not there."""
        return self.get_batch([key])[0]

    def get_batch(self, keys: Sequence[str]) -> list[bytes]:
        return [bytes(got or b"") for got in self.batch_get_buffer(keys)]

    def get_buffer(self, key: str) -> BufferHandle | None:
        return self.batch_get_buffer([key])[0]

    def batch_get_buffer(self, keys: Sequence[str]) -> list[BufferHandle | None]:
        sizes = self._sizes(keys)
        buffers = [BufferHandle(size) if size > 0 else None for size in sizes]
        there = [i for i, buffer in enumerate(buffers) if buffer is not None]
        got = self._get([keys[i] for i in there], [[buffers[i]] for i in there])
        for i, size in zip(there, got):
            if size != sizes[i]:  # evicted in between
                buffers[i] = None
        return buffers

    def get_into(self, key: str, buffer_ptr: int, size: int) -> int:
        """The value's size, or an error."""
        return self._get([key], [[(buffer_ptr, size)]])[0]

    def batch_get_into(
        self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        return self._get(keys, _one_each(buffer_ptrs, sizes))

    def batch_get_into_multi_buffers(
        self,
        keys: Sequence[str],
        all_buffer_ptrs: Sequence[Sequence[int]],
        all_sizes: Sequence[Sequence[int]],
        prefer_alloc_in_same_node: bool = False,
    ) -> list[int]:
        return self._get(keys, _several_each(all_buffer_ptrs, all_sizes))

    # ---- Presence ----

    def is_exist(self, key: str) -> int:
        """1 or 0, or an error."""
        return self.batch_is_exist([key])[0]

    def batch_is_exist(self, keys: Sequence[str]) -> list[int]:
        def ask(values: Values) -> list[int]:
            states = values.lookup(_ids(values, keys))
            return [int(state in THERE) for state in states]

        return self._each(keys, ask)

    def get_size(self, key: str) -> int:
        return self._sizes([key])[0]

    # ---- Remove ----

    def remove(self, key: str, force: bool = False) -> int:
        """Larder has no leases to be forced: readers keep what they read."""
        return self.batch_remove([key])[0]

    def batch_remove(self, keys: Sequence[str], force: bool = False) -> list[int]:
        def drop(values: Values) -> list[int]:
            return [
                OK if values.delete(_ids(values, [key])) else OBJECT_NOT_FOUND
                for key in keys
            ]

        return self._each(keys, drop)

    def remove_all(self, force: bool = False) -> int:
        """How many there were, of this tenant_id."""

        def drop(values: Values) -> list[int]:
            count, cursor, more = 0, None, True
            while more:
                page, more = values.list(cursor)
                ids = [entry["id"] for entry in page]
                count += values.delete(Ids(ids)) if ids else 0
                cursor = ids[-1] if ids else None
            return [count]

        return self._each([""], drop)[0]

    def remove_by_regex(self, regex_pattern: str, force: bool = False) -> int:
        """Not possible: Larder keeps digests of keys."""
        return UNAVAILABLE_IN_CURRENT_MODE

    # ---- Buffers: any memory will do; registering is only remembered ----

    def register_buffer(self, buffer_ptr: int, size: int) -> int:
        """-600 if it overlaps with one that is."""
        end = buffer_ptr + size
        for begin, length in self._registered.items():
            if begin < end and buffer_ptr < begin + length:
                return INVALID_PARAMS
        self._registered[buffer_ptr] = size
        return OK

    def unregister_buffer(self, buffer_ptr: int) -> int:
        known = self._registered.pop(buffer_ptr, None)
        return INVALID_PARAMS if known is None else OK

    # ---- Within ----

    def _each(
        self, keys: Sequence[str], call: Callable[[Values], list[int]]
    ) -> list[int]:
        """A code for each key; a failure of the call is that of each."""
        values = self._values
        if values is None:
            return [UNAVAILABLE_IN_CURRENT_STATUS] * len(keys)
        if not keys:
            return []
        try:
            return call(values)
        except Error as error:
            _log.warning("%s", error)
            return [_code_of(error)] * len(keys)

    def _put(self, keys: Sequence[str], pieces: list[Pieces] | None) -> list[int]:
        def put(values: Values, *batch: Any) -> Answers:
            return values.put(*batch), [OK] * len(keys)

        return self._move(keys, pieces, put, INTERNAL_ERROR)

    def _get(self, keys: Sequence[str], pieces: list[Pieces] | None) -> list[int]:
        return self._move(keys, pieces, Values.get, OBJECT_NOT_FOUND)

    def _upsert(self, keys: Sequence[str], pieces: list[Pieces] | None) -> list[int]:
        def drop(values: Values) -> list[int]:
            values.delete(_ids(values, keys))
            return [OK] * len(keys)

        if pieces is None or len(pieces) != len(keys):
            return [INVALID_PARAMS] * len(keys)
        failed = min(self._each(keys, drop), default=OK)
        return [failed] * len(keys) if failed else self._put(keys, pieces)

    def _move(
        self,
        keys: Sequence[str],
        pieces: list[Pieces] | None,
        call: Callable[..., Answers],
        otherwise: int,
    ) -> list[int]:
        """For each key, whose memory `pieces` is, what `call` answers or the code
        of its reason, `otherwise` if there is none. Keys with as many pieces are
        one call; those with no name or no memory are wrong by themselves."""
        if pieces is None or len(pieces) != len(keys):
            return [INVALID_PARAMS] * len(keys)
        alike: dict[int, list[int]] = {}
        for i, key in enumerate(keys):
            if key and sum(map(_bytes_of, pieces[i])) > 0:
                alike.setdefault(len(pieces[i]), []).append(i)

        def move(values: Values) -> list[int]:
            codes = [INVALID_PARAMS] * len(keys)
            for chosen in alike.values():
                reasons, answers = call(
                    values,
                    [_digest(keys[i]) for i in chosen],
                    [pieces[i] for i in chosen],
                )
                for i, reason, answer in zip(chosen, reasons, answers):
                    code = _CODES.get(Reason(reason), otherwise)
                    codes[i] = code if reason else answer
            return codes

        return self._each(keys, move)

    def _sizes(self, keys: Sequence[str]) -> list[int]:
        def ask(values: Values) -> list[int]:
            nothing = [bytearray(0) for _ in keys]  # too little memory
            digests = [_digest(key) for key in keys]
            reasons, sizes = values.get(digests, nothing, sizes=True)
            return [
                size or _CODES.get(Reason(reason), OBJECT_NOT_FOUND)
                for reason, size in zip(reasons, sizes)
            ]

        return self._each(keys, ask)


def _digest(key: str | bytes) -> bytes:
    # Mooncake's keys are of any length.
    return hashlib.sha256(key if isinstance(key, bytes) else key.encode()).digest()


def _ids(values: Values, keys: Sequence[str]) -> Ids:
    return values.ids_from_hashes([_digest(key) for key in keys])


def _code_of(error: Error) -> int:
    if isinstance(error, DeadlineExceeded):
        return RPC_TIMEOUT
    return RPC_FAIL if isinstance(error, Unavailable) else INTERNAL_ERROR


def _buffers(parts: Iterable[Any]) -> Pieces:
    """Each as bytes: whatever has a buffer, but no text."""
    return [
        part if isinstance(part, bytes) else memoryview(part).cast("B")
        for part in parts
    ]


def _bytes_of(piece: Any) -> int:
    return piece[1] if isinstance(piece, tuple) else len(piece)


def _first_error(
    store: Callable[[Sequence[str], list[Pieces]], list[int]],
    keys: Sequence[str],
    values: Sequence[Any],
) -> int:
    if len(keys) != len(values):
        return INVALID_PARAMS
    return min(store(keys, [_buffers([value]) for value in values]), default=OK)


def _one_each(pointers: Sequence[int], sizes: Sequence[int]) -> list[Pieces] | None:
    """None, here and below: as many sizes as addresses there are not."""
    if len(pointers) != len(sizes):
        return None
    return [[piece] for piece in zip(pointers, sizes)]


def _several_each(
    pointers: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]
) -> list[Pieces] | None:
    if [len(each) for each in pointers] != [len(each) for each in sizes]:
        return None
    return [list(zip(*both)) for both in zip(pointers, sizes)]


def install(socket: str | None = None, token: str | None = None) -> None:
    """From here on `import mooncake.store` means this module, for the whole process.

    `socket`: larderd's, for those whose setup() names none. Mooncake's other
    modules stay what they are, if it is installed. Raises RuntimeError if its own
    store was imported already.
    """
    from larder import mooncake as shim  # not __main__

    known = sys.modules.get("mooncake.store")
    if known is not None and getattr(known, "__larder__", None) is not shim:
        raise RuntimeError("mooncake.store is imported already: call install() first")
    shim._defaults.update(socket=socket, token=token)
    if known is not None:
        return
    store = types.ModuleType("mooncake.store", shim.__doc__)
    store.__dict__.update({name: getattr(shim, name) for name in shim.__all__[:-1]})
    store.__dict__["__larder__"] = shim
    sys.modules["mooncake.store"] = store
    try:
        package = importlib.import_module("mooncake")
    except ImportError:  # not installed: the name alone
        package = sys.modules["mooncake"] = types.ModuleType("mooncake")
        package.__path__ = []
    package.store = store  # type: ignore[attr-defined]


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m larder.mooncake",
        description="Runs a program with Larder in the place of mooncake.store.",
    )
    parser.add_argument("--socket", help="larderd's socket")
    parser.add_argument("-m", action="store_true", help="PROGRAM is a module")
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    install(options.socket)
    sys.argv = [options.program, *options.arguments]
    if options.m:
        runpy.run_module(options.program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(options.program, run_name="__main__")


if __name__ == "__main__":
    _main()

"""LMCache inside an engine: its own CPU and disk backends, and Larder as its remote
storage plugin, through LMCache's own storage backends.

What an engine pays is timed, from its memory to its memory: LMCache's object is
allocated and filled, put, and waited for; got, and copied out. LocalCPUBackend then
only keeps a reference: its figures are those of one copy within the process, which
end with it; Larder's second copy is what outlives it and is shared. LocalDiskBackend
writes and reads files (O_DIRECT), Larder's counterpart is read from NVMe, after a
restart of the daemon. Every byte got is compared. One run, in turns, round by round.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import os
import pathlib
import tempfile
import threading
import time

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")

import numpy as np
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend import CreateStorageBackends

from bench_daemon import SIZES, Daemon, Rows

BATCH_BYTES = 64 << 20
OBJECTS_MAX = 64
SINGLES = 8  # in a round; objects of a batch that are put and got one by one
CHUNK = 256  # tokens
LAYER_BYTES = 2 * CHUNK * 64 * 2  # K and V, one head of 64 in bf16
POOL_GB = 0.5
PATIENCE = 60


class Backend:
    """One of LMCache's backends, with memory of an engine to copy from and to."""

    def __init__(self, name: str, size: int, loop, between=None, **config):
        self.metadata = LMCacheMetadata(
            model_name="bench/model",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(size // LAYER_BYTES, 2, CHUNK, 1, 64),
            chunk_size=CHUNK,
        )
        settings = {
            "chunk_size": CHUNK,
            "local_cpu": name == "LocalCPUBackend",
            "max_local_cpu_size": POOL_GB,
            "blocking_timeout_secs": PATIENCE,
            **config,
        }
        self.all = CreateStorageBackends(
            LMCacheEngineConfig.from_defaults(**settings), self.metadata, loop, "cpu"
        )
        self.pool = self.all["LocalCPUBackend"]
        (self.backend,) = (
            backend for found, backend in self.all.items() if found.startswith(name)
        )
        self.between = between

    def key(self, number: int) -> CacheEngineKey:
        return CacheEngineKey(
            model_name="bench/model",
            world_size=1,
            worker_id=0,
            chunk_hash=1 + number,
            dtype=torch.bfloat16,
        )

    def put(self, keys, source) -> float:
        """Seconds until all rows of `source` are kept."""
        done = threading.Semaphore(0)
        start = time.perf_counter()
        objects = []
        for row in source:
            made = self.pool.allocate(
                self.metadata.get_shapes(CHUNK),
                self.metadata.get_dtypes(),
                MemoryFormat.KV_2LTD,
            )
            np.frombuffer(made.byte_array, np.uint8)[:] = row
            objects.append(made)
        self.backend.batched_submit_put_task(
            keys, objects, on_complete_callback=lambda key: done.release()
        )
        for _ in keys:
            assert done.acquire(timeout=PATIENCE), "a put did not end"
        seconds = time.perf_counter() - start
        for made in objects:
            made.ref_count_down()
        return seconds

    def get(self, keys, target) -> float:
        """Seconds until all rows of `target` are filled."""
        start = time.perf_counter()
        found = self.backend.batched_get_blocking(keys)
        for row, made in zip(target, found, strict=True):
            assert made is not None, "what was put is not there"
            row[:] = np.frombuffer(made.byte_array, np.uint8)
            made.ref_count_down()
        return time.perf_counter() - start

    def forget(self, keys) -> None:
        for key in keys:
            self.backend.remove(key)

    def settled(self, key) -> None:
        """Does what comes between putting and getting."""
        if self.between is None:
            return
        self.between()
        until = time.monotonic() + PATIENCE
        while not self.backend.contains(key):  # reconnects
            assert time.monotonic() < until, "what was put is not there"
            time.sleep(0.02)

    def round(self, turn: int, source, target) -> dict[str, list[float]]:
        """Seconds of a batch, and of objects one by one."""
        keys = [self.key(turn * 2 * OBJECTS_MAX + i) for i in range(len(source))]
        ones = keys[:SINGLES]
        rest, body, out = keys[len(ones) :], source[len(ones) :], target[len(ones) :]
        target[:] = 0
        times = {"put": [self.put(rest, body)]}
        times["put_one"] = [
            self.put([key], source[i : i + 1]) for i, key in enumerate(ones)
        ]
        self.settled(keys[0])
        # One by one first: a read of the batch may bring neighbours along.
        times["get_one"] = [
            self.get([key], target[i : i + 1]) for i, key in enumerate(ones)
        ]
        times["get"] = [self.get(rest, out)]
        assert np.array_equal(source, target), "WRONG BYTES"
        self.forget(keys)
        return times

    def close(self) -> None:
        for backend in self.all.values():
            backend.close()


def larders(socket: str) -> dict:
    prefix = "remote_storage_plugin.larder."
    return {
        "remote_storage_plugins": ["larder"],
        "extra_config": {
            prefix + "module_path": "larder.lmcache",
            prefix + "class_name": "RemoteAdapter",
            prefix + "socket": socket,
            prefix + "weights": "bench/model@1",
        },
    }


def measure(size: int, rounds: int, parent: str | None, loop, rows: Rows) -> None:
    count = SINGLES + max(2, min(OBJECTS_MAX - SINGLES, BATCH_BYTES // size))
    rng = np.random.default_rng(size)
    source = rng.integers(0, 256, (count, size), np.uint8)
    target = np.zeros_like(source)
    with (
        contextlib.ExitStack() as stack,
        tempfile.TemporaryDirectory(prefix="larder-bench-", dir=parent) as name,
    ):
        folder = pathlib.Path(name)
        dram = Daemon("--dram.capacity=2GiB")
        stack.callback(dram.close)
        nvme = Daemon("--dram.capacity=2GiB", nvme=folder / "nvme")
        stack.callback(nvme.close)
        (folder / "files").mkdir()
        pairs = {
            "cpu": (
                Backend("LocalCPUBackend", size, loop),
                Backend("RemoteBackend", size, loop, **larders(dram.socket)),
            ),
            "disk": (
                Backend(
                    "LocalDiskBackend",
                    size,
                    loop,
                    local_disk=str(folder / "files"),
                    max_local_disk_size=8,
                    extra_config={"use_odirect": True},
                ),
                Backend(
                    "RemoteBackend",
                    size,
                    loop,
                    nvme.everything_to_nvme,
                    **larders(nvme.socket),
                ),
            ),
        }
        for where, pair in pairs.items():
            for backend in pair:
                stack.callback(backend.close)
            times: list[list[dict]] = [[], []]
            # One more: the first touches memory and is not counted.
            for turn in range(rounds + 1):
                source[:, ::4096] = turn
                for which in (0, 1) if turn % 2 else (1, 0):
                    times[which].append(pair[which].round(turn, source, target))
            rows.add_puts_and_gets(
                f"engines.lmcache.{where}",
                size,
                source[SINGLES:].nbytes,
                times[0][1:],
                times[1][1:],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", help="where files are made: the disk measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", help="KiB, separated by commas, multiples of 64")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    sizes = SIZES
    if options.sizes:
        sizes = [int(kib) << 10 for kib in options.sizes.split(",")]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    rows = Rows()
    for size in sizes:
        measure(size, options.rounds, options.dir, loop, rows)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    rows.write(
        options.json,
        lmcache=importlib.metadata.version("lmcache"),
        rounds=options.rounds,
    )


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Larder against LMCache's own L2 adapters, through LMCache's own interface.

Run with the Python that `tools/test-engines --setup lmcache` makes:

  .deps/python-lmcache/bin/python tools/bench_engines/lmcache_l2.py [--json FILE]

For each object size every adapter in turn stores a batch, looks it up, loads it,
and loads one object of it, repeated with new keys; medians are printed. One batch
is under way at a time. Every byte loaded is compared with what its key says.

What "stored" means differs: fs and fs_native have written a file (into the page
cache; O_DIRECT: to the device, without a sync), Larder holds the object in the
daemon's memory and is writing it to NVMe. What "loaded" comes from, too: the rows
say so. `mock` is LMCache's copy within its own process, with its simulated
bandwidth set out of the way: a bound, not a cache.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import select
import statistics
import sys
import tempfile
import time

os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")

import numpy as np
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L1MemoryDesc
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.memory_management import (
    MemoryFormat,
    MemoryObjMetadata,
    TensorMemoryObj,
)
from lmcache.v1.platform import consume_fd

from bench_daemon import SIZES, Daemon

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4096
PATIENCE = 120.0


class Failure(Exception):
    """Something that the user can act on."""


class Memory:
    """LMCache's L1 for a batch: objects over one aligned piece of memory."""

    def __init__(self, count: int, size: int):
        whole = torch.empty(count * size + PAGE, dtype=torch.uint8)
        offset = -whole.data_ptr() % PAGE
        self.tensor = whole[offset : offset + count * size]
        self.bytes = self.tensor.numpy().reshape(count, size)
        self.about = L1MemoryDesc(
            ptr=self.tensor.data_ptr(), size=count * size, align_bytes=PAGE
        )
        self.objects = [
            TensorMemoryObj(
                raw_data=self.tensor[i * size : (i + 1) * size],
                metadata=MemoryObjMetadata(
                    shape=torch.Size([size]), dtype=torch.uint8, address=i * size,
                    phy_size=size, fmt=MemoryFormat.KV_2LTD, ref_count=1),
                parent_allocator=None)
            for i in range(count)
        ]  # fmt: skip


NOISE = np.random.default_rng(7).integers(0, 256, max(SIZES), np.uint8)


def content(number: int, size: int) -> np.ndarray:
    """Of object `number`: noise, with the number and the place on every page."""
    data = NOISE[:size].copy()
    marks = data.view(np.uint64)[:: PAGE // 8]
    marks[:] = np.arange(len(marks), dtype=np.uint64) + np.uint64(number << 20)
    return data


def key(number: int) -> ObjectKey:
    return ObjectKey(
        chunk_hash=number.to_bytes(32, "big"),
        model_name="bench/model",
        kv_rank=0x01000100,
    )


class Adapter:
    """An adapter made by LMCache; calls that wait and return the seconds."""

    def __init__(self, spec: dict, about: L1MemoryDesc):
        parsed = parse_args_to_l2_adapters_config(
            argparse.Namespace(l2_adapter=[json.dumps(spec)])
        )
        self.adapter = create_l2_adapter(parsed.adapters[0], about)

    def store(self, keys, objects) -> float:
        done = {}

        def result(task):
            done.update(self.adapter.pop_completed_store_tasks())
            return done.get(task)

        seconds, answer = self._timed(
            lambda: self.adapter.submit_store_task(keys, objects),
            result,
            self.adapter.get_store_event_fd(),
        )
        if not answer.is_successful():
            raise Failure("a store failed")
        return seconds

    def lookup(self, keys) -> float:
        layout = {0: MemoryLayoutDesc(shapes=[], dtypes=[])}
        seconds, found = self._timed(
            lambda: self.adapter.submit_lookup_and_lock_task(keys, layout),
            self.adapter.query_lookup_and_lock_result,
            self.adapter.get_lookup_and_lock_event_fd(),
        )
        self.adapter.submit_unlock(keys)
        if found.popcount() != len(keys):
            raise Failure("a lookup missed what was stored")
        return seconds

    def load(self, keys, objects) -> float:
        seconds, found = self._timed(
            lambda: self.adapter.submit_load_task(keys, objects),
            self.adapter.query_load_result,
            self.adapter.get_load_event_fd(),
        )
        if found.popcount() != len(keys):
            raise Failure("a load missed what was stored")
        return seconds

    @staticmethod
    def _timed(submit, result, fd):
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        begin = time.perf_counter()
        task = submit()
        while (answer := result(task)) is None:
            if not poller.poll(PATIENCE * 1000):
                raise Failure("no completion")
            consume_fd(fd)
        return time.perf_counter() - begin, answer


class Subject:
    """A row: an adapter, and what is done between storing and loading."""

    def __init__(self, name, spec, between=lambda: None):
        self.name, self.spec, self.between = name, spec, between
        self.adapter: Adapter | None = None
        self.figures = {"store": [], "lookup": [], "load": [], "load_one": []}
        self.why = ""


def subjects(
    folder: pathlib.Path, dram: Daemon, nvme: Daemon
) -> list[Subject]:
    def files(kind: str, name: str, **options) -> Subject:
        path = folder / name.replace(" ", "-")
        path.mkdir()
        return Subject(name, {"type": kind, "base_path": str(path), **options})

    def ours(daemon: Daemon) -> dict:
        return {
            "type": "native_plugin",
            "module_path": "larder.lmcache",
            "class_name": "L2Connector",
            "adapter_params": {
                "socket": daemon.socket,
                "weights": "bench/model@1",
                "cache_dtype": "u8",
                "parallel": "tp1",
                "deadline": 60,
            },
        }

    return [
        Subject("larder, DRAM", ours(dram)),
        files("fs", "fs, page cache"),
        files("fs_native", "fs_native, page cache"),
        Subject("mock, own memory",
                {"type": "mock", "max_size_gb": 4, "mock_bandwidth_gb": 1e6}),
        Subject("larder, NVMe", ours(nvme), nvme.everything_to_nvme),
        files("fs", "fs, O_DIRECT", use_odirect=True),
        files("fs_native", "fs_native, O_DIRECT", use_odirect=True),
    ]  # fmt: skip


def measure(size: int, count: int, rounds: int, parent: str | None) -> list[Subject]:
    """Every subject with batches of `count` objects; the first round warms."""
    with tempfile.TemporaryDirectory(prefix="larder-bench-", dir=parent) as name:
        folder = pathlib.Path(name)
        # Two, because one of them is restarted again and again.
        daemons = [
            Daemon("--dram.capacity=2GiB", nvme=folder / each)
            for each in ("dram", "nvme")
        ]
        rows = subjects(folder, *daemons)
        source, target = Memory(count, size), Memory(count, size)
        try:
            for number in range(rounds + 1):
                keys = [key(number * count + i) for i in range(count)]
                for i in range(count):
                    source.bytes[i] = content(number * count + i, size)
                # In another order each time: nobody always follows the same.
                for row in rows[number % len(rows) :] + rows[: number % len(rows)]:
                    if row.why:
                        continue
                    try:
                        one_round(row, keys, source, target, number > 0)
                    except (Failure, OSError, RuntimeError, ValueError) as error:
                        row.why = str(error) or type(error).__name__
        finally:
            for row in rows:
                if row.adapter is not None:
                    with contextlib.suppress(Exception):
                        row.adapter.adapter.close()
            for daemon in daemons:
                daemon.close()
    return rows


def one_round(row, keys, source, target, counts) -> None:
    if row.adapter is None:
        row.adapter = Adapter(row.spec, target.about)
    seconds = {"store": row.adapter.store(keys, source.objects)}
    row.between()
    target.tensor.zero_()
    if row.spec["type"] == "native_plugin":
        await_reconnection(row.adapter, keys)
    seconds["lookup"] = row.adapter.lookup(keys)
    # The one first: from NVMe it would be in memory after the batch.
    seconds["load_one"] = row.adapter.load(keys[:1], target.objects[:1])
    rest = row.adapter.load(keys[1:], target.objects[1:])
    seconds["load"] = rest * len(keys) / (len(keys) - 1)
    if not np.array_equal(source.bytes, target.bytes):
        raise SystemExit(f"{row.name}: WRONG BYTES")
    if counts:
        for name, value in seconds.items():
            row.figures[name].append(value)


def await_reconnection(adapter: Adapter, keys) -> None:
    """After a restart of its daemon; LMCache would see some misses."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        with contextlib.suppress(Failure):
            adapter.lookup(keys)
            return
        time.sleep(0.05)


def human(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--dir", help="where files are made: the disk measured")
    parser.add_argument("--rounds", type=int, default=5, help="measured, of each row")
    parser.add_argument(
        "--batch", type=int, default=128, help="MiB, but at most 64 objects"
    )
    parser.add_argument("--sizes", help="KiB, separated by commas")
    options = parser.parse_args()
    sizes = SIZES
    if options.sizes:
        sizes = [int(kib) * KIB for kib in options.sizes.split(",")]
        if any(not PAGE <= size <= max(SIZES) or size % PAGE for size in sizes):
            parser.error("--sizes: from 4 to 32768 KiB, in steps of 4")
    versions = {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name)
           for name in ("lmcache", "larder", "torch", "numpy")},
    }  # fmt: skip
    print(", ".join(f"{name} {version}" for name, version in versions.items()),
          f"- {os.cpu_count()} CPUs, {platform.release()}")  # fmt: skip
    records = []
    try:
        for size in sizes:
            count = max(2, min(64, options.batch * MIB // size))
            print(f"\n{count} objects of {human(size)}")
            print(f"{'':24}{'store':>11}{'load':>11}{'lookup':>12}{'load one':>12}")
            for row in measure(size, count, options.rounds, options.dir):
                if row.why:
                    print(f"{row.name:24}  not measured: {row.why}")
                    continue
                median = {k: statistics.median(v) for k, v in row.figures.items()}
                gb = count * size / 1e9
                print(f"{row.name:24}{gb / median['store']:6.2f} GB/s"
                      f"{gb / median['load']:6.2f} GB/s"
                      f"{median['lookup'] * 1e6:9.0f} us"
                      f"{median['load_one'] * 1e6:9.0f} us", flush=True)  # fmt: skip
                records.append({"adapter": row.name, "bytes": size, "objects": count,
                                "seconds": row.figures})  # fmt: skip
    except Failure as failure:
        sys.exit(f"lmcache_l2: {failure}")
    print("\nEvery byte that was loaded was compared.")
    if options.json:
        with open(options.json, "w") as out:
            json.dump({"versions": versions, "results": records}, out, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

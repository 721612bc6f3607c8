"""Put and get through Mooncake's calls: Mooncake's own store over TCP (its master,
a process that lends memory, and a client), and Larder in its place.

Batches of `batch_put_from` and `batch_get_into` on registered memory; single gets
for the latency. Every byte got is compared. One run, store after store, size by
size in turns."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import time

from bench_daemon import larderd

SIZES = [64 << 10, 1 << 20, 4 << 20, 32 << 20]
BATCH_BYTES = 128 << 20
LENT = 3 << 30


def client(master: str, metadata: str, lent: int):
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    code = store.setup("127.0.0.1", metadata, lent, 256 << 20, "tcp", "", master)
    assert code == 0, f"setup: {code}"
    return store


def measure(master: str, metadata: str, rounds: int) -> None:
    """In a process of its own: sizes come in, a line of JSON goes out for each.
    With `master` "larder", Larder at the socket `metadata` takes the store's place."""
    import numpy as np

    if master == "larder":
        import larder.mooncake

        larder.mooncake.install(metadata)
    store = client(master, metadata, 0)
    source = np.random.default_rng(1).integers(0, 256, BATCH_BYTES, dtype=np.uint8)
    target = np.zeros(BATCH_BYTES, np.uint8)
    for memory in (source, target):
        store.register_buffer(memory.ctypes.data, memory.nbytes)
    for line in sys.stdin:
        size = int(line)
        count = min(BATCH_BYTES // size, 256)
        total = count * size
        puts, gets, singles = [], [], []
        for turn in range(rounds):
            # Different bytes each time, or nothing would be sent.
            source[:total:4096] = turn + 1
            keys = [f"{size}.{turn}.{i}" for i in range(count)]
            outs = [source.ctypes.data + i * size for i in range(count)]
            ins = [target.ctypes.data + i * size for i in range(count)]
            start = time.perf_counter()
            codes = store.batch_put_from(keys, outs, [size] * count)
            puts.append(total / (time.perf_counter() - start))
            assert not any(codes), codes
            target[:] = 0
            start = time.perf_counter()
            got = store.batch_get_into(keys, ins, [size] * count)
            gets.append(total / (time.perf_counter() - start))
            assert got == [size] * count, got
            assert np.array_equal(source[:total], target[:total])
            for key in keys[:16]:
                start = time.perf_counter()
                assert store.get_into(key, target.ctypes.data, size) == size
                singles.append(time.perf_counter() - start)
            for key in keys:
                store.remove(key)
        answer = dict(
            put=statistics.median(puts) / 1e9,
            get=statistics.median(gets) / 1e9,
            one_us=statistics.median(singles) * 1e6,
        )
        print(json.dumps(answer), flush=True)
    store.close()


def lend(master: str, metadata: str) -> None:
    store = client(master, metadata, LENT)
    print("ready", flush=True)
    sys.stdin.read()
    store.close()


def child(*arguments: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def mooncake():
    """Mooncake's master with its metadata server, and a process that lends memory:
    yields the addresses."""
    rpc, http, metrics = free_port(), free_port(), free_port()
    master = child(
        "-c",
        "from mooncake.cli import main; main()",
        f"--rpc_port={rpc}",
        "--enable_http_metadata_server=true",
        "--http_metadata_server_host=127.0.0.1",
        f"--http_metadata_server_port={http}",
        f"--metrics_port={metrics}",
    )
    addresses = f"127.0.0.1:{rpc}", f"http://127.0.0.1:{http}/metadata"
    lender = None
    try:
        until = time.monotonic() + 60
        for port in (rpc, http):
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert time.monotonic() < until, "Mooncake's master did not start"
                    time.sleep(0.1)
        lender = child(__file__, "--lend", *addresses)
        while "ready" not in (line := lender.stdout.readline()):
            assert line, "nobody lends memory"
        yield addresses
    finally:
        for process in (lender, master):
            if process is not None:
                process.terminate()
                process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--lend", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(*options.measure, options.rounds)
    if options.lend:
        return lend(*options.lend)
    rows = []
    with (
        larderd("--dram.capacity=3GiB", "--dram.slab=256MiB") as path,
        mooncake() as addresses,
    ):
        rounds = ["--rounds", str(options.rounds)]
        theirs = child(__file__, "--measure", *addresses, *rounds)
        ours = child(__file__, "--measure", "larder", path, *rounds)
        print("GB/s put, get; us for one get".rjust(44))
        for size in SIZES:
            for name, process in (("mooncake tcp", theirs), ("larder", ours)):
                print(size, file=process.stdin, flush=True)
                line = process.stdout.readline()
                while line and not line.startswith("{"):  # what libraries print
                    line = process.stdout.readline()
                row = dict(store=name, size=size) | json.loads(line)
                rows.append(row)
                print(
                    f"{size >> 10:6} KiB  {name:13} {row['put']:6.2f} {row['get']:6.2f}"
                    f" {row['one_us']:9.1f}",
                    flush=True,
                )
        for process in (theirs, ours):
            process.stdin.close()
            process.wait(60)
    if options.json:
        about = dict(
            mooncake=importlib.metadata.version("mooncake-transfer-engine-non-cuda"),
            rows=rows,
        )
        pathlib.Path(options.json).write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()

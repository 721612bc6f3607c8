"""Put and get through Mooncake's calls: Mooncake's own store over TCP (its master,
a process that lends memory, and a client), and Larder in its place.

Batches of `batch_put_from` and `batch_get_into` on registered memory for the
throughput, single `put_from` and `get_into` for the latency. Every byte got is
compared. One run: a round of one store, a round of the other, in turns.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time

from bench_daemon import SIZES, Rows, larderd

BATCH_BYTES = 128 << 20
SINGLES = 40  # in a round
LENT = 3 << 30


def batch_of(size: int) -> int:
    return min(BATCH_BYTES // size, 256)


def client(master: str, metadata: str, lent: int):
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    code = store.setup("127.0.0.1", metadata, lent, 256 << 20, "tcp", "", master)
    assert code == 0, f"setup: {code}"
    return store


def measure(master: str, metadata: str) -> None:
    """In a process of its own: a line "SIZE ROUND" comes in for each round, a line
    of JSON goes out. With `master` "larder", Larder at the socket `metadata` takes
    the store's place."""
    import numpy as np

    if master == "larder":
        import larder.mooncake

        larder.mooncake.install(metadata)
    store = client(master, metadata, 0)
    source = np.random.default_rng(1).integers(0, 256, BATCH_BYTES, dtype=np.uint8)
    target = np.zeros(BATCH_BYTES, np.uint8)
    for memory in (source, target):
        store.register_buffer(memory.ctypes.data, memory.nbytes)

    def timed(call, *arguments):
        start = time.perf_counter()
        answer = call(*arguments)
        return answer, time.perf_counter() - start

    for line in sys.stdin:
        size, turn = map(int, line.split())
        count = batch_of(size)
        total = count * size
        # Different bytes each time.
        source[:total:4096] = turn + 1
        keys = [f"{size}.{turn}.{i}" for i in range(count)]
        outs = [source.ctypes.data + i * size for i in range(count)]
        ins = [target.ctypes.data + i * size for i in range(count)]
        codes, put = timed(store.batch_put_from, keys, outs, [size] * count)
        assert not any(codes), codes
        target[:] = 0
        got, get = timed(store.batch_get_into, keys, ins, [size] * count)
        assert got == [size] * count, got
        assert np.array_equal(source[:total], target[:total])
        puts, gets = [], []
        for i in range(SINGLES):
            one = f"{size}.{turn}.one.{i}"
            code, seconds = timed(store.put_from, one, outs[i % count], size)
            assert code == 0, code
            puts.append(seconds)
            store.remove(one)
        for i in range(SINGLES):
            got, seconds = timed(store.get_into, keys[i % count], ins[0], size)
            assert got == size, got
            gets.append(seconds)
            assert np.array_equal(target[:size], source[i % count * size :][:size])
        for key in keys:
            store.remove(key)
        answer = dict(put=[put], get=[get], put_one=puts, get_one=gets)
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


def ask(process: subprocess.Popen, size: int, turn: int) -> dict:
    """One round of what `measure` does there."""
    print(size, turn, file=process.stdin, flush=True)
    while not (line := process.stdout.readline()).startswith("{"):
        assert line, "a store's process ended"  # else: what libraries print
    return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--lend", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(*options.measure)
    if options.lend:
        return lend(*options.lend)
    rows = Rows()
    with (
        larderd("--dram.capacity=3GiB", "--dram.slab=256MiB") as path,
        mooncake() as addresses,
    ):
        stores = {
            "theirs": child(__file__, "--measure", *addresses),
            "ours": child(__file__, "--measure", "larder", path),
        }
        for size in SIZES:
            rounds: dict[str, list[dict]] = {name: [] for name in stores}
            # One more: the first touches memory and is not counted.
            for turn in range(options.rounds + 1):
                for name in list(stores)[:: 1 if turn % 2 else -1]:
                    rounds[name].append(ask(stores[name], size, turn))
            rows.add_puts_and_gets(
                "engines.mooncake",
                size,
                batch_of(size) * size,
                rounds["theirs"][1:],
                rounds["ours"][1:],
            )
        for process in stores.values():
            process.stdin.close()
            process.wait(60)
    rows.write(
        options.json,
        mooncake=importlib.metadata.version("mooncake-transfer-engine-non-cuda"),
        rounds=options.rounds,
    )


if __name__ == "__main__":
    main()

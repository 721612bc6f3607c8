"""What Python adds to a call: the same batch calls from C++ and from Python, in
turns, against one daemon. Medians of 300 calls each, the median of the
differences of seven turns."""

import argparse
import statistics
import subprocess
import time

import numpy as np

import larder
from bench_daemon import BIN, Rows, larderd

KEYS, VALUE, IDS, CALLS, TURNS = 32, 4096, 512, 300, 7
CALLS_OF = {
    "put": "32 values of 4 KiB that are there already",
    "get": "32 values of 4 KiB",
    "lookup": "512 ids, cached answers",
}


def median_ns(call) -> float:
    times = []
    for _ in range(CALLS):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    rows = Rows()
    with larderd("--dram.capacity=512MiB", "--dram.slab=64MiB") as socket:
        client = larder.Client(socket, deadline=10)
        values = larder.Values(
            client,
            model="overhead",
            weights=bytes([1]) + bytes(31),
            cache_dtype="u8",
            value_bytes_max=VALUE,
            engine_layout="overhead",
            hash_scheme="overhead",
        )
        names = [i.to_bytes(4, "little") + bytes(28) for i in range(IDS)]
        keys = names[:KEYS]
        memory = np.zeros((KEYS, VALUE), np.uint8)
        # As adapters hand them over.
        pieces = [(memory.ctypes.data + i * VALUE, VALUE) for i in range(KEYS)]
        ids = values.ids_from_hashes(names)
        ours = {
            "put": lambda: values.put(keys, pieces),
            "get": lambda: values.get(keys, pieces),
            "lookup": lambda: values.lookup_cached(ids),
        }
        cpp = subprocess.Popen(
            [BIN / "larder_bench_calls", socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        def theirs(name: str) -> float:
            print(name, file=cpp.stdin, flush=True)
            return float(cpp.stdout.readline())

        for name, what in CALLS_OF.items():
            ours[name]()
            pairs = [(theirs(name), median_ns(ours[name])) for _ in range(TURNS)]
            more = statistics.median(b - a for a, b in pairs) / 1e3
            rows.add(
                f"engines.python.{name}",
                10.0,
                more,
                "us",
                "<= 1",
                what=what,
                cpp_us=statistics.median(a for a, _ in pairs) / 1e3,
            )
        cpp.stdin.close()
        cpp.wait(60)
    rows.write(options.json)


if __name__ == "__main__":
    main()

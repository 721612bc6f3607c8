"""What Python adds to a batch call of the client library.

C++ and Python make the same calls in turns, a short block each, against one
daemon; a row is the median of the differences of the pairs, with its interval. Both
ends are pinned: the caller, C++ or Python, to one CPU, the daemon to another. On
each a process of the lowest priority (SCHED_IDLE) spins, or waking a CPU that went
to sleep between two messages would cost more than what is measured.
"""

import argparse
import os
import subprocess
import sys
import time

import numpy as np

import larder
from bench_daemon import BIN, Rows, awake, larderd, median, median_interval

KEYS, VALUE, IDS = 32, 4096, 512
BLOCKS, CALLS, WARM_UP = 200, 20, 2
CALLS_OF = {
    "put": "32 values of 4 KiB that are there already",
    "get": "32 values of 4 KiB",
    "lookup": "512 ids, cached answers",
}


def median_ns(call, calls: int) -> float:
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="pairs of them")
    parser.add_argument("--calls", type=int, default=CALLS, help="in a block")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    rows = Rows()
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        sys.exit("overhead: needs two CPUs")
    mine, daemons = cpus[:2]
    # Before anything starts a thread or a process: they inherit it.
    os.sched_setaffinity(0, {mine})
    with (
        awake(mine, daemons),
        larderd("--dram.capacity=512MiB", "--dram.slab=64MiB", cpu=daemons) as socket,
    ):
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

        def in_cpp(name: str) -> float:
            print(name, options.calls, file=cpp.stdin, flush=True)
            return float(cpp.stdout.readline())

        def in_python(name: str) -> float:
            return median_ns(ours[name], options.calls)

        for name, what in CALLS_OF.items():
            theirs, here = [], []
            turns = [(in_cpp, theirs), (in_python, here)]
            for measured, _ in turns:  # what the first block pays for
                measured(name)
            for number in range(options.blocks):
                for measured, times in turns if number % 2 else turns[::-1]:
                    times.append(measured(name) / 1e3)
            more = [b - a for a, b in zip(theirs, here)]
            rows.add(
                f"engines.python.{name}",
                10.0,
                median(more),
                "us",
                "<= 1",
                interval=median_interval(more),
                what=what,
                cpp_us=median(theirs),
                python_us=median(here),
                blocks=options.blocks,
                calls=options.calls,
                cpus=[mine, daemons],
            )
        cpp.stdin.close()
        cpp.wait(60)
    rows.write(options.json)


if __name__ == "__main__":
    main()

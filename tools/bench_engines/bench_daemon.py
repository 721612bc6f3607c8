"""What benchmarks share: a larderd of their own, and rows of figures."""

import contextlib
import json
import math
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = ROOT / "build" / "release" / "bin"
# Of objects, from a small chunk to a large one.
SIZES = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 32 << 20]
# Ends with its parent, whatever becomes of that.
SPIN = """
import os, sys
parent = os.getppid()
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == parent:
    for _ in range(100000):
        pass
"""


@contextlib.contextmanager
def awake(*cpus: int):
    """Keeps CPUs from sleeping; whatever else wants them takes them at once."""
    spinners = [
        subprocess.Popen([sys.executable, "-c", SPIN, str(cpu)]) for cpu in cpus
    ]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def short(size: int) -> str:
    """64k, 1m: what rows are called."""
    return f"{size >> 20}m" if size >= 1 << 20 else f"{size >> 10}k"


class Daemon:
    """A running larderd, on `cpu` alone if that is given; with an NVMe tier in the
    folder `nvme`, which it makes."""

    def __init__(
        self, *flags: str, nvme: pathlib.Path | None = None, cpu: int | None = None
    ):
        # Not beside the NVMe tier: a Unix socket's path is at most 107 bytes long.
        self._run = tempfile.TemporaryDirectory(prefix="larder-bench-")
        self.socket = f"{self._run.name}/engine.sock"
        self._admin = f"{self._run.name}/admin.sock"
        self._cpu = cpu
        self._flags = list(flags)
        if nvme is not None:
            nvme.mkdir(mode=0o700, parents=True)
            self._flags += [
                f"--nvme.path={nvme}",
                "--nvme.capacity=8GiB",
                "--nvme.segment_file=256MiB",
            ]
        self.start()

    def start(self) -> None:
        cpu = self._cpu
        self._process = subprocess.Popen(
            [
                BIN / "larderd",
                f"--server.socket={self.socket}",
                f"--admin.socket={self._admin}",
                *self._flags,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=None if cpu is None else lambda: os.sched_setaffinity(0, {cpu}),
        )
        status = [BIN / "larder", "--socket", self._admin, "status"]
        until = time.monotonic() + 60
        while subprocess.run(status, capture_output=True).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError("larderd did not start")
            time.sleep(0.05)

    def everything_to_nvme(self) -> None:
        """Waits until all is durable; afterwards none of it is in memory."""
        import larder

        with larder.Client(self.socket) as client:
            while client.usage()["durable_backlog"] != 0:
                time.sleep(0.01)
        self.end()
        self.start()

    def end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)

    def close(self) -> None:
        self.end()
        self._run.cleanup()


@contextlib.contextmanager
def larderd(*flags: str, cpu: int | None = None):
    """Yields the socket of a running daemon."""
    daemon = Daemon(*flags, cpu=cpu)
    try:
        yield daemon.socket
    finally:
        daemon.close()


class Rows:
    """Figures with what they are measured against."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, name: str, limit: float, ours: float, unit: str, goal: str, **more):
        row = dict(
            row=name, limit=limit, ours=ours, ratio=ours / limit, unit=unit, goal=goal
        )
        self.rows.append(row | more)
        interval = more.get("interval")
        print(
            f"{name:34} {limit:10.4g} {ours:10.4g} {unit:4} {ours / limit:8.3f}  {goal:8}"
            + (f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""),
            flush=True,
        )

    def add_puts_and_gets(
        self, prefix: str, size: int, batch: int, theirs: list[dict], ours: list[dict]
    ) -> None:
        """Of rounds that say their seconds: `put` and `get` of `batch` bytes become
        GB/s, the larger the better; `put_one` and `get_one` us, the smaller."""
        for what in ("put", "get", "put_one", "get_one"):
            both = [
                [seconds for each in rounds for seconds in each[what]]
                for rounds in (theirs, ours)
            ]
            name = f"{prefix}.{what}"
            if what in ("put", "get"):
                speeds = [batch / median(seconds) / 1e9 for seconds in both]
                self.add(f"{name}.{short(size)}", *speeds, "GB/s", ">= 1", seconds=both)
                continue
            for suffix, share in (("", 0.5), ("_p99", 0.99)):
                times = [percentile(seconds, share) * 1e6 for seconds in both]
                self.add(f"{name}{suffix}.{short(size)}", *times, "us", "<= 1",
                         samples=len(both[0]))  # fmt: skip

    def write(self, file: str | None, **about) -> None:
        if file:
            text = json.dumps(about | {"rows": self.rows}, indent=1)
            pathlib.Path(file).write_text(text + "\n")


def median(values: list[float]) -> float:
    return statistics.median(values)


def median_interval(values: list[float]) -> tuple[float, float]:
    """Where the median lies in 95 of 100 such samples, by its order statistics:
    nothing is assumed of the distribution. All there is, of fewer than six."""
    ordered, count = sorted(values), len(values)
    first = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))
    return ordered[first], ordered[count - 1 - first]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]

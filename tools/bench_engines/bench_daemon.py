"""A larderd for benchmarks, in a folder of its own, and rows of figures."""

import contextlib
import json
import math
import os
import pathlib
import signal
import statistics
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = ROOT / "build" / "release" / "bin"
# Of objects, from a small chunk to a large one.
SIZES = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 32 << 20]


def short(size: int) -> str:
    """64k, 1m: what rows are called."""
    return f"{size >> 20}m" if size >= 1 << 20 else f"{size >> 10}k"


@contextlib.contextmanager
def larderd(*flags: str, cpu: int | None = None):
    """Yields the socket of a running daemon, on `cpu` alone if that is given. With
    `--nvme.path=`... in flags it has an NVMe tier; its folder goes at the end."""
    with tempfile.TemporaryDirectory(prefix="larder-bench-") as folder:
        socket = f"{folder}/engine.sock"
        admin = f"{folder}/admin.sock"
        nvme = pathlib.Path(folder, "nvme")
        nvme.mkdir(mode=0o700)
        process = subprocess.Popen(
            [BIN / "larderd", f"--server.socket={socket}", f"--admin.socket={admin}"]
            + [flag.replace("{nvme}", str(nvme)) for flag in flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=None if cpu is None else lambda: os.sched_setaffinity(0, {cpu}),
        )
        try:
            status = [BIN / "larder", "--socket", admin, "status"]
            until = time.monotonic() + 60
            while subprocess.run(status, capture_output=True).returncode != 0:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError("larderd did not start")
                time.sleep(0.05)
            yield socket
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


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

"""A larderd for benchmarks, in a folder of its own, and rows of figures."""

import contextlib
import json
import pathlib
import signal
import statistics
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = ROOT / "build" / "release" / "bin"


@contextlib.contextmanager
def larderd(*flags: str):
    """Yields the socket of a running daemon. With `--nvme.path=`... in flags it has
    an NVMe tier; its folder goes at the end."""
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
        print(
            f"{name:32} {limit:12.4g} {ours:12.4g} {unit:4} {ours / limit:8.3f}  {goal}",
            flush=True,
        )

    def write(self, file: str | None, **about) -> None:
        if file:
            text = json.dumps(about | {"rows": self.rows}, indent=1)
            pathlib.Path(file).write_text(text + "\n")


def median(values: list[float]) -> float:
    return statistics.median(values)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]

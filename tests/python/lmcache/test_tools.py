"""LMCache's own tools and its MP server, with the adapter on their command line."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest
from l2 import spec
from patience import until
from test_l2 import everything_durable

LMCACHE = pathlib.Path(sys.executable).with_name("lmcache")


def lmcache(*arguments, **options):
    return subprocess.run(
        [LMCACHE, *arguments], text=True, timeout=180, capture_output=True, **options
    )


@pytest.mark.parametrize("kib, keys, in_flight", [(64, 32, 4), (1024, 16, 2)])
def test_bench_l2_with_its_verification(shared_daemon, tmp_path, kib, keys, in_flight):
    out = tmp_path / "out.json"
    done = lmcache(
        "bench", "l2", "--l2-adapter", spec(shared_daemon.socket, weights=f"{kib}@1"),
        "--num-keys", str(keys), "--in-flight", str(in_flight),
        "--data-size-kb", str(kib), "--rounds", "3", "--lookup-max-hit-rate", "1",
        "--no-skip-verify", "--format", "json", "--output", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"All {keys * in_flight} keys data verified OK" in done.stdout
    metrics = json.loads(out.read_text())["metrics"]
    for number, operation in enumerate(("Store", "Lookup", "Load")):
        told = metrics[f"op_{number}"]
        assert told["operation"] == operation
        assert told["rounds_timed_out"] == 0
        assert told["total_success"] == told["total_keys"] == 3 * keys * in_flight


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`lmcache server` with the adapter, and `lmcache bench server` against it."""

    def __init__(self, line, folder):
        self.rpc, self.http = free_port(), free_port()
        self.log = folder / f"server-{self.rpc}.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [LMCACHE, "server", "--host", "localhost", "--port", str(self.rpc),
                 "--http-host", "127.0.0.1", "--http-port", str(self.http),
                 "--l1-size-gb", "0.5", "--eviction-policy", "LRU",
                 "--supported-transfer-mode", "auto", "--disable-observability",
                 "--l2-adapter", line],
                stdout=log, stderr=log, env={**os.environ, "LMCACHE_LOG_LEVEL": "INFO"},
            )  # fmt: skip
        until(self.serves, seconds=120)

    def serves(self):
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.http)) == 0

    def bench(self, requests):
        done = lmcache(
            "bench", "server", "--mode", "cpu", "--num-tokens", "512",
            "--rpc-url", f"tcp://localhost:{self.rpc}",
            "--url", f"http://127.0.0.1:{self.http}",
            "--kvcache-shape-spec", "(2,64,16,8,64):float16:4", "--num-blocks", "64",
            "--start", "0", "--end", str(requests), "--interval", "0",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kill(self):
        self.process.kill()
        self.process.wait(30)


def test_the_mp_server_finds_what_another_stored(daemon, tmp_path):
    """Server and daemon die by SIGKILL; new ones serve every chunk from L2."""
    first = Server(spec(daemon.socket), tmp_path)
    try:
        told = first.bench(4)
        assert told.count("cold] LOOKUP: 0/2 chunks hit") == 4
        assert told.count("CHECKSUM MATCH OK") == 4, told
        checksums = re.findall(r"warm\] CHECKSUM: (\w+) \(2 chunks\)", told)
        everything_durable(daemon)
    finally:
        first.kill()
    daemon.kill()
    daemon.start()
    second = Server(spec(daemon.socket), tmp_path)
    try:
        told = second.bench(4)
        assert told.count("cold] LOOKUP: 2/2 chunks hit") == 4, told
        # Once for each of a request's two lookups.
        assert second.log.read_text().count("(0 L1, 2 L2)") == 8
        assert re.findall(r"warm\] CHECKSUM: (\w+) \(2 chunks\)", told) == checksums
    finally:
        second.kill()


def test_the_mp_server_works_without_a_daemon(make_daemon, tmp_path):
    daemon = make_daemon()
    daemon.end(signal.SIGTERM)
    server = Server(spec(daemon.socket), tmp_path)
    try:
        assert server.bench(2).count("CHECKSUM MATCH OK") == 2
    finally:
        server.kill()

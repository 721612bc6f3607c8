"""A real vLLM server on the CPU, and questions to it."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "client" / "python" / "docs" / "vllm.md"
STARTS_WITHIN = 600  # seconds; a watchdog, not a measure


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def documented_flag(socket: str, connector: dict | None = None, **extra) -> list[str]:
    """The documented line, to the letter but for the socket's path."""
    line = re.search(r"--kv-transfer-config '(\{.*?\})'\n", DOCUMENT.read_text(), re.S)
    config = json.loads(line.group(1)) | (connector or {})
    # Deadlines for a busy machine: what is tested is what comes, not how fast.
    patient = {"lookup_deadline": 30, "load_deadline": 60, "save_deadline": 30}
    config["kv_connector_extra_config"] |= {"socket": socket} | patient | extra
    return ["--kv-transfer-config", json.dumps(config)]


class Server:
    """`vllm serve MODEL ARGUMENTS`, up when the constructor returns.

    On one thread unless told otherwise: what several add up differs from run to
    run, by vLLM itself.
    """

    def __init__(
        self,
        model: pathlib.Path,
        log: pathlib.Path,
        *arguments: str,
        threads: str | None = "0",
    ):
        self.port = free_port()
        self.log = log
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            # For /reset_prefix_cache.
            "VLLM_SERVER_DEV_MODE": "1",
            # For connectors of the tests' own.
            "PYTHONPATH": str(pathlib.Path(__file__).resolve().parent),
        }
        if threads is not None:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = threads
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                # vllm-cpu's own `vllm serve` asks for the metadata of `vllm`.
                [
                    sys.executable,
                    "-m",
                    "vllm.entrypoints.openai.api_server",
                    f"--model={model}",
                    "--served-model-name=m",
                    f"--port={self.port}",
                    "--enforce-eager",
                    "--max-model-len=4096",
                    *arguments,
                ],
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        until = time.monotonic() + STARTS_WITHIN
        while not self._healthy():
            assert self.process.poll() is None, self.tail()
            assert time.monotonic() < until, self.tail()
            time.sleep(0.2)

    def _healthy(self) -> bool:
        try:
            self._get("/health")
            return True
        except OSError:
            return False

    def _get(self, path: str) -> bytes:
        url = f"http://127.0.0.1:{self.port}{path}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]

    def post(self, path: str, body: dict):
        """The open answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=600)

    def forget(self) -> None:
        """Empties vLLM's own prefix cache."""
        self.post("/reset_prefix_cache", {}).close()

    def complete(self, prompt: list[int], tokens: int = 16, **more) -> "Answer":
        """Greedy; streamed, so that the first token's time is known."""
        body = {
            "model": "m",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
        } | more
        started = time.monotonic()
        answer = Answer()
        with self.post("/v1/completions", body) as stream:
            for line in stream:
                if not line.startswith(b"data: {"):
                    continue
                if answer.first is None:
                    answer.first = time.monotonic() - started
                choice = json.loads(line[6:])["choices"][0]
                answer.text += choice["text"]
                answer.tokens += choice.get("token_ids") or []
        return answer

    def metric(self, name: str) -> float:
        """The sum of a Prometheus counter."""
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in self._get("/metrics").decode().splitlines()
            if line.startswith(name + "{") or line.startswith(name + " ")
        )

    def external_hits(self) -> float:
        return self.metric("vllm:external_prefix_cache_hits_total")

    def stop(self, number: int = signal.SIGTERM) -> None:
        # Workers are processes of their own, and may outlive a killed server.
        family = descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(60)
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def descendants(pid: int) -> list[int]:
    """All processes below `pid`."""
    children: dict[int, list[int]] = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(after_name[1]), []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


class Answer:
    """What came back; `first`: seconds to the first token."""

    def __init__(self):
        self.first: float | None = None
        self.text = ""
        self.tokens: list[int] = []

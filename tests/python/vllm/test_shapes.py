"""vLLM's own server with shapes that the small model of test_serving.py has not: two
ranks, layers with windows, pictures; and with less memory than is asked of it.

The models are tiny and random; what they say is checked by tiny.behind()."""

import base64
import http.client
import io
import json
import pathlib
import signal
import sys
import threading
import time

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from conftest import Daemon  # noqa: E402

import tiny  # noqa: E402
from serving import Server, documented_flag  # noqa: E402

BLOCK, CHUNK = 32, 128
PATIENCE = 120


@pytest.fixture(scope="module")
def daemon():
    made = Daemon()
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture
def serve(daemon, tmp_path):
    servers = []

    def start(model, *arguments, threads="0", connector=None, **extra):
        flags = documented_flag(daemon.socket, connector, chunk_tokens=CHUNK, **extra)
        log = tmp_path / f"vllm{len(servers)}.log"
        more = ["--dtype=float32", f"--block-size={BLOCK}", "--max-model-len=1536"]
        servers.append(Server(model, log, *flags, *more, *arguments, threads=threads))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


class Asking:
    """Questions to one server; each answer is checked, and its hits counted."""

    def __init__(self, server: Server, model: pathlib.Path):
        self.server = server
        self.model = model
        self.before = server.external_hits()

    def hits(self) -> int:
        """Since the last call."""
        now = self.server.external_hits()
        new, self.before = now - self.before, now
        return int(new)

    def ask(self, tokens: list[int], count: int = 8) -> int:
        """How many tokens came from Larder."""
        said = self.server.complete(tokens, count, ignore_eos=True).tokens
        assert len(said) == count
        assert tiny.behind(self.model, tokens, said) < tiny.TIE
        return self.hits()

    def at_once(self, prompts, count, meanwhile=lambda: None) -> None:
        """All of them together, and as many that hang up at once."""
        wrong: list[object] = []

        def one(tokens: list[int]) -> None:
            try:
                said = self.server.complete(tokens, count, ignore_eos=True).tokens
                behind = tiny.behind(self.model, tokens, said)
                if len(said) != count or behind > tiny.TIE:
                    wrong.append((prompts.index(tokens), behind, said))
            except Exception as error:  # noqa: BLE001: for the main thread
                wrong.append(error)

        def hang_up(tokens: list[int]) -> None:
            body = {"model": "m", "prompt": tokens, "max_tokens": count,
                    "ignore_eos": True, "stream": True}
            line = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=600)
            line.request("POST", "/v1/completions", json.dumps(body),
                         {"Content-Type": "application/json"})
            line.close()

        threads = [
            threading.Thread(target=what, args=(tokens,))
            for tokens in prompts
            for what in (one, hang_up)
        ]
        for thread in threads:
            thread.start()
        try:
            meanwhile()
        finally:
            for thread in threads:
                thread.join()
        assert not wrong, wrong
        self.nothing_is_held()

    def nothing_is_held(self) -> None:
        """No request is left, nor a block that none has."""
        until = time.monotonic() + PATIENCE
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        while any(left := [self.server.metric(f"vllm:{name}") for name in names]):
            assert time.monotonic() < until, left
            time.sleep(0.1)


def shared(count: int) -> list[list[int]]:
    """Prompts of which each three begin alike."""
    return [
        tiny.prompt(100 + i % (count // 3), 400) + tiny.prompt(200 + i, 60)
        for i in range(count)
    ]


def test_two_ranks(serve, daemon, tmp_path):
    model, deaf = tiny.llama(tmp_path / "model"), tmp_path / "deaf"
    ranks = dict(threads="0|1", deaf=str(deaf), connector={
        "kv_connector": "DeafConnector", "kv_connector_module_path": "deaf"})
    whole, half = tiny.prompt(1, 1000), tiny.prompt(2, 600)

    first = serve(model, "--tensor-parallel-size=2", **ranks)
    asking = Asking(first, model)
    assert asking.ask(whole) == 0
    deaf.touch()  # from here on the second rank saves nothing
    assert asking.ask(half) == 0
    first.forget()
    # Each rank's piece is a chunk's, but there is no chunk until both are there.
    assert asking.ask(half) == 0
    assert asking.ask(whole) >= 1000 - BLOCK
    first.stop(signal.SIGKILL)

    deaf.unlink()
    second = serve(model, "--tensor-parallel-size=2", **ranks)
    asking = Asking(second, model)
    assert asking.ask(whole) >= 1000 - BLOCK
    assert asking.ask(half) == 0
    second.forget()
    assert asking.ask(half) >= 600 - BLOCK
    # The same model on one rank is another space.
    spaces = json.loads(daemon.larder("spaces", "--json"))["spaces"]
    assert len(spaces) == 1
    asking.nothing_is_held()


def test_windows(serve, daemon, tmp_path):
    """vLLM's hybrid KV cache manager is on by itself: the connector supports it."""
    model = tiny.llama(tmp_path / "model", window=64)
    # Prompts come in pieces, so that blocks leave the window while more are computed.
    pieces = "--max-num-batched-tokens=256"
    long, prompts = tiny.prompt(3, 1200), shared(12)

    first = serve(model, pieces)
    asking = Asking(first, model)
    assert asking.ask(long, 40) == 0
    for tokens in prompts:
        asking.ask(tokens)
    first.stop(signal.SIGKILL)

    # Little more than one request needs: they preempt each other.
    second = serve(model, pieces, "--num-gpu-blocks-override=90")
    assert "Turning off hybrid kv cache manager" not in second.log.read_text()
    asking = Asking(second, model)
    assert asking.ask(long, 40) >= 1200 - BLOCK
    second.forget()
    # What was generated is there, too, in whole chunks.
    again = long + tiny.prompt(4, 200)
    assert asking.ask(again) >= 1200 - CHUNK
    for _ in range(2):
        second.forget()
        asking.at_once(prompts, 100)
    assert asking.hits() >= 12 * 200
    assert second.metric("vllm:num_preemptions_total") > 0

    def die_under_loads():
        until = time.monotonic() + PATIENCE
        while not asking.hits():
            assert time.monotonic() < until
            time.sleep(0.01)
        daemon.kill()

    second.forget()
    asking.at_once(prompts, 60, die_under_loads)
    daemon.start()


def picture(seed: int) -> str:
    """Noise, as the address of a picture."""
    drawn = torch.Generator().manual_seed(seed)
    shape = (tiny.SIDE, tiny.SIDE, 3)
    pixels = torch.randint(0, 256, shape, generator=drawn, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_pictures(serve, tmp_path):
    """Through vLLM's own processing of pictures, and a vision tower."""
    model = tiny.llava(tmp_path / "model")
    arguments = ["--model-impl=transformers", '--limit-mm-per-prompt={"image": 3}']
    a, b = tiny.prompt(5, 100), tiny.prompt(6, 150)
    # Text, or the seed of a picture (64 tokens). 100 + 64 cross a chunk's border.
    one, other = [a, 1, b], [a, 3, b]
    two, swapped = [a, 1, b, 2], [a, 2, b, 1]

    def ask(asking, parts):
        content = [
            {"type": "image_url", "image_url": {"url": picture(part)}}
            if isinstance(part, int)
            else {"type": "text", "text": " ".join(f"w{token}" for token in part)}
            for part in parts
        ]
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 8,
            "temperature": 0,
            "return_token_ids": True,
        }
        with asking.server.post("/v1/chat/completions", body) as answer:
            said = json.load(answer)
        size = sum(64 if isinstance(part, int) else len(part) for part in parts)
        assert len(said["prompt_token_ids"]) == size
        return said["choices"][0]["token_ids"], asking.hits()

    first = serve(model, *arguments)
    asking = Asking(first, model)
    told = {}
    for name, parts in {"one": one, "two": two, "swapped": swapped}.items():
        first.forget()
        told[name], hits = ask(asking, parts)
        # `two` begins as `one` does; `swapped` has another picture in its first chunk.
        assert hits == (314 // BLOCK * BLOCK if name == "two" else 0), name
    assert told["two"] != told["swapped"]
    first.forget()
    assert ask(asking, two) == (told["two"], 378 // BLOCK * BLOCK)
    prompts = shared(12)
    for tokens in prompts:
        asking.ask(tokens)
    first.stop(signal.SIGKILL)

    second = serve(model, *arguments, "--num-gpu-blocks-override=90", load="layerwise")
    asking = Asking(second, model)
    assert ask(asking, one) == (told["one"], 314 // BLOCK * BLOCK)
    told["other"], hits = ask(asking, other)
    assert hits == 0 and told["other"] != told["one"]
    for name, parts in {"two": two, "swapped": swapped}.items():
        second.forget()
        assert ask(asking, parts) == (told[name], 378 // BLOCK * BLOCK), name
    for _ in range(2):
        second.forget()
        asking.at_once(prompts, 100)
    assert asking.hits() >= 12 * 200
    assert second.metric("vllm:num_preemptions_total") > 0

"""vLLM's own HTTP server with LarderConnector, on the CPU, with a real model.

One server after the other, since each takes the machine: the tests of this file
run in order and share what the daemon keeps."""

import json
import os
import pathlib
import shutil
import signal
import sys
import threading

import pytest
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import checkpoint  # noqa: E402
from conftest import running  # noqa: E402

from serving import ROOT, Server, documented_flag  # noqa: E402

DEPS = pathlib.Path(os.environ.get("LARDER_DEPS_DIR") or ROOT / ".deps")


def prompt(seed: int, count: int) -> list[int]:
    """Tokens without meaning, and without anything in common."""
    return [(seed * 7919 + i * 104729) % 40000 + 1000 for i in range(count)]


@pytest.fixture(scope="module")
def questions(model):
    """Of real prose: its answers are no near ties. The last one shares a prefix."""
    text = (ROOT / "tools" / "llama_demo" / "prose.txt").read_text()
    tokens = transformers.AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    assert len(tokens) > 3200
    return [tokens[:2000], tokens[2000:2700], tokens[:1000] + tokens[3000:3200]]


@pytest.fixture(scope="module")
def model():
    return checkpoint.ensure(DEPS)


@pytest.fixture(scope="module")
def daemon():
    with running() as made:
        yield made


@pytest.fixture
def serve(daemon, tmp_path):
    servers = []

    def start(model, *arguments, **extra):
        flags = documented_flag(daemon.socket, **extra)
        log = tmp_path / f"vllm{len(servers)}.log"
        servers.append(Server(model, log, *flags, *arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def right(model, questions, tmp_path_factory):
    """What vLLM says by itself, computed afresh and from its own prefix cache."""
    server = Server(model, tmp_path_factory.mktemp("plain") / "log")
    try:
        afresh = [server.complete(question).tokens for question in questions]
        cached = [server.complete(question).tokens for question in questions]
    finally:
        server.stop()
    return afresh, cached


def test_a_second_server_hits_what_the_first_saved(serve, model, questions, right):
    afresh, cached = right
    first = serve(model)
    assert [first.complete(q).tokens for q in questions] == afresh
    first.stop(signal.SIGKILL)

    second = serve(model)
    before = 0.0
    for question, answer in zip(questions, cached):
        assert second.complete(question).tokens == answer
        hits = second.external_hits() - before
        before += hits
        if question is not questions[2]:  # its prefix is there already
            assert hits >= len(question) - 2 * 128


def test_a_daemon_killed_under_load_costs_its_chunks_only(
    serve, model, daemon, questions, right
):
    _, cached = right
    long = questions[0]
    server = serve(model)
    assert server.complete(long).tokens == cached[0]
    assert server.external_hits() >= 1800
    answers, wrong = [], []

    def ask(seed):
        try:
            answers.append(len(server.complete(prompt(seed, 600), 8).tokens))
        except Exception as error:  # noqa: BLE001: for the main thread
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(10, 16)]
    for thread in threads[:3]:
        thread.start()
    daemon.kill()
    for thread in threads[3:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and answers == [8] * 6
    # Its own prefix cache still has this one.
    assert server.complete(long).tokens == cached[0]
    daemon.start()
    # vLLM was not restarted; it finds the daemon again by itself.
    for seed in range(20, 40):
        server.complete(prompt(seed, 600), 8)
        if json.loads(daemon.larder("status", "--json"))["commits"]:
            break
    else:
        raise AssertionError("nothing is saved any more")
    server.stop()
    third = serve(model)
    assert third.complete(long).tokens == cached[0]
    assert third.external_hits() >= 1800


def test_another_space_is_refused_with_its_reason(
    serve, model, daemon, questions, tmp_path
):
    spaces = json.loads(daemon.larder("spaces", "--json"))["spaces"]
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(questions[0]))
    changed = tmp_path / "changed"
    shutil.copytree(model, changed)
    with open(changed / "model.safetensors", "r+b") as file:  # one bit of a weight
        file.seek(-2, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-2, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    for folder, arguments, field in (
        (model, ["--dtype=float32"], "cache_dtype"),
        (changed, [], "weights"),
    ):
        other = serve(folder, *arguments, save=False)
        other.complete(questions[0])
        assert other.external_hits() == 0
        other.stop()
        known = {space["id"] for space in spaces}
        spaces = json.loads(daemon.larder("spaces", "--json"))["spaces"]
        (new,) = [space["id"] for space in spaces if space["id"] not in known]
        why = daemon.larder("why-miss", "--space", new, "--tokens", str(tokens))
        assert field in why, why

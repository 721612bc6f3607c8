"""Both halves of the connector, driven by executor.py on CPU tensors."""

import hashlib
import importlib
import pathlib
import subprocess
import sys
import time
import types

import executor
import pytest
import torch
from executor import BLOCK, Executor, environment
from patience import until

import larder
import larder.trtllm

CHUNK = 4 * BLOCK
COUNTER = iter(range(1, 1000))


@pytest.fixture
def make(documented, shared_daemon):
    """Executors with the documented classes; weights of the test's own."""
    weights = hashlib.sha256(str(next(COUNTER)).encode()).hexdigest()

    def one(ranks=1, socket=None, weights=weights, **about):
        module = importlib.import_module(documented["connector_module"])
        with environment(
            socket=socket or shared_daemon.socket,
            weights=weights,
            chunk_tokens=CHUNK,
            lookup_deadline_ms=20000,
            load_deadline_ms=20000,
            save_deadline_ms=20000,
        ):
            return Executor(
                ranks,
                scheduler=getattr(module, documented["connector_scheduler_class"]),
                worker=getattr(module, documented["connector_worker_class"]),
                **about,
            )

    return one


def prompt(first, count):
    return list(range(first, first + count))


def eventually(run, wanted):
    """A chunk is visible a moment after its save."""
    until(lambda: run() == wanted)


def hit(one, tokens, **about):
    one.run(tokens, **about)
    return one.loaded


def test_a_second_instance_computes_less(make):
    tokens = prompt(100, 3 * CHUNK + 5)
    one = make()
    plain = one.run(tokens, generate=4)
    assert one.loaded == 0 and one.stream.synchronized > 0
    eventually(lambda: hit(one, tokens), 3 * CHUNK)
    other = make()
    assert other.run(tokens, generate=4) == plain and other.loaded == 3 * CHUNK
    # One that goes on; one that is a prefix; one that differs in the second chunk.
    assert hit(other, tokens[: 3 * CHUNK] + prompt(9000, 40)) == 3 * CHUNK
    assert hit(other, tokens[: 2 * CHUNK + 1]) == 2 * CHUNK
    assert hit(other, [*tokens[: CHUNK + 1], 7, *tokens[CHUNK + 2 :]]) == CHUNK
    assert hit(other, tokens[: CHUNK - 1]) == 0


def test_one_token_at_least_is_computed(make):
    tokens = prompt(200, 2 * CHUNK)
    one = make()
    one.run(tokens)
    eventually(lambda: hit(make(), tokens), 2 * CHUNK - BLOCK)


@pytest.mark.parametrize("on_device", [BLOCK, CHUNK, CHUNK + 2 * BLOCK, 3 * CHUNK])
def test_beside_what_the_device_has(make, on_device):
    tokens = prompt(300, 3 * CHUNK + 1)
    one = make()
    one.run(tokens)
    eventually(lambda: hit(make(), tokens), 3 * CHUNK)
    wanted = 3 * CHUNK - on_device
    assert hit(make(), tokens, on_device=on_device) == wanted
    assert hit(make(), tokens, on_device=5) == 0  # in the middle of a block


def test_prefill_in_pieces_and_generated_tokens(make):
    tokens = prompt(400, 2 * CHUNK + 3)
    one = make()
    made = one.run(tokens, generate=CHUNK, chunk=20)
    whole = tokens + made
    eventually(lambda: hit(make(), [*whole, 1, 2, 3]), 3 * CHUNK)
    assert hit(make(), [*whole, 1, 2, 3], chunk=7) == 3 * CHUNK


def test_salts_and_what_has_no_digest(make):
    tokens = prompt(500, CHUNK + 1)
    one = make()
    one.run(tokens, cache_salt="alice")
    eventually(lambda: hit(make(), tokens, cache_salt="alice"), CHUNK)
    assert hit(make(), tokens) == 0 and hit(make(), tokens, cache_salt="bob") == 0
    other = prompt(550, CHUNK + 1)
    one.run(other, lora_task_id=3)
    one.run(other, multimodal_hashes=[[1, 2]])
    time.sleep(0.2)
    assert hit(make(), other) == 0 and hit(make(), tokens, lora_task_id=3) == 0


def test_two_ranks_have_their_own_bytes(make):
    tokens = prompt(600, 2 * CHUNK + 1)
    pair = make(2)
    pair.run(tokens)
    eventually(lambda: hit(make(2), tokens), 2 * CHUNK)  # WrongKv if mixed up
    assert hit(make(1), tokens) == 0


def test_a_chunk_needs_every_rank(make):
    tokens = prompt(700, CHUNK + 1)
    pair = make(2)
    pair.workers[1].wait_for_save = lambda stream: None
    pair.run(tokens)
    time.sleep(0.2)
    assert hit(make(2), tokens) == 0
    again = make(2)
    again.run(tokens)  # what was missing is saved
    eventually(lambda: hit(make(2), tokens), CHUNK)


DIFFERENT = {
    "model": dict(model="other"),
    "weights": dict(weights="ef" * 32),
    "pool dtype": dict(dtype=torch.bfloat16),
    "cache dtype": dict(
        kv_cache_config=types.SimpleNamespace(tokens_per_block=BLOCK, dtype="fp8")
    ),
    "quantization": dict(quant_config="fp8"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_differs_is_a_miss(make, what):
    tokens = prompt(800, CHUNK + 1)
    one = make()
    one.run(tokens)
    eventually(lambda: hit(make(), tokens), CHUNK)
    assert hit(make(**DIFFERENT[what]), tokens) == 0


def test_blocks_out_of_a_window_are_not_saved(make):
    tokens = prompt(900, 2 * CHUNK + 1)
    one = make()
    one.run(tokens, window=1)
    time.sleep(0.2)
    assert hit(make(), tokens, on_device=CHUNK - BLOCK) == 0
    # The second chunk was: with the first, from another request, both are there.
    one.run(tokens[: CHUNK + 1])
    eventually(lambda: hit(one, tokens[: CHUNK + 1]), CHUNK)
    assert hit(one, tokens) == 2 * CHUNK


@pytest.mark.parametrize(
    "about",
    [
        dict(pipeline_parallel_size=2),
        dict(context_parallel_size=2),
        dict(enable_attention_dp=True),
        dict(model="/no/such/folder", weights=""),
    ],
)
def test_what_cannot_be_kept_is_computed(make, about):
    tokens = prompt(1000, CHUNK + 1)
    one = make(**about)
    assert one.run(tokens, generate=2) == make().run(tokens, generate=2)
    assert hit(one, tokens) == 0


def test_another_process(make, shared_daemon):
    tokens = prompt(1100, 2 * CHUNK + 1)
    one = make(weights="ba" * 32)
    made = one.run(tokens, generate=3)
    eventually(lambda: hit(make(weights="ba" * 32), tokens), 2 * CHUNK)
    program = f"""
import sys; sys.path.insert(0, {str(pathlib.Path(executor.__file__).parent)!r})
from executor import Executor, environment
with environment(socket={shared_daemon.socket!r}, weights="ba" * 32,
                 chunk_tokens={CHUNK}, lookup_deadline_ms=20000):
    one = Executor()
assert one.run({tokens!r}, generate=3) == {made!r}
assert one.loaded == {2 * CHUNK}
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)


# ---- Failures ----


def test_no_daemon(make, tmp_path):
    one = make(socket=tmp_path / "nobody")
    started = time.monotonic()
    assert len(one.run(prompt(1, 2 * CHUNK), generate=4)) == 4
    assert one.loaded == 0 and time.monotonic() - started < 20


def test_the_daemon_dies_and_comes_back(make, daemon):
    tokens = prompt(1200, 2 * CHUNK + 1)
    one = make(socket=daemon.socket)
    made = one.run(tokens, generate=2)
    eventually(lambda: hit(one, tokens), 2 * CHUNK)
    daemon.kill()
    assert one.run(tokens, generate=2) == made and one.loaded == 0
    daemon.start()
    eventually(lambda: hit(one, tokens), 2 * CHUNK)
    assert one.run(tokens, generate=2) == made


def test_a_broken_promise_is_an_error_never_wrong_kv(make, daemon):
    tokens = prompt(1300, 2 * CHUNK + 1)
    one = make(socket=daemon.socket)
    one.run(tokens)
    eventually(lambda: hit(one, tokens), 2 * CHUNK)
    with pytest.raises(larder.trtllm.LoadFailed, match="request"):
        one.run(tokens, between=daemon.kill)


def test_a_load_that_comes_short_is_an_error(make):
    tokens = prompt(1400, 2 * CHUNK + 1)
    one = make()
    one.run(tokens[: CHUNK + 1])
    eventually(lambda: hit(one, tokens[: CHUNK + 1]), CHUNK)
    space = one.workers[0]._connection.space(one.workers[0]._geometry)
    ids = space.ids(tokens[: 2 * CHUNK])
    hold = space.hold(ids)
    assert hold.usable == 1
    order = larder.trtllm.LoadOrder(1, hold.token, list(ids), 0, list(range(8)))
    one.workers[0].bind_connector_meta(larder.trtllm.Step([order]))
    with pytest.raises(larder.trtllm.LoadFailed, match="1 of 2 chunks came"):
        one.workers[0].start_load_kv(one.stream)
    order.blocks = order.blocks[:4]
    one.workers[0].start_load_kv(one.stream)


def test_without_tensorrt_llm_nothing_of_it_is_needed():
    code = (
        "import sys, larder.trtllm as t;"
        "print([m for m in ('torch', 'tensorrt_llm') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_the_environment_is_read():
    with environment(socket="/s", load_deadline_ms=7, chunk_tokens=""):
        read = larder.trtllm.Settings.of_environment()
    assert read == larder.trtllm.Settings(socket="/s", load_deadline_ms=7)

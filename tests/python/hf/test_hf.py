"""Models of transformers that continue from KV in Larder: bit for bit as if they
had computed it themselves."""

import os
import pathlib
import subprocess
import sys

import checkpoint
import documents
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
)

import larder
from larder.hf import LarderCache, ModelSpace, weights_digest

torch.set_num_threads(2)
VOCABULARY = 512
ROOT = pathlib.Path(__file__).resolve().parents[3]
DEPS = pathlib.Path(os.environ.get("LARDER_DEPS_DIR") or ROOT / ".deps").absolute()


def tiny(seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(
        **dict(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4096,
        )
        | changes
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def prompt(seed, count):
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (1, count), generator=made)


@torch.no_grad()
def logits(model, tokens, cache):
    return model(tokens, past_key_values=cache).logits


@pytest.fixture
def client(shared_daemon):
    with larder.Client(shared_daemon.socket, name="hf", deadline=20) as client:
        yield client


def assert_same(one, other):
    for a, b in zip(one.layers, other.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_continues_bit_for_bit(client, dtype):
    model = tiny(dtype=dtype)
    space = ModelSpace(client, model)
    tokens = prompt(1, 700)  # two chunks, 11 blocks, 12 tokens

    first = LarderCache(space, tokens)
    assert first.loaded == 0 and first.get_seq_length() == 0 and first.error is None
    logits(model, tokens[:, :688], first)
    assert first.save(tokens) == 688
    kept = logits(model, tokens[:, 688:], first)

    second = LarderCache(space, tokens[:, :689])
    assert second.loaded == second.get_seq_length() == 688
    assert torch.equal(logits(model, tokens[:, 688:], second), kept)
    assert_same(first, second)
    # Longer now; only the new blocks are sent.
    assert second.save(tokens) == 688 and second.error is None


def test_leaves_the_last_token_to_the_model(client):
    model = tiny(1)
    space = ModelSpace(client, model)
    tokens = prompt(2, 512)
    cache = LarderCache(space, tokens)
    logits(model, tokens[:, :511], cache)
    kept = logits(model, tokens[:, 511:], cache)
    assert cache.save(tokens) == 512

    again = LarderCache(space, tokens)
    assert again.loaded == 511
    assert torch.equal(logits(model, tokens[:, 511:], again), kept)
    # As a prefix of a longer prompt it is there to the last token.
    longer = torch.cat([tokens, prompt(3, 40)], dim=1)
    assert LarderCache(space, longer).loaded == 512
    # Its own prefix: one whole chunk.
    assert LarderCache(space, tokens[:, :400]).loaded == 256
    assert LarderCache(space, prompt(9, 400)).loaded == 0
    assert LarderCache(space, tokens[:, :5]).loaded == 0


def test_generates(client):
    model = tiny(2)
    space = ModelSpace(client, model)
    tokens = prompt(4, 300)

    def answer(cache):
        out = model.generate(
            tokens, past_key_values=cache, max_new_tokens=40, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )
        assert out.shape[1] == 340
        return out

    alone = answer(DynamicCache(config=model.config))
    cache = LarderCache(space, tokens)
    first = answer(cache)
    assert torch.equal(first, alone)
    # The KV of the last token was never computed.
    assert cache.get_seq_length() == 339
    assert cache.save(first) == 336
    assert LarderCache(space, tokens).loaded == 256
    # The next turn begins with this one's whole chunks.
    assert LarderCache(space, torch.cat([first[:, :336], tokens], 1)).loaded == 256


def test_another_process(client, shared_daemon, tmp_path):
    model = tiny(3)
    model.save_pretrained(tmp_path)
    program = f"""
import sys, torch, larder
from transformers import AutoModelForCausalLM
from larder.hf import LarderCache, ModelSpace
torch.set_num_threads(2)
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
space = ModelSpace(larder.Client({shared_daemon.socket!r}, deadline=20), model)
tokens = torch.tensor([{prompt(5, 390).tolist()[0]}])
cache = LarderCache(space, tokens)
print(cache.loaded)
with torch.no_grad():
    if cache.loaded == 0:
        model(tokens[:, :384], past_key_values=cache)
        assert cache.save(tokens) == 384
    at = cache.get_seq_length()
    torch.save(model(tokens[:, at:], past_key_values=cache).logits, sys.argv[1])
"""

    def run(name):
        return int(subprocess.run(
            [sys.executable, "-c", program, tmp_path / name],
            check=True, capture_output=True, text=True, timeout=300,
        ).stdout)

    assert run("first") == 0 and run("second") == 384
    first, second = (torch.load(tmp_path / name) for name in ("first", "second"))
    assert torch.equal(first, second)
    # This process has never computed any of it.
    mine = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    cache = LarderCache(ModelSpace(client, mine), prompt(5, 390))
    assert cache.loaded == 384
    assert torch.equal(logits(mine, prompt(5, 390)[:, 384:], cache), first)


def test_what_differs_is_another_space(client):
    model = tiny(4)
    space = ModelSpace(client, model)
    tokens = prompt(6, 300)
    cache = LarderCache(space, tokens)
    logits(model, tokens, cache)
    assert cache.save(tokens) == 288
    for other in (
        tiny(5),  # other weights
        tiny(4, torch.bfloat16),
        tiny(4, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        tiny(4, rms_norm_eps=1e-5),
        tiny(4, attn_implementation="eager"),
    ):
        assert LarderCache(ModelSpace(client, other), tokens).loaded == 0
    assert LarderCache(ModelSpace(client, tiny(4)), tokens).loaded == 288
    salt = [(larder.KeyKind.SALT, b"alice", 0)]
    assert LarderCache(space, tokens, keys=salt).loaded == 0

    # Another process's expectation names what differs.
    digest = weights_digest(model)
    with pytest.raises(larder.Mismatch, match="cache_dtype"):
        ModelSpace(
            client, tiny(4, torch.bfloat16), weights=digest,
            expect=ModelSpace(client, model).space.encoding,
        )


def test_refuses_what_would_be_wrong(client):
    model = tiny(6)
    space = ModelSpace(client, model)
    tokens = prompt(7, 64)
    cache = LarderCache(space, tokens)
    logits(model, tokens, cache)
    cache.layers[2].values = cache.layers[2].values.bfloat16()
    with pytest.raises(ValueError, match="bfloat16"):
        cache.save(tokens)
    batch = LarderCache(space, tokens)
    logits(model, tokens.repeat(2, 1), batch)
    with pytest.raises(ValueError, match="2, 2, 64"):
        batch.save(tokens)
    with pytest.raises(ValueError, match="one sequence"):
        LarderCache(space, tokens.repeat(2, 1))
    sliding = tiny(0).config
    sliding.layer_types = ["sliding_attention"] * 3
    sliding.sliding_window = 32
    model.config = sliding
    with pytest.raises(ValueError, match="full attention"):
        ModelSpace(client, model)


def test_the_digest_follows_the_weights():
    model = tiny(7)
    digest = weights_digest(model)
    assert weights_digest(model) == digest and weights_digest(tiny(7)) == digest
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] += 1
    assert weights_digest(model) != digest


def test_a_cropped_cache_and_one_reused(client):
    model = tiny(8)
    space = ModelSpace(client, model)
    tokens = prompt(8, 400)
    cache = LarderCache(space, tokens)
    logits(model, tokens, cache)
    cache.crop(-100)  # rows are no longer one after the other
    assert cache.save(tokens) == 288
    again = LarderCache(space, tokens[:, :300])
    assert again.loaded == 288
    kept = DynamicCache(config=model.config)
    logits(model, tokens, kept)
    kept.crop(-112)
    assert_same(again, kept)


def test_a_daemon_that_is_gone_is_a_miss(daemon):
    model = tiny(9)
    client = larder.Client(daemon.socket, deadline=5)
    space = ModelSpace(client, model)
    tokens = prompt(9, 300)
    daemon.kill()
    cache = LarderCache(space, tokens)
    assert cache.loaded == 0 and isinstance(cache.error, larder.Unavailable)
    alone = logits(model, tokens, DynamicCache(config=model.config))
    assert torch.equal(logits(model, tokens, cache), alone)
    assert cache.save(tokens) == 0 and isinstance(cache.error, larder.Unavailable)


def test_a_real_model(client):
    folder = checkpoint.ensure(DEPS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    prose = (ROOT / "tools" / "llama_demo" / "prose.txt").read_text()
    tokens = AutoTokenizer.from_pretrained(folder)(
        prose[:1600], return_tensors="pt"
    ).input_ids
    whole = (tokens.shape[1] - 1) // 16 * 16
    assert whole > 300
    space = ModelSpace(client, model)
    cache = LarderCache(space, tokens)
    logits(model, tokens[:, :whole], cache)  # cut where the loaded part will end
    assert cache.save(tokens) == whole
    kept = logits(model, tokens[:, whole:], cache)

    again = LarderCache(space, tokens)
    assert again.loaded == whole and again.error is None
    assert torch.equal(logits(model, tokens[:, whole:], again), kept)
    assert_same(cache, again)


def test_the_document(shared_daemon, tmp_path):
    tiny(10).save_pretrained(tmp_path)
    documents.run(
        "client/python/docs/hf.md",
        socket=shared_daemon.socket,
        folder=str(tmp_path),
        prompt=prompt(10, 300),
    )

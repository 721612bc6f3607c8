"""Tiny checkpoints with random weights, for shapes that no small model has: heads
that two ranks can share, windows, images. Made from a seed, read by vLLM alone.

What such a model says is noise, but noise that depends on every token before: a
wrong byte of KV is another answer. behind() says whether it is right, without vLLM."""

import json
import pathlib

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

VOCAB = 512
HIDDEN, HEADS, KV_HEADS, HEAD, LAYERS = 128, 4, 2, 32, 4
TIE = 0.01  # of logits whose standard deviation is 4
IMAGE_TOKEN = VOCAB - 1
SIDE, PATCH = 64, 8  # an image is 64 tokens


def prompt(seed: int, count: int) -> list[int]:
    """Tokens that have nothing in common with those of another seed."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.randint(4, IMAGE_TOKEN, (count,), generator=drawn).tolist()


def llama(folder: pathlib.Path, window: int = 0) -> pathlib.Path:
    """A Llama; with `window`, every other layer sees that many tokens only."""
    config = _text() | {"architectures": ["LlamaForCausalLM"]}
    if window:
        kinds = ["sliding_attention", "full_attention"]
        config |= {"sliding_window": window, "layer_types": kinds * (LAYERS // 2)}
    return _write(folder, config, _Weights().language(""))


def llava(folder: pathlib.Path) -> pathlib.Path:
    """The same behind a vision tower: image tokens carry what a picture shows."""
    weights = _Weights()
    tower = "vision_tower.vision_model"
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "text_config": _text() | {"architectures": ["LlamaForCausalLM"]},
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "image_size": SIDE,
            "patch_size": PATCH,
            "projection_dim": HIDDEN,
        },
    }
    tensors = weights.language("language_model.") | weights.vision(tower)
    for name in ("linear_1", "linear_2"):
        tensors[f"multi_modal_projector.{name}.weight"] = weights.draw(HIDDEN, HIDDEN)
        tensors[f"multi_modal_projector.{name}.bias"] = torch.zeros(HIDDEN)
    _write(folder, config, tensors)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"height": SIDE, "width": SIDE},
                "crop_size": {"height": SIDE, "width": SIDE},
                "do_center_crop": False,
            }
        )
    )
    (folder / "processor_config.json").write_text(
        json.dumps(
            {
                "processor_class": "LlavaProcessor",
                "image_token": "<image>",
                "patch_size": PATCH,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
            }
        )
    )
    return folder


@torch.no_grad()
def behind(folder: pathlib.Path, tokens: list[int], said: list[int]) -> float:
    """How far the logits of what llama() said to `tokens` lie behind the best ones:
    nothing, or of a near tie almost nothing, if it is right. Computed here, in one
    piece."""
    config = json.loads((folder / "config.json").read_text())
    language = "language_model." if "text_config" in config else ""
    weights = load_file(folder / "model.safetensors")
    window = config.get("sliding_window", 0)
    ids = torch.tensor(tokens + said[:-1])
    x = weights[f"{language}model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        seen = window if window and i % 2 == 0 else len(ids)
        x = _layer(weights, f"{language}model.layers.{i}.", x, seen)
    last = _normed(x[len(tokens) - 1 :])
    logits = last @ weights[f"{language}lm_head.weight"].T
    told = logits.gather(1, torch.tensor(said)[:, None])[:, 0]
    return float((logits.max(-1).values - told).max())


def _normed(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def _layer(weights: dict, layer: str, x: torch.Tensor, seen: int) -> torch.Tensor:
    """One layer, whose attention sees the last `seen` tokens."""

    def project(name: str, of: torch.Tensor) -> torch.Tensor:
        return of @ weights[f"{layer}{name}.weight"].T

    def heads(name: str) -> torch.Tensor:
        return project(f"self_attn.{name}", _normed(x)).view(len(x), -1, HEAD)

    at = torch.arange(len(x))
    apart = at[:, None] - at[None, :]
    q, k = (_turned(heads(name)) for name in ("q_proj", "k_proj"))
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, heads("v_proj")))
    weight = torch.einsum("ihd,jhd->hij", q, k) / HEAD**0.5
    weight = weight.masked_fill((apart < 0) | (apart >= seen), float("-inf"))
    mixed = torch.einsum("hij,jhd->ihd", weight.softmax(-1), v).flatten(1)
    x = x + project("self_attn.o_proj", mixed)
    y = _normed(x)
    gate = functional.silu(project("mlp.gate_proj", y)) * project("mlp.up_proj", y)
    return x + project("mlp.down_proj", gate)


def _turned(x: torch.Tensor) -> torch.Tensor:
    """Rotary embeddings."""
    half = HEAD // 2
    angle = torch.arange(len(x))[:, None] / 10000.0 ** (torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _text() -> dict:
    return {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


class _Weights:
    """Drawn one after the other from one seed."""

    def __init__(self, seed: int = 1):
        self._drawn = torch.Generator().manual_seed(seed)

    def draw(self, rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        scale = gain / columns**0.5
        return torch.randn(rows, columns, generator=self._drawn) * scale

    def language(self, prefix: str) -> dict[str, torch.Tensor]:
        made = {
            f"{prefix}model.embed_tokens.weight": self.draw(VOCAB, HIDDEN, HIDDEN**0.5),
            f"{prefix}model.norm.weight": torch.ones(HIDDEN),
            f"{prefix}lm_head.weight": self.draw(VOCAB, HIDDEN, 4.0),
        }
        for i in range(LAYERS):
            layer = f"{prefix}model.layers.{i}."
            made |= {
                # Sharp attention, whose values weigh more than the token itself:
                # the mean of many would be the same whatever they are.
                f"{layer}self_attn.q_proj.weight": self.draw(HEADS * HEAD, HIDDEN, 2.0),
                f"{layer}self_attn.k_proj.weight": self.draw(KV_HEADS * HEAD, HIDDEN, 2.0),
                f"{layer}self_attn.v_proj.weight": self.draw(KV_HEADS * HEAD, HIDDEN, 2.0),
                f"{layer}self_attn.o_proj.weight": self.draw(HIDDEN, HEADS * HEAD, 2.0),
                f"{layer}mlp.gate_proj.weight": self.draw(2 * HIDDEN, HIDDEN),
                f"{layer}mlp.up_proj.weight": self.draw(2 * HIDDEN, HIDDEN),
                f"{layer}mlp.down_proj.weight": self.draw(HIDDEN, 2 * HIDDEN),
                f"{layer}input_layernorm.weight": torch.ones(HIDDEN),
                f"{layer}post_attention_layernorm.weight": torch.ones(HIDDEN),
            }
        return made

    def vision(self, prefix: str) -> dict[str, torch.Tensor]:
        patches = (SIDE // PATCH) ** 2
        made = {
            f"{prefix}.embeddings.class_embedding": self.draw(1, HIDDEN)[0],
            f"{prefix}.embeddings.patch_embedding.weight": self.draw(
                HIDDEN, 3 * PATCH * PATCH, 4.0
            ).view(HIDDEN, 3, PATCH, PATCH),
            f"{prefix}.embeddings.position_embedding.weight": self.draw(
                patches + 1, HIDDEN
            ),
        }
        norms = ["pre_layrnorm", "post_layernorm"]
        for i in range(2):
            layer = f"encoder.layers.{i}."
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                made[f"{prefix}.{layer}self_attn.{name}.weight"] = self.draw(HIDDEN, HIDDEN)
                made[f"{prefix}.{layer}self_attn.{name}.bias"] = torch.zeros(HIDDEN)
            for name, rows, columns in (
                ("fc1", 2 * HIDDEN, HIDDEN),
                ("fc2", HIDDEN, 2 * HIDDEN),
            ):
                made[f"{prefix}.{layer}mlp.{name}.weight"] = self.draw(rows, columns)
                made[f"{prefix}.{layer}mlp.{name}.bias"] = torch.zeros(rows)
            norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
        for name in norms:
            made[f"{prefix}.{name}.weight"] = torch.ones(HIDDEN)
            made[f"{prefix}.{name}.bias"] = torch.zeros(HIDDEN)
        return made


def _write(folder: pathlib.Path, config: dict, tensors: dict) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer():
    """A word for each token; prompts are told as ids anyway."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    words = special + [f"w{i}" for i in range(4, IMAGE_TOKEN)] + ["<image>"]
    level = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>")
    made = tokenizers.Tokenizer(level)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        chat_template="{% for m in messages %}{% for part in m['content'] %}"
        "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}"
        "{% endfor %}{% endfor %}",
    )

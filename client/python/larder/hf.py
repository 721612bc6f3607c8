"""Prefixes of Hugging Face transformers models, kept in Larder.

    >>> space = larder.hf.ModelSpace(client, model)
    >>> cache = larder.hf.LarderCache(space, tokens)    # begins with a prefix
    >>> out = model(tokens[:, cache.loaded:], past_key_values=cache)
    >>> cache.save(tokens)                              # what was computed

The simple way to see Larder at work: one sequence at a time, full attention,
transformers 5. Needs torch and transformers; nothing else of the package does.
"""

import hashlib
import json
import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer

from ._engine import rope_text
from ._errors import Error
from ._larder import Client, Group, PagedCache, Space, View
from ._words import GroupKind, Stage

__all__ = ["LarderCache", "ModelSpace", "weights_digest"]

# Keys of a request, as Space.ids takes them.
Keys = Sequence[tuple[int, bytes, int]]

_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

# What a configuration says that KV does not depend on. All else counts.
_INDIFFERENT = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "tie_word_embeddings",
    "transformers_version",
    "use_cache",
}

# model -> (state of its parameters, digest)
_digests: "weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, bytes]]" = (
    weakref.WeakKeyDictionary()
)


def weights_digest(model: torch.nn.Module) -> bytes:
    """SHA-256 of the names, types, shapes and bytes of a model's parameters.

    Reads all of them the first time (about a second per GB), then only when one
    was replaced or written to. Not to be called while another thread trains.
    """
    state = sorted(model.state_dict().items())
    # torch counts the writes to each tensor.
    version = [(name, t.data_ptr(), t.dtype, t._version) for name, t in state]
    known = _digests.get(model)
    if known is not None and known[0] == version:
        return known[1]
    digest = hashlib.sha256()
    for name, tensor in state:
        about = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n"
        digest.update(about.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    _digests[model] = (version, digest.digest())
    return digest.digest()


def _rope(model: torch.nn.Module, parameters: dict[str, Any] | None) -> str:
    """How the model rotates keys. That it takes neighbours for pairs (GLM, Cohere,
    GPT-J) no configuration says; the functions of its module do."""
    if not parameters:
        return _json("none")
    neighbours = {"is_neox_style": False} if _pairs_neighbours(model) else {}
    return rope_text(parameters | neighbours, (",", ":"))


def _pairs_neighbours(model: torch.nn.Module) -> bool:
    module = sys.modules.get(type(model).__module__)
    if hasattr(module, "rotate_every_two"):
        return True
    rotate = getattr(module, "rotate_half", None)
    try:
        return rotate(torch.arange(4.0)).tolist() == [-1, 0, -3, 2]
    except Exception:  # noqa: BLE001: whatever a model calls by that name
        return False


class ModelSpace:
    """The space of a model's KV, with the model's shape. Two models share one only
    if every byte of theirs may be exchanged.

    `weights`: their SHA-256, if it is known (None: weights_digest). Everything
    else comes from the configuration and the versions of the libraries. `expect`:
    the encoding of a space that this one must be.

    May be used by any number of threads. Raises ValueError for models whose
    layers are not all full attention, Mismatch if it is not `expect`, Unavailable
    if the daemon is gone.
    """

    def __init__(
        self,
        client: Client,
        model: transformers.PreTrainedModel,
        *,
        weights: bytes | None = None,
        block_tokens: int = 16,
        chunk_tokens: int = 256,
        expect: bytes | None = None,
        deadline: float | None = None,
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        kinds = {type(layer) for layer in DynamicCache(config=config).layers}
        if kinds != {DynamicLayer}:
            raise ValueError("every layer must be full attention")
        self.config, self.dtype, self.device = config, model.dtype, model.device
        self.layers: int = config.num_hidden_layers
        queries = config.num_attention_heads
        self.heads: int = getattr(config, "num_key_value_heads", None) or queries
        self.dim: int = getattr(config, "head_dim", None) or (
            config.hidden_size // queries
        )
        head_bytes = self.dim * self.dtype.itemsize
        counts = {k: v for k, v in config.to_dict().items() if k not in _INDIFFERENT}
        # Other kernels give other last bits.
        engine = (
            f"transformers={transformers.__version__} torch={torch.__version__} "
            f"device={self.device.type} attention={config._attn_implementation} "
            f"config={hashlib.sha256(_json(counts).encode()).hexdigest()}"
        )
        self.space = Space(
            client,
            model=config.model_type,
            weights=weights or weights_digest(model),
            cache_dtype=_DTYPES[self.dtype],
            block_tokens=block_tokens,
            chunk_tokens=chunk_tokens,
            rope=_rope(model, getattr(config, "rope_parameters", None)),
            engine_layout=engine,
            groups=[
                Group(
                    GroupKind.FULL_ATTENTION,
                    f"0-{self.layers - 1}",
                    layer_count=self.layers,
                    kv_heads=self.heads,
                    k_head_bytes=head_bytes,
                    v_head_bytes=head_bytes,
                )
            ],
            expect=expect,
            deadline=deadline,
        )


class LarderCache(DynamicCache):
    """A DynamicCache that begins with what Larder has of a prompt.

    It is one sequence without padding, positions from 0 on. The model gets the
    tokens from `loaded` on (generate() sees to that itself); at least one is left
    to it, so that there are logits. A daemon that is gone, slow or full is a
    shorter prefix or a save left out, and `error` says why: nothing is raised.

    As any cache, for one thread at a time; many caches may share a ModelSpace.
    """

    def __init__(
        self,
        model_space: ModelSpace,
        tokens: "torch.Tensor | Iterable[int]",
        *,
        keys: Keys = (),
        deadline: float | None = None,
        worst_lineage: int = 0,
    ) -> None:
        """Loads the longest prefix of `tokens` that is there.

        `keys`: what else than tokens the KV depends on. `deadline`: seconds for
        each call to Larder; None: the client's. `worst_lineage`: 0 takes exact KV
        alone, 1 to 199 lossy copies up to that level, too; what is computed over
        them is saved as no better (`lineage`).
        """
        super().__init__(config=model_space.config)
        self.model_space = model_space
        self.request_keys = list(keys)
        self.deadline = deadline
        self.worst_lineage = worst_lineage
        self.lineage = 0  # of what was loaded
        self.loaded = 0
        self.error: Error | None = None
        try:
            self._load(_numbers(tokens))
        except Error as error:
            self.error = error

    def save(self, tokens: "torch.Tensor | Iterable[int]") -> int:
        """Saves the KV of `tokens`: those that the cache holds, from the first on.

        Whole chunks, and the whole blocks of a last one. Returns how many tokens
        are in Larder now. What is there already is not sent again.

        Raises ValueError if the cache is not of the model's kind (another dtype,
        a batch).
        """
        numbers = _numbers(tokens)[: self.get_seq_length()]
        space, saved, last = self.model_space.space, 0, None
        try:
            ids = space.ids(numbers, self.request_keys)
            if len(ids) == 0:
                return 0
            keys = [self._checked(layer.keys) for layer in self.layers]
            values = [self._checked(layer.values) for layer in self.layers]
            for i in range(len(ids)):
                is_tail = i == len(ids) - 1 and ids.tail_tokens != 0
                size = ids.tail_tokens if is_tail else space.chunk_tokens
                begin = i * space.chunk_tokens
                part = space.save(
                    ids[i],
                    token_count=ids.tail_tokens if is_tail else 0,
                    wait=True,
                    deadline=self.deadline,
                )
                if part is not None:  # None: it is there
                    part.gather(self._view(keys, values, begin, begin + size))
                    part.commit(
                        token_begin=begin,
                        parent=ids[i - 1] if i else None,
                        lineage=self.lineage,
                    )
                    last = part
                saved += size
            if last is not None:
                last.wait(Stage.VOLATILE, deadline=self.deadline)
        except Error as error:
            self.error = error
        return saved

    def _load(self, numbers: list[int]) -> None:
        at, space = self.model_space, self.model_space.space
        ids = space.ids(numbers, self.request_keys)
        hold = None
        if len(ids):
            hold = space.hold(
                ids, lineage=self.worst_lineage, deadline=self.deadline
            )
        if hold is None or hold.usable == 0:
            return
        with hold:
            ids = ids[: hold.usable]
            held = len(ids) * space.chunk_tokens
            if ids.tail_tokens:
                held += ids.tail_tokens - space.chunk_tokens
            # Larder writes where a model on the CPU will read.
            shape = (1, at.heads, held, at.dim)
            keys = [torch.empty(shape, dtype=at.dtype) for _ in self.layers]
            values = [torch.empty(shape, dtype=at.dtype) for _ in self.layers]
            view = self._view(keys, values, 0, held)
            done = space.load(
                ids,
                [view],
                hold=hold,
                lineage=self.worst_lineage,
                deadline=self.deadline,
            )
        self.lineage = done.lineage
        # The model computes the last token, whatever there is.
        self.loaded = min(done.tokens, len(numbers) - 1)
        if self.loaded == 0:
            return
        for layer, key, value in zip(self.layers, keys, values):
            key = key[:, :, : self.loaded].to(at.device)
            value = value[:, :, : self.loaded].to(at.device)
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value

    def _checked(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in host memory. Sizes that differ would become wrong KV."""
        at = self.model_space
        shape = (1, at.heads, tensor.shape[2], at.dim)
        if tensor.dtype != at.dtype or tensor.shape != shape:
            raise ValueError(
                f"{tensor.dtype} {tuple(tensor.shape)}, not {at.dtype} {shape}"
            )
        return tensor.detach().cpu()

    def _view(
        self,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        begin: int,
        end: int,
    ) -> View:
        """Tokens [begin, end) of [1, head, token, dim] tensors, as blocks where
        they lie."""
        size = self.model_space.space.block_tokens
        blocks = (end - begin) // size

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            rows = tensor[0, :, begin:end]
            return rows.unflatten(1, (blocks, size)).transpose(0, 1)

        cache = PagedCache([cut(k) for k in keys], [cut(v) for v in values], "BHNC")
        return cache.blocks(range(blocks))


def _numbers(tokens: "torch.Tensor | Iterable[int]") -> list[int]:
    if isinstance(tokens, torch.Tensor):
        if tokens.dim() > 1 and tokens.shape[:-1].numel() != 1:
            raise ValueError("one sequence at a time")
        return tokens.reshape(-1).tolist()
    return list(tokens)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)

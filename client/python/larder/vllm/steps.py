"""What the scheduler tells the workers for one step."""

import dataclasses

BlockIds = tuple[list[int], ...]  # one list for each group


@dataclasses.dataclass
class LoadOrder:
    """Chunks to be loaded for one request."""

    request_id: str
    hold_token: int
    # Of every chunk of the hold; and which of them are loaded.
    held_ids: list[bytes]
    first: int
    count: int
    # Per group, for the tokens of the loaded chunks; -1: not wanted.
    blocks: BlockIds
    between_steps: bool


@dataclasses.dataclass
class SaveOrder:
    """One chunk to be saved once this step is computed."""

    id: bytes
    parent: bytes | None
    root_content: bytes | None
    token_begin: int
    token_count: int
    blocks: BlockIds
    # For KV events; `keyed`: the KV depends on more than tokens.
    tokens: list[int]
    keyed: bool


@dataclasses.dataclass
class Step:
    """Of one step; pickled."""

    loads: list[LoadOrder] = dataclasses.field(default_factory=list)
    saves: list[SaveOrder] = dataclasses.field(default_factory=list)
    # Requests that ended, whose blocks wait for the saves of this step.
    ended: list[str] = dataclasses.field(default_factory=list)

"""Larder keeps attention keys and values outside the inference engine.

    >>> import larder
    >>> client = larder.Client(socket)
    >>> space = larder.Space(client, model="m", weights=bytes(32), ...)
    >>> ids = space.ids(tokens)          # one per chunk of 256 tokens
    >>> space.match(ids).usable          # how much is there?
    >>> space.load(ids, [cache.blocks(block_table)]).usable

Nothing here needs torch. Every failure inside Larder is a miss with a Reason, in
time; exceptions are for the caller's mistakes and for a daemon that is gone.
Deadlines are seconds: None is the client's default, math.inf is none.
"""

from ._errors import (
    Aborted,
    Cancelled,
    DeadlineExceeded,
    Denied,
    Error,
    Exhausted,
    InvalidArgument,
    Mismatch,
    Unavailable,
)
from ._larder import (
    Client,
    Completion,
    Find,
    Found,
    Group,
    Hold,
    Ids,
    Load,
    Loaded,
    Match,
    PagedCache,
    Queue,
    Save,
    Space,
    Stream,
    Values,
    View,
    Window,
    reason_name,
    root_content,
    segments,
)
from ._words import (
    GroupKind,
    KeyKind,
    Layout,
    Lineage,
    Op,
    Reason,
    Stage,
    State,
)

__version__ = "0.1.0"

__all__ = [
    "Aborted",
    "Cancelled",
    "Client",
    "Completion",
    "DeadlineExceeded",
    "Denied",
    "Error",
    "Exhausted",
    "Find",
    "Found",
    "Group",
    "GroupKind",
    "Hold",
    "Ids",
    "InvalidArgument",
    "KeyKind",
    "Layout",
    "Lineage",
    "Load",
    "Loaded",
    "Match",
    "Mismatch",
    "Op",
    "PagedCache",
    "Queue",
    "Reason",
    "Save",
    "Space",
    "Stream",
    "Stage",
    "State",
    "Unavailable",
    "Values",
    "View",
    "Window",
    "reason_name",
    "root_content",
    "segments",
]

"""Larder under LMCache, unpatched: two doors.

LMCache's MP mode (`lmcache server`) takes `L2Connector` as a `native_plugin`
L2 adapter; LMCache inside the engine takes `RemoteAdapter` as a remote storage
plugin. docs/lmcache.md has the configuration lines.
"""

import importlib
from typing import Any

__all__ = ["L2Connector", "RemoteAdapter"]

_HOMES = {"L2Connector": ".l2", "RemoteAdapter": ".remote"}


# Each door is loaded when it is asked for: `remote` needs LMCache and torch.
def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)

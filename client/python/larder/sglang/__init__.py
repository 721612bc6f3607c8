"""Larder as the storage backend of SGLang's hierarchical cache (HiCache).

SGLang loads `LarderHiCache` through its `dynamic` backend; docs/sglang.md has the
line. One instance per rank. A page of a host pool is one value: its pieces are read
and written where the pool keeps them, no byte is copied in between.
"""

from .backend import LarderHiCache

__all__ = ["LarderHiCache"]

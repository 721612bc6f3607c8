"""Runs the examples of a document: what it shows is what happens."""

import pathlib
import re
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(document: str, **names: Any) -> dict[str, Any]:
    """Runs the ```python blocks of a document one after the other, in one module
    whose globals are `names` to begin with. A failure has the document's line."""
    path = ROOT / document
    text = path.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S))
    assert blocks, f"{document} has no examples"
    for block in blocks:
        before = text[: block.start(1)].count("\n")
        exec(compile("\n" * before + block[1], str(path), "exec"), names)
    return names

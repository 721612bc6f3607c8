"""SGLang's released host pools and controller, without a GPU.

torchvision's wheel brings operators for CUDA's torch only. SGLang imports it for
images, which nothing here touches: declaring the two operators it insists on lets
it be imported.
"""

import os
import pathlib
import re
import sys

import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
_boxes = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _boxes.define(f"{_name}(Tensor dets, Tensor scores, float iou) -> Tensor")

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import pytest  # noqa: E402

DOCUMENT = pathlib.Path(__file__).resolve().parents[3] / "client/python/docs/sglang.md"


@pytest.fixture(scope="session")
def documented():
    """The extra config of the document, to the letter."""
    line = re.search(
        r"--hicache-storage-backend-extra-config '(.*?)'", DOCUMENT.read_text(), re.S
    )
    assert line is not None
    return line.group(1)

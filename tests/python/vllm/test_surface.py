"""What Larder relies on of vLLM is written down, as the pinned release has it."""

import surface

from larder.vllm import LarderConnector, LarderTier


def test_the_lock_is_current():
    surface.check_lock("vllm")


def test_every_override_is_listed():
    lock = surface.read(surface.locked("vllm"))[1]
    assert surface.not_listed(lock, "vllm", LarderConnector, LarderTier) == set()

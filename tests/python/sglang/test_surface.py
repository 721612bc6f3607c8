"""What Larder relies on of SGLang is written down, as the pinned release has it."""

import surface

from larder.sglang import LarderHiCache


def test_the_lock_is_current():
    surface.check_lock("sglang")


def test_every_override_is_listed():
    lock = surface.read(surface.locked("sglang"))[1]
    assert surface.not_listed(lock, "sglang", LarderHiCache) == set()

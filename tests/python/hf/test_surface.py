"""What Larder relies on of transformers is written down, as the pinned release has it."""

import surface

from larder.hf import LarderCache


def test_the_lock_is_current():
    surface.check_lock("hf")


def test_every_override_is_listed():
    lock = surface.read(surface.locked("hf"))[1]
    assert surface.not_listed(lock, "transformers", LarderCache) == set()

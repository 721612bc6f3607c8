"""What reaches the plug-in through NIXL's Python, as the pinned release has it."""

import surface


def test_the_lock_is_current():
    surface.check_lock("nixl")

"""What Larder relies on of LMCache is written down, as the pinned release has it."""

import surface

from larder.lmcache import RemoteAdapter
from larder.lmcache.remote import Connector


def test_the_lock_is_current():
    surface.check_lock("lmcache")


def test_every_override_is_listed():
    lock = surface.read(surface.locked("lmcache"))[1]
    assert surface.not_listed(lock, "lmcache", RemoteAdapter, Connector) == set()

"""What Larder stands in for of Mooncake's store, as the pinned release has it."""

import inspect

import surface

import larder.mooncake

STORE = "mooncake.store.MooncakeDistributedStore."


def test_the_lock_is_current():
    surface.check_lock("mooncake_store")


def test_every_call_of_ours_is_one_of_mooncakes():
    lock = surface.read(surface.locked("mooncake_store"))[1]
    ours = vars(larder.mooncake.MooncakeDistributedStore)
    calls = {name for name in ours if not name.startswith("_")}
    assert {name for name in calls if STORE + name not in lock} == set()
    # And takes what Mooncake's does, by the names that it has for it.
    for name in calls:
        told = surface.parameters(lock[STORE + name])
        takes = set(inspect.signature(ours[name]).parameters)
        named = {each for each in told if not each.startswith("arg")}
        assert named - {"args"} <= takes | {"args"}, name

"""larder._engine.Connection: what every adapter stands on when a daemon starts late,
does not answer, dies and comes back."""

import logging
import os
import threading
import time

import pytest
from conftest import Daemon
from patience import until

import larder
from larder._engine import Complaints, Connection

DEADLINE = 5.0  # seconds: of a busy machine


@pytest.fixture
def absent():
    """A daemon that has not been started."""
    made = Daemon()
    try:
        yield made
    finally:
        made.close()


class Attempts(Connection):
    """To a daemon's values; counts what it tries."""

    def __init__(self, daemon, pause=0.05, deadline=DEADLINE, **more):
        self.connects = 0
        self.opens: list[object] = []
        self._daemon = daemon
        self.said = Said()
        super().__init__(
            self._client_of,
            self._values_of,
            Complaints(self.said, every=0.0),
            deadline=deadline,
            pause=pause,
            **more,
        )

    def _client_of(self, deadline):
        self.connects += 1
        return larder.Client(self._daemon.socket, connect_deadline=deadline)

    def _values_of(self, client, deadline, of):
        self.opens.append(of)
        return larder.Values(
            client,
            model=f"connection {of}",
            weights=bytes([1]) * 32,
            cache_dtype="u8",
            value_bytes_max=4096,
            engine_layout="test",
            hash_scheme="test",
            deadline=deadline,
        )


class Said(logging.Logger):
    def __init__(self):
        super().__init__("test")
        self.lines: list[str] = []

    def warning(self, text, *arguments, **_):
        self.lines.append(text % arguments)


def works(values):
    key = os.urandom(8)
    return values.put([key], [b"value"]) == bytes(1)


def test_what_is_there_is_opened_once(daemon):
    one = Attempts(daemon)
    values = one.space()
    assert works(values) and one.space() is values and one.error is None
    other = one.space("other")
    assert other.id != values.id and one.space("other") is other
    assert one.connects == 1 and one.opens == [None, "other"]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_daemon_that_starts_late(absent, in_background):
    one = Attempts(absent, in_background=in_background)
    assert one.space() is None
    until(lambda: one.connects >= 2 or one.space())
    assert isinstance(one.error, larder.Unavailable)
    assert "everything misses" in one.said.lines[0]
    absent.start()
    assert works(until(one.space)) and one.error is None


@pytest.mark.parametrize("in_background", [False, True])
def test_one_try_in_a_pause_and_no_waiting_in_between(absent, in_background):
    one = Attempts(absent, pause=3600.0, in_background=in_background)
    one.wait(60) if in_background else one.space()
    threads = [threading.Thread(target=one.space, args=(i,)) for i in range(8)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(1000):
        assert one.space() is None and one.space("other") is None
    assert time.monotonic() - begin < DEADLINE
    assert one.connects == 1 and one.opens == []


@pytest.mark.parametrize("in_background", [False, True])
def test_a_daemon_that_is_killed_and_started_again(daemon, in_background):
    one = Attempts(daemon, in_background=in_background)
    values = one.wait(60)
    assert works(values)
    daemon.kill()
    other = one.space("other")  # not opened while it is away
    assert other is None and one.space() is values
    daemon.start()
    until(lambda: works(values))
    assert works(until(lambda: one.space("other")))
    assert one.connects == 1  # the library reconnected


def test_a_daemon_that_does_not_answer_costs_one_deadline(daemon):
    one = Attempts(daemon, deadline=0.3, pause=3600.0)
    daemon.freeze()
    try:
        begin = time.monotonic()
        assert one.space() is None
        first = time.monotonic() - begin
        assert one.space() is None
        both = time.monotonic() - begin
    finally:
        daemon.thaw()
    assert 0.2 < first < DEADLINE and both - first < 0.2
    assert one.error is not None


def test_whoever_waits_for_another_waits_no_longer_than_the_deadline(daemon):
    one = Attempts(daemon, deadline=0.3)
    opens, go_on = one._open_space, threading.Event()

    def slow(client, deadline, of):
        assert of == "quick" or go_on.wait(60)
        return opens(client, 10.0, of)

    one._open_space = slow
    opener = threading.Thread(target=one.space, args=("slow",))
    opener.start()
    begin = time.monotonic()
    assert one.space("quick") is None
    assert 0.2 < time.monotonic() - begin < DEADLINE
    go_on.set()
    opener.join()
    assert works(until(lambda: one.space("slow")))
    assert works(until(lambda: one.space("quick")))


def test_in_the_background_nobody_waits_for_what_takes_long(daemon):
    one = Attempts(daemon, in_background=True)
    opens, go_on = one._open_space, threading.Event()
    one._open_space = lambda *all: go_on.wait(60) and opens(*all)
    begin = time.monotonic()
    assert one.space() is None and one.wait(0.1) is None
    assert time.monotonic() - begin < DEADLINE
    go_on.set()
    assert works(until(one.space))


def test_one_that_cannot_be_opened_is_in_nobodys_way(daemon):
    one = Attempts(daemon, pause=3600.0)
    opens = one._open_space

    def picky(client, deadline, of):
        if of == "bad":
            raise ValueError("never")
        return opens(client, deadline, of)

    one._open_space = picky
    assert one.space("bad") is None and str(one.error) == "never"
    assert works(one.space("good"))
    assert one.space("bad") is None


@pytest.mark.parametrize("in_background", [False, True])
def test_after_close_nothing_is_opened(daemon, absent, in_background):
    one = Attempts(daemon, in_background=in_background)
    values = one.wait(60)
    assert one.close() == [values] and one.close() == []
    assert one.space() is None and one.space("other") is None
    assert works(values)  # whoever still has it may end what he does
    late = Attempts(absent, in_background=in_background)
    assert late.wait(60) is None
    late.close()
    absent.start()
    before = late.connects
    assert late.space() is None and late.connects <= before + 1


def test_what_is_opened_while_it_is_closed_is_given_back(daemon):
    one = Attempts(daemon, in_background=True)
    opens, inside, go_on = one._open_space, threading.Event(), threading.Event()

    def slow(*all):
        inside.set()
        assert go_on.wait(60)
        return opens(*all)

    one._open_space = slow
    assert one.space() is None and inside.wait(60)
    assert one.close() == []
    go_on.set()
    until(lambda: not any(each.is_alive() for each in one._threads.values()))
    assert one.space() is None and not one._spaces and one._client is None

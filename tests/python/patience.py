"""Waiting for what comes in its own time, and work that outlives daemons."""

import threading
import time
from collections.abc import Callable
from typing import Any


def until(holds: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Asks until the answer is true, and returns it. A watchdog, not a measure."""
    end = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return answer


def under_kills(
    daemon: Any,
    works: list[Callable[[int], None]],
    hits: Callable[[], int],
    times: int,
    pause: float = 0.5,
) -> None:
    """Calls each of `works` with 0, 1, 2, ... on a thread of its own, and kills and
    starts the daemon so many times meanwhile: each time there must be new `hits`,
    nothing may raise and at the end nobody may hang."""
    stop = threading.Event()
    trouble: list[BaseException] = []

    def run(work: Callable[[int], None]) -> None:
        number = 0
        try:
            while not stop.is_set():
                work(number)
                number += 1
        except BaseException as error:  # pylint: disable=broad-except
            trouble.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for _ in range(times):
        time.sleep(pause)
        daemon.kill()
        time.sleep(0.2)
        before = hits()
        daemon.start()
        until(lambda: hits() > before or trouble)  # noqa: B023
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not trouble, trouble

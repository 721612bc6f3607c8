"""Larder for asyncio: a queue whose operations are awaited.

    >>> async with larder.aio.Queue(client) as queue:
    ...     match = await queue.match(space, ids)
    ...     reasons, sizes = await queue.get(values, keys, buffers)

The event loop is never blocked: operations run on the client's worker threads
(`worker_threads` of them), and the loop watches the queue's file descriptor.
What is not here blocks; give it to asyncio.to_thread.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any

from . import _errors
from ._larder import (
    AnySpace,
    Client,
    Completion,
    Hold,
    Ids,
    Loaded,
    Space,
    Stream,
    Values,
    View,
)
from ._larder import Queue as _Queue

__all__ = ["Queue"]

_CLOSED = "the queue is closed"


class Queue:
    """Operations of one client, awaited on one event loop.

    At most `limit` are under way; others wait for their turn, first come, first
    served. Every one ends by its deadline (seconds; None: the client's, counted
    from its turn). Cancelling a task takes its operation back, and the task ends
    only when nothing lands in its buffers any more. Buffers are kept alive by the
    queue; those of a put must not change before its end.

    To be made and used on the loop's thread. Raises as larder.Client's calls do;
    Cancelled to those who wait when it is closed.
    """

    def __init__(self, client: Client, *, limit: int = 256) -> None:
        if limit < 1:
            raise ValueError("limit must be 1 at least")
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Semaphore(limit)
        self._queue = client.queue()
        self._jobs: dict[asyncio.Future[Completion], int] = {}
        self._closed = False
        self._loop.add_reader(self._queue.fileno(), self._take)

    @property
    def pending(self) -> int:
        """Operations under way."""
        return len(self._jobs)

    async def match(
        self, space: Space, ids: Ids, start: int = 0, *, deadline: float | None = None
    ) -> Completion:
        """Space.match: `good` is the usable prefix, `per_key` a State for each."""
        return await self._run(
            lambda mine: space.submit_match(
                self._queue, ids, start, user_data=mine, deadline=deadline
            )
        )

    async def lookup(
        self, space: AnySpace, ids: Ids, *, deadline: float | None = None
    ) -> bytes:
        """AnySpace.lookup: a State for each."""
        done = await self._run(
            lambda mine: space.submit_lookup(
                self._queue, ids, user_data=mine, deadline=deadline
            )
        )
        return done.per_key

    async def load(
        self,
        space: Space,
        ids: Ids,
        views: list[View],
        *,
        hold: Hold | None = None,
        hold_first: int = 0,
        threads: int = 0,
        each: bool = False,
        lineage: int = 0,
        stream: Stream | None = None,
        deadline: float | None = None,
    ) -> Loaded:
        """Space.load. What cut it short is in the result, not raised."""
        loads = []

        def start(mine: "asyncio.Future[Completion]") -> int:
            load = space.start_load(
                ids,
                views,
                hold=hold,
                hold_first=hold_first,
                threads=threads,
                each=each,
                lineage=lineage,
                stream=stream,
                queue=self._queue,
                user_data=mine,
                deadline=deadline,
            )
            loads.append(load)
            return load.job

        await self._run(start, raises=False)
        return loads[0].wait()  # it has ended

    async def put(
        self,
        values: Values,
        keys: list[bytes],
        buffers: list[Any],
        *,
        durable: bool = False,
        priority: int = 0,
        deadline: float | None = None,
    ) -> bytes:
        """Values.put: a Reason for each key; 0: stored, or there already."""
        done = await self._run(
            lambda mine: values.submit_put(
                self._queue,
                keys,
                buffers,
                durable=durable,
                priority=priority,
                user_data=mine,
                deadline=deadline,
            ),
            raises=False,
        )
        return done.per_key

    async def get(
        self,
        values: Values,
        keys: list[bytes],
        buffers: list[Any],
        *,
        prefix: bool = False,
        exact: bool = False,
        lineage: int = 0,
        deadline: float | None = None,
    ) -> tuple[bytes, list[int]]:
        """Values.get: (a Reason for each key, the size of each value or 0)."""
        done = await self._run(
            lambda mine: values.submit_get(
                self._queue,
                keys,
                buffers,
                prefix=prefix,
                exact=exact,
                lineage=lineage,
                user_data=mine,
                deadline=deadline,
            ),
            raises=False,
        )
        per_key: bytes = done.per_key
        sizes: Any = done.sizes
        return per_key, sizes

    async def delete(
        self, space: AnySpace, ids: Ids, *, deadline: float | None = None
    ) -> int:
        """AnySpace.delete: how many there were."""
        done = await self._run(
            lambda mine: space.submit_delete(
                self._queue, ids, user_data=mine, deadline=deadline
            )
        )
        return done.good

    async def close(self) -> None:
        """Takes back what is under way, and waits until nothing of it lands."""
        if self._closed:
            return
        self._closed = True
        for job in self._jobs.values():
            self._client.cancel(job)
        while self._jobs:
            await asyncio.wait(list(self._jobs))
        self._loop.remove_reader(self._queue.fileno())
        del self._queue

    async def __aenter__(self) -> "Queue":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _run(
        self,
        submit: Callable[["asyncio.Future[Completion]"], int],
        raises: bool = True,
    ) -> Completion:
        async with self._turn:
            if self._closed:
                raise _errors.make(-7, _CLOSED)
            mine: asyncio.Future[Completion] = self._loop.create_future()
            job = submit(mine)
            self._jobs[mine] = job
            try:
                # The future is the operation's: it ends when that does.
                done = await asyncio.shield(mine)
            except asyncio.CancelledError:
                self._client.cancel(job)
                await _ended(mine)
                raise
        if done.status < 0 and (raises or self._closed):
            what = _CLOSED if self._closed else f"operation {done.op}"
            raise _errors.make(done.status, what)
        return done

    def _take(self) -> None:
        completions: list[Any] = self._queue.poll()
        for done in completions:
            mine = done.user_data
            del self._jobs[mine]
            mine.set_result(done)


async def _ended(mine: "asyncio.Future[Completion]") -> None:
    """Waits for the end of what was taken back, even if cancelled again."""
    while not mine.done():
        try:
            await asyncio.shield(mine)
        except asyncio.CancelledError:
            pass

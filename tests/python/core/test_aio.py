"""Larder on an event loop, against a real daemon."""

import asyncio
import hashlib
import time

import numpy as np
import pytest
from test_kv import (
    BLOCKS,
    CHUNK,
    assert_holds,
    new_cache,
    open_space,
    paged,
    save_prompt,
)
from test_values import key, open_values, value

import larder
from larder import Reason, State, aio


@pytest.fixture
def client(shared_daemon):
    with larder.Client(
        shared_daemon.socket, deadline=20, worker_threads=2
    ) as client:
        yield client


def test_values(client):
    values = open_values(client, "aio")
    keys = [key(i) for i in range(4)]
    ids = values.ids_from_hashes(keys)

    async def main():
        async with aio.Queue(client) as queue:
            parts = [value(i, 500) for i in range(3)]
            assert await queue.put(values, keys[:3], parts) == bytes(3)
            out = [np.zeros(600, np.uint8) for _ in keys]
            reasons, sizes = await queue.get(values, keys, out)
            assert [Reason(r) for r in reasons] == [0, 0, 0, Reason.NEVER_SEEN]
            assert sizes == [500, 500, 500, 0]
            for i in range(3):
                assert np.array_equal(out[i][:500], value(i, 500))
            assert list(await queue.lookup(values, ids)) == [State.READY] * 3 + [
                State.MISS
            ]
            assert await queue.delete(values, ids) == 3
            assert await queue.lookup(values, ids) == bytes(4)
            assert queue.pending == 0

    asyncio.run(main())


def test_kv(client):
    space = open_space(client, b"aio")
    tokens = list(range(3 * CHUNK))
    ids = save_prompt(space, tokens, "aio")

    async def main():
        async with aio.Queue(client) as queue:
            match = await queue.match(space, ids)
            assert match.good == 3 and list(match.per_key) == [State.READY] * 3
            cache = new_cache()
            blocks = list(range(12))
            with await asyncio.to_thread(space.hold, ids) as hold:
                loaded = await queue.load(
                    space, ids, [paged(cache).blocks(blocks)], hold=hold
                )
            assert loaded.usable == 3 and loaded.tokens == 3 * CHUNK
            assert_holds(cache, "aio", blocks, 12, 12)
            space.delete(larder.Ids([ids[1]]))
            loaded = await queue.load(space, ids, [paged(cache).blocks(blocks)])
            assert loaded.usable == 1 and Reason(loaded.reason) == Reason.EVICTED
            with pytest.raises(larder.InvalidArgument):  # at once, before the loop
                await queue.load(space, ids, [paged(cache).blocks([BLOCKS] * 12)])
            assert queue.pending == 0

    asyncio.run(main())


def test_many_tasks(client):
    values = open_values(client, "aio many")
    count, limit, most = 400, 16, 0

    async def main():
        async with aio.Queue(client, limit=limit) as queue:

            async def one(number):
                nonlocal most
                put = await queue.put(values, [key(number)], [value(number, 3000)])
                assert put == b"\0"
                out = np.zeros(3000, np.uint8)
                reasons, sizes = await queue.get(values, [key(number)], [out])
                most = max(most, queue.pending)
                assert reasons == b"\0" and sizes == [3000]
                assert np.array_equal(out, value(number, 3000))

            await asyncio.gather(*(one(i) for i in range(count)))

    asyncio.run(main())
    assert 0 < most <= limit


def test_a_daemon_that_does_not_answer_blocks_nobody_else(daemon):
    client = larder.Client(daemon.socket, worker_threads=2)
    values = open_values(client, "aio stopped")
    ids = values.ids_from_hashes([key(1)])

    async def main():
        async with aio.Queue(client) as queue:
            await queue.put(values, [key(1)], [value(1, 100)])
            daemon.freeze()
            try:
                asked = asyncio.create_task(queue.lookup(values, ids, deadline=2))
                got = asyncio.create_task(
                    queue.get(values, [key(1)], [bytearray(100)], deadline=2)
                )
                ticks, started = 0, time.monotonic()
                while not (asked.done() and got.done()):
                    await asyncio.sleep(0.01)
                    ticks += 1
                assert ticks > 20 and time.monotonic() - started < 60
                with pytest.raises(larder.DeadlineExceeded):
                    await asked
                reasons, sizes = await got
                assert reasons[0] != 0 and sizes == [0]
            finally:
                daemon.thaw()

    asyncio.run(main())


def test_cancelling_a_task_takes_its_operation_back(daemon):
    client = larder.Client(daemon.socket, worker_threads=1)
    values = open_values(client, "aio cancelled")
    values.put([key(1)], [value(1, 1000)])

    async def main():
        async with aio.Queue(client, limit=4) as queue:
            daemon.freeze()
            outs = [bytearray(1000) for _ in range(8)]
            tasks = [
                asyncio.create_task(
                    queue.get(values, [key(1)], [out], deadline=5)
                )
                for out in outs
            ]
            await asyncio.sleep(0.1)
            assert queue.pending == 4  # the others wait for their turn
            for task in tasks[1:]:
                task.cancel()
            await asyncio.sleep(0.1)
            tasks[1].cancel()  # twice: it still waits for the end of its get
            daemon.thaw()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(d, asyncio.CancelledError) for d in done[1:])
            assert queue.pending == 0
            reasons, _ = done[0]
            if reasons == b"\0":
                assert outs[0] == value(1, 1000).tobytes()
            # What was taken back before it began has touched nothing.
            assert outs[2:] == [bytearray(1000)] * 6
            # The queue goes on.
            async with asyncio.timeout(60):
                while (await queue.get(values, [key(1)], outs[:1]))[0] != b"\0":
                    pass

    asyncio.run(main())


def test_a_timeout_is_a_cancellation(daemon):
    client = larder.Client(daemon.socket)
    values = open_values(client, "aio timeout")
    ids = values.ids_from_hashes([key(1)])

    async def main():
        async with aio.Queue(client) as queue:
            daemon.freeze()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await queue.lookup(values, ids, deadline=1)
            daemon.thaw()
            assert queue.pending == 0

    asyncio.run(main())


def test_closing_ends_those_who_wait(daemon):
    client = larder.Client(daemon.socket)
    values = open_values(client, "aio closed")
    ids = values.ids_from_hashes([key(1)])

    async def main():
        queue = aio.Queue(client, limit=2)
        daemon.freeze()
        tasks = [
            asyncio.create_task(queue.lookup(values, ids, deadline=2)) for _ in range(5)
        ]
        await asyncio.sleep(0.05)
        await queue.close()
        await queue.close()
        daemon.thaw()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, larder.Error) for end in ends)
        assert sum(isinstance(end, larder.Cancelled) for end in ends) >= 4
        with pytest.raises(larder.Cancelled):
            await queue.lookup(values, ids)

    asyncio.run(main())


def test_a_daemon_that_is_killed_under_many_tasks(daemon):
    client = larder.Client(daemon.socket, deadline=10, worker_threads=2)
    values = open_values(client, "aio killed")
    count = 200

    async def main():
        async with aio.Queue(client, limit=32) as queue:

            async def one(number):
                reasons = await queue.put(values, [key(number)], [value(number, 5000)])
                out = np.zeros(5000, np.uint8)
                got, _ = await queue.get(values, [key(number)], [out])
                if got == b"\0":  # right, or not at all
                    assert np.array_equal(out, value(number, 5000))
                return reasons[0], got[0]

            tasks = [asyncio.create_task(one(i)) for i in range(count)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            daemon.kill()
            ends = await asyncio.gather(*tasks)
            assert (0, 0) in ends
            assert any(Reason.UNAVAILABLE in end for end in ends)
            with pytest.raises(larder.Unavailable):
                await queue.lookup(values, values.ids_from_hashes([key(1)]))
            # Later calls reconnect.
            await asyncio.to_thread(daemon.start)
            async with asyncio.timeout(60):
                while await queue.put(values, [key(1)], [value(1, 9)]) != b"\0":
                    await asyncio.sleep(0.05)

    asyncio.run(main())


def test_what_it_refuses(client):
    values = open_values(client, "aio refused")

    async def main():
        with pytest.raises(ValueError):
            aio.Queue(client, limit=0)
        async with aio.Queue(client) as queue:
            with pytest.raises(ValueError, match="one length"):
                await queue.put(values, [b"a", b"bb"], [b"", b""])
            with pytest.raises(BufferError):
                await queue.get(values, [hashlib.md5(b"").digest()], [b"read only"])
            assert queue.pending == 0

    asyncio.run(main())
    with pytest.raises(RuntimeError):  # outside of a loop
        aio.Queue(client)

"""A real NIXL agent, with the plug-in as it is built, against a real larderd.

Called with "--read SOCKET KEY ..." it is another process's agent: it reads the
objects, and says how many had the bytes that their keys stand for.
"""

import functools
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

BUILD = pathlib.Path(__file__).resolve().parents[3] / "build" / "release"
os.environ["NIXL_PLUGIN_DIR"] = str(BUILD / "lib" / "nixl")
os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")

# After the environment: the agent's library looks at it when it is loaded.
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from nixl_cu12 import _bindings as nixl  # noqa: E402
from nixl_cu12 import (  # noqa: E402
    nixl_agent,
    nixl_agent_config,
    nixl_thread_sync_t,
)

# Of agents whose daemon does not answer; others may wait for a busy machine.
SHORT_DEADLINE_S = 2
# For what should come at once, or within two short deadlines.
IN_TIME_S = 2 * SHORT_DEADLINE_S + 4


def size_of(key):
    """Sizes around the multiples of 64 and 4096 bytes, and anything else."""
    seed = sum(key.encode()) * 7919
    return (1, 63, 64, 65, 4096, 4097, 65536, 100000 + seed % 100000)[seed % 8]


@functools.cache
def bytes_of(key, version=0):
    seed = [version, *key.encode()]
    return np.random.default_rng(seed).integers(0, 256, size_of(key), np.uint8)


class Agent:
    """An agent with the backend LARDER, and a buffer of host memory."""

    names = itertools.count()

    def __init__(self, socket, buffer_bytes=64 << 20, agent_config=None,
                 **parameters):
        self.name = f"agent-{os.getpid()}-{next(self.names)}"
        self.agent = nixl_agent(
            self.name, nixl_agent_config(backends=[], **(agent_config or {})))
        self.agent.create_backend("LARDER", {
            "socket": socket, "space": "test",
            "deadline_ms": "20000", **parameters})
        self.buffer = np.zeros(buffer_bytes, np.uint8)
        self.agent.register_memory(
            [(self.buffer.ctypes.data, buffer_bytes, 0, "")], "DRAM")
        self.devices = itertools.count(1)

    def move(self, operation, objects):
        """objects: (key, registered bytes, offset, bytes, place in buffer).
        Returns when it is done; raises as NIXL does if it fails."""
        devices = {}
        registered = []
        for key, registered_bytes, _, _, _ in objects:
            if key not in devices:
                devices[key] = next(self.devices)
                registered.append((0, registered_bytes, devices[key], key))
        registration = self.agent.register_memory(registered, "OBJ")
        try:
            handle = self.agent.initialize_xfer(
                operation,
                self.agent.get_xfer_descs(
                    [(self.buffer.ctypes.data + place, size, 0)
                     for _, _, _, size, place in objects], "DRAM"),
                self.agent.get_xfer_descs(
                    [(offset, size, devices[key])
                     for key, _, offset, size, _ in objects], "OBJ"),
                self.name)
            try:
                state = self.agent.transfer(handle)
                while state == "PROC":
                    state = self.agent.check_xfer_state(handle)
                    time.sleep(0)
                if state != "DONE":
                    raise RuntimeError(state)
            finally:
                self.agent.release_xfer_handle(handle)
        finally:
            self.agent.deregister_memory(registration)

    def laid_out(self, keys):
        place = 0
        objects = []
        for key in keys:
            objects.append((key, size_of(key), 0, size_of(key), place))
            place += size_of(key)
        return objects

    def write(self, keys, version=0):
        objects = self.laid_out(keys)
        for key, _, _, size, place in objects:
            self.buffer[place:place + size] = bytes_of(key, version)
        self.move("WRITE", objects)

    def read(self, keys, version=0):
        """How many of them had the right bytes; all were there."""
        objects = self.laid_out(keys)
        self.buffer[:] = 0xee
        self.move("READ", objects)
        return sum(bool((self.buffer[place:place + size]
                         == bytes_of(key, version)).all())
                   for key, _, _, size, place in objects)

    def query(self, keys):
        answers = self.agent.query_memory(
            [(0, size_of(key), i, key) for i, key in enumerate(keys)],
            "LARDER", "OBJ")
        return [answer is not None for answer in answers]


def keys_of(name, count):
    # Longer than Larder's own keys may be.
    return [f"org/model-8B@{name}@{i:04d}@" + "k" * (i % 90)
            for i in range(count)]


def fails_in_time(error, call, *arguments):
    start = time.monotonic()
    with pytest.raises(error):
        call(*arguments)
    assert time.monotonic() - start < IN_TIME_S


def comes_back(call, *arguments):
    """Until it succeeds: how soon is the client library's matter."""
    give_up = time.monotonic() + 20
    while True:
        try:
            return call(*arguments)
        except nixl.nixlBackendError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def read_one_by_one(agent, keys):
    """How many were there; those must have been right."""
    there = 0
    for key in keys:
        try:
            assert comes_back(agent.read, [key]) == 1
            there += 1
        except nixl.nixlNotFoundError:
            pass
    return there


def test_the_plugin_is_found_and_says_what_it_is():
    agent = nixl_agent("finder", nixl_agent_config(backends=[]))
    assert "LARDER" in agent.get_plugin_list()
    assert sorted(agent.get_plugin_mem_types("LARDER")) == ["DRAM_SEG", "OBJ_SEG"]
    assert set(agent.get_plugin_params("LARDER")) == {
        "socket", "token", "space", "deadline_ms", "value_bytes_max",
        "staging_bytes", "threads", "overwrite"}


def test_another_process_reads_what_was_written(daemon):
    agent = Agent(daemon.socket)
    keys = keys_of("shared", 600)
    assert sum(agent.query(keys)) == 0
    for begin in range(0, len(keys), 100):
        agent.write(keys[begin:begin + 100])
    assert sum(agent.query(keys)) == len(keys)
    assert agent.read(keys) == len(keys)
    other = subprocess.run(
        [sys.executable, __file__, "--read", daemon.socket, *keys],
        stdout=subprocess.PIPE, text=True, timeout=120)
    assert other.stdout == f"{len(keys)} right\n"


def test_prepared_lists_and_objects_that_are_written_again(daemon):
    # As LMCache does it: a pool of keys registered once, used in turn.
    a = Agent(daemon.socket)
    page, slots = 10000, 16
    a.agent.register_memory(
        [(0, page, i, f"slot-{i}") for i in range(slots)], "OBJ")
    memory = a.agent.prep_xfer_dlist(
        "", [(a.buffer.ctypes.data + i * page, page, 0)
             for i in range(2 * slots)], "DRAM")
    pool = a.agent.prep_xfer_dlist(
        a.name, [(0, page, i) for i in range(slots)], "OBJ")

    def run(operation, places, indices):
        handle = a.agent.make_prepped_xfer(operation, memory, places, pool,
                                           indices)
        state = a.agent.transfer(handle)
        while state == "PROC":
            state = a.agent.check_xfer_state(handle)
        a.agent.release_xfer_handle(handle)
        assert state == "DONE"

    random = np.random.default_rng(1)
    pages = a.buffer[:2 * slots * page].reshape(2 * slots, page)
    for _ in range(10):
        indices = [int(i) for i in random.permutation(slots)[:8]]
        want = random.integers(0, 256, (8, page), np.uint8)
        pages[:8] = want
        run("WRITE", list(range(8)), indices)
        run("READ", list(range(slots, slots + 8)), indices)
        assert (pages[slots:slots + 8] == want).all()
    a.agent.release_dlist_handle(memory)
    a.agent.release_dlist_handle(pool)


def test_pieces_and_parts(daemon):
    agent = Agent(daemon.socket)
    want = np.random.default_rng(2).integers(0, 256, 50000, np.uint8)
    agent.buffer[:50000] = want
    agent.move("WRITE", [("whole", 50000, 0, 20000, 0),
                         ("whole", 50000, 20000, 30000, 20000)])
    agent.buffer[:] = 0
    agent.move("READ", [("whole", 50000, 40001, 999, 100),
                        ("whole", 50000, 7, 93, 0)])
    assert (agent.buffer[:93] == want[7:100]).all()
    assert (agent.buffer[100:1099] == want[40001:41000]).all()
    assert not agent.buffer[93:100].any()
    with pytest.raises(nixl.nixlNotSupportedError):
        agent.move("WRITE", [("whole", 50000, 100, 10, 0)])
    with pytest.raises(nixl.nixlMismatchError):
        agent.move("READ", [("whole", 60000, 49999, 2, 0)])
    with pytest.raises(nixl.nixlMismatchError):
        agent.move("READ", [("whole", 10, 0, 10, 0)])


def test_a_missing_object_is_not_found(daemon):
    agent = Agent(daemon.socket)
    agent.write(["there"])
    assert agent.query(["there", "not"]) == [True, False]
    fails_in_time(nixl.nixlNotFoundError, agent.read, ["not"])
    assert (agent.buffer == 0xee).all()
    fails_in_time(nixl.nixlNotFoundError, agent.read, ["there", "not"])
    assert agent.read(["there"]) == 1


def test_a_killed_daemon_is_an_error_and_its_return_is_noticed(daemon):
    agent = Agent(daemon.socket)
    for life in range(3):
        keys = keys_of(f"life {life}", 50)
        comes_back(agent.write, keys)
        assert agent.read(keys) == 50
        daemon.kill()
        fails_in_time(nixl.nixlBackendError, agent.read, keys)
        fails_in_time(nixl.nixlBackendError, agent.write, keys)
        fails_in_time(nixl.nixlBackendError, agent.query, keys)
        daemon.start()
        # What the disk had by then, and nothing else than a miss for the rest.
        there = sum(comes_back(agent.query, keys))
        assert read_one_by_one(agent, keys) == there


def test_a_daemon_killed_under_transfers_never_means_wrong_bytes(daemon):
    agent = Agent(daemon.socket)
    keys = keys_of("under", 400)
    agent.write(keys)
    killed = threading.Event()

    def kill_and_start():
        for life in range(8):
            time.sleep(0.3 + 0.013 * life)
            daemon.kill()
            daemon.start()
        killed.set()

    killer = threading.Thread(target=kill_and_start)
    killer.start()
    reads = failures = 0
    while not killed.is_set():
        try:
            assert agent.read(keys) == len(keys)
            reads += 1
        except (nixl.nixlBackendError, nixl.nixlNotFoundError):
            failures += 1
            try:
                agent.write(keys)
            except nixl.nixlBackendError:
                pass
    killer.join()
    comes_back(agent.write, keys)
    assert agent.read(keys) == len(keys)
    assert reads > 0 and failures > 0
    print(f"{reads} reads were whole, {failures} failed")


def test_a_daemon_that_does_not_answer_costs_no_more_than_the_deadline(daemon):
    agent = Agent(daemon.socket, deadline_ms=str(SHORT_DEADLINE_S * 1000))
    agent.write(["key"])
    daemon.freeze()
    fails_in_time(nixl.nixlBackendError, agent.read, ["key"])
    fails_in_time(nixl.nixlBackendError, agent.write, ["key"])
    fails_in_time(nixl.nixlBackendError, agent.query, ["key"])
    daemon.thaw()
    comes_back(agent.write, ["key"])
    assert agent.read(["key"]) == 1


def test_the_daemon_may_come_later(daemon):
    daemon.end()
    agent = Agent(daemon.socket)
    fails_in_time(nixl.nixlBackendError, agent.write, ["key"])
    fails_in_time(nixl.nixlBackendError, agent.query, ["key"])
    daemon.start()
    comes_back(agent.write, ["key"])
    assert agent.read(["key"]) == 1


def test_a_disk_keeps_objects_over_a_restart(daemon):
    agent = Agent(daemon.socket)
    keys = keys_of("kept", 100)
    agent.write(keys)
    daemon.end(signal.SIGTERM)
    daemon.start()
    assert comes_back(agent.read, keys) == len(keys)


@pytest.mark.parametrize("bad", [
    {"space": ""}, {"sokcet": "/s"}, {"deadline_ms": "soon"},
    {"deadline_ms": "0"}, {"value_bytes_max": "-1"}, {"threads": "100"},
    {"overwrite": "1"}, {"token": "nobody has it"}])
def test_bad_parameters_are_refused(shared_daemon, bad):
    with pytest.raises(nixl.nixlBackendError):
        Agent(shared_daemon.socket, **bad)


def test_the_token_decides_and_is_not_shown(make_daemon, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("engine a-secret-of-enough-length\n")
    tokens.chmod(0o600)
    daemon = make_daemon(f"--server.tokens_file={tokens}")
    agent = Agent(daemon.socket, token="a-secret-of-enough-length")
    agent.write(["key"])
    assert agent.read(["key"]) == 1
    assert "token" not in agent.agent.get_backend_params("LARDER")
    # Another tenant of the same daemon.
    assert Agent(daemon.socket).query(["key"]) == [False]


def test_threads_share_an_agent(daemon):
    agent = Agent(daemon.socket, threads="2", agent_config={
        "sync_mode": nixl_thread_sync_t.NIXL_THREAD_SYNC_RW,
        "capture_telemetry": True})
    right = []

    def work(thread):
        mine = agent.buffer[thread << 20:(thread + 1) << 20]
        size = 1000
        for i in range(50):
            mine[:size] = (thread * 50 + i) % 251
            objects = [(f"{thread}/{i}", size, 0, size, thread << 20)]
            agent.move("WRITE", objects)
            mine[:size] = 255
            agent.move("READ", objects)
            right.append(bool((mine[:size] == (thread * 50 + i) % 251).all()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 300 and all(right)


if __name__ == "__main__":
    assert sys.argv[1] == "--read"
    print(f"{Agent(sys.argv[2]).read(sys.argv[3:])} right")

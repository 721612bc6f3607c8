"""What the tests of every engine share: a real larderd of their own."""

import contextlib
import os
import pathlib
import signal
import subprocess
import tempfile
import time

import pytest

BIN = pathlib.Path(__file__).resolve().parents[2] / "build" / "release" / "bin"


class Daemon:
    """A larderd in a folder of its own, with a DRAM and an NVMe tier."""

    def __init__(self, *flags: str):
        # Not pytest's folder: a Unix socket's path is at most 107 bytes long.
        self._folder = tempfile.TemporaryDirectory(prefix="larder-")
        self.folder = pathlib.Path(self._folder.name)
        self.socket = str(self.folder / "engine.sock")
        self.admin = str(self.folder / "admin.sock")
        (self.folder / "nvme").mkdir(mode=0o700)
        self.flags = list(flags)
        self.process: subprocess.Popen | None = None

    def start(self) -> "Daemon":
        log = open(self.folder / "log", "a")
        self.process = subprocess.Popen(
            [
                BIN / "larderd",
                f"--server.socket={self.socket}",
                f"--admin.socket={self.admin}",
                "--dram.capacity=512MiB",
                "--dram.slab=64MiB",
                f"--nvme.path={self.folder / 'nvme'}",
                "--nvme.capacity=2GiB",
                "--nvme.segment_file=64MiB",
                *self.flags,
            ],
            stdout=log,
            stderr=log,
        )
        log.close()
        until = time.monotonic() + 60
        while not self.serves():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < until, self.log()
            time.sleep(0.02)
        return self

    def serves(self) -> bool:
        try:
            self.larder("status")
        except subprocess.CalledProcessError:
            return False
        return True

    def larder(self, *arguments: str) -> str:
        """What `larder ARGUMENTS` prints."""
        return subprocess.run(
            [BIN / "larder", "--socket", self.admin, *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout

    def end(self, number: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(60)

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def freeze(self) -> None:
        """It is there, and answers nothing. A signal takes its time, and threads
        that still ran could answer: waits until none does."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self._folder.cleanup()


@contextlib.contextmanager
def running(*flags: str):
    """A running daemon with flags of its own; killed at the end."""
    made = Daemon(*flags)
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture
def daemon():
    """A running daemon, for one test."""
    with running() as made:
        yield made


@pytest.fixture(scope="session")
def shared_daemon():
    """A running daemon, for tests that leave it as it is."""
    with running() as made:
        yield made


@pytest.fixture
def make_daemon():
    """Running daemons with flags of the test's own."""
    with contextlib.ExitStack() as all_of_them:
        yield lambda *flags: all_of_them.enter_context(running(*flags))

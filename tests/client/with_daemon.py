"""Runs a program beside a larderd of its own: with_daemon.py LARDERD PROGRAM
ARGUMENT... In arguments {socket} is the daemon's socket. Ends as the program does."""

import pathlib
import subprocess
import sys
import tempfile
import time


def main() -> int:
    larderd, *command = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="larder-") as name:
        folder = pathlib.Path(name)
        (folder / "nvme").mkdir(mode=0o700)
        address = folder / "engine.sock"
        daemon = subprocess.Popen(
            [
                larderd, f"--server.socket={address}",
                f"--admin.socket={folder / 'admin.sock'}", "--dram.capacity=512MiB",
                "--dram.slab=64MiB", f"--nvme.path={folder / 'nvme'}",
                "--nvme.capacity=1GiB", "--nvme.segment_file=64MiB",
            ],
            stdout=subprocess.DEVNULL,
        )
        try:
            until = time.monotonic() + 60
            while not address.exists():
                if daemon.poll() is not None or time.monotonic() > until:
                    return 1
                time.sleep(0.02)
            words = [word.replace("{socket}", str(address)) for word in command]
            return subprocess.run(words).returncode
        finally:
            daemon.terminate()
            daemon.wait(60)


if __name__ == "__main__":
    sys.exit(main())

"""Programs written for Mooncake's store, with Larder in its place: Mooncake's own
answers beside ours, and Mooncake's own programs."""

import asyncio
import ctypes
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import conftest
import documents
import numpy as np
import pytest
from patience import until

import larder
import larder.mooncake

larder.mooncake.install()  # before anything here imports mooncake.store

HERE = pathlib.Path(__file__).parent
# This folder of tests must not be taken for the package.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


def run(*command, **options):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        check=True, capture_output=True, text=True, timeout=300, env=ENVIRONMENT,
        cwd="/", **options,
    ).stdout


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def store(shared_daemon):
    made = larder.mooncake.MooncakeDistributedStore()
    code = made.setup(
        "localhost", "ignored", 0, 0, "tcp", "", f"larder://{shared_daemon.socket}"
    )
    assert code == 0
    yield made
    made.remove_all()
    made.close()


@pytest.fixture
def mooncake_master(tmp_path):
    """Mooncake's own master, with its metadata server: their addresses."""
    import mooncake

    program = pathlib.Path(mooncake.__path__[0]) / "mooncake_master"
    if not program.exists():
        pytest.skip("Mooncake's master is not installed")
    rpc, http, metrics = free_port(), free_port(), free_port()
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [
                sys.executable, "-c",
                "import sys; from mooncake.cli import main; main()",
                f"--rpc_port={rpc}", "--enable_http_metadata_server=true",
                "--http_metadata_server_host=127.0.0.1",
                f"--http_metadata_server_port={http}", f"--metrics_port={metrics}",
            ],
            stdout=log, stderr=log, env=ENVIRONMENT, cwd="/",
        )
    try:
        end = time.monotonic() + 60
        for port in (rpc, http):
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    assert time.monotonic() < end
                    time.sleep(0.1)
        yield f"127.0.0.1:{rpc}", f"http://127.0.0.1:{http}/metadata"
    finally:
        process.terminate()
        process.wait(60)


def last_line(text):
    return json.loads(text.splitlines()[-1])


def test_answers_as_mooncake_does(daemon, mooncake_master):
    theirs = last_line(run(HERE / "semantics.py", *mooncake_master))
    ours = last_line(
        run("-m", "larder.mooncake", "--socket", daemon.socket, HERE / "semantics.py")
    )
    assert len(ours) > 60
    assert {k: v for k, v in ours.items() if theirs[k] != v} == {}


def test_the_async_store_of_mooncake(store, shared_daemon):
    from mooncake.async_store import MooncakeDistributedStoreAsync

    async def main():
        other = MooncakeDistributedStoreAsync()
        assert await other.async_setup(
            "localhost", "ignored", 0, 0, "tcp", "", f"larder://{shared_daemon.socket}"
        ) == 0
        codes = await asyncio.gather(
            *(other.async_put(f"async {i}", b"v" * (i + 1)) for i in range(50))
        )
        assert codes == [0] * 50
        got = await asyncio.gather(
            *(other.async_get(f"async {i}") for i in range(51))
        )
        assert got == [b"v" * (i + 1) for i in range(50)] + [b""]
        assert await other.async_remove("async 1") == 0
        with pytest.raises(AttributeError):
            other.async_nonsense
        await other.async_close()

    asyncio.run(main())
    assert store.get("async 2") == b"vvv"


def test_structured_objects_of_mooncake(store):
    from mooncake.structured_object_store import MooncakeBundleTransfer

    transfer = MooncakeBundleTransfer(store, default_chunk_bytes=64 << 10)
    made = np.random.default_rng(1)
    thing = {
        "floats": made.random((300, 200)).astype(np.float32),
        "ints": np.arange(1000),
        "bytes": bytes(range(256)) * 1000,
    }
    ref = transfer.put_object(thing)
    got = transfer.get_object(ref)
    assert np.array_equal(got["floats"], thing["floats"])
    assert np.array_equal(got["ints"], thing["ints"])
    assert bytes(got["bytes"]) == thing["bytes"]
    transfer.remove_bundle(ref)
    with pytest.raises(Exception):
        transfer.get_object(ref)


def test_the_store_service_of_mooncake(shared_daemon, tmp_path):
    port = free_port()
    configuration = tmp_path / "mooncake.json"
    configuration.write_text(json.dumps({
        "local_hostname": "localhost", "metadata_server": "ignored",
        "global_segment_size": 0, "local_buffer_size": 0, "protocol": "tcp",
        "device_name": "", "master_server_address": f"larder://{shared_daemon.socket}",
    }))
    service = subprocess.Popen(
        [sys.executable, "-m", "larder.mooncake", "-m",
         "mooncake.mooncake_store_service", "--config", configuration,
         "--port", str(port)],
        env=ENVIRONMENT, cwd="/", stderr=subprocess.PIPE, text=True,
    )

    def ask(method, path, body=None):
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/{path}", method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    try:
        end = time.monotonic() + 60
        while True:
            try:
                ask("GET", "exist/none")
                break
            except OSError:
                assert service.poll() is None, service.stderr.read()
                assert time.monotonic() < end
                time.sleep(0.1)
        assert ask("PUT", "put", {"key": "rest", "value": "a value"})[0] == 200
        assert ask("GET", "get/rest") == (200, b"a value")
        assert json.loads(ask("GET", "exist/rest")[1]) == {"exists": True}
        assert ask("GET", "get/none")[0] == 404
        assert ask("DELETE", "remove/rest")[0] == 200
        assert json.loads(ask("GET", "exist/rest")[1]) == {"exists": False}
        assert ask("DELETE", "remove_all")[0] == 200
    finally:
        service.terminate()
        service.communicate(timeout=60)


def test_tenants_have_spaces_of_their_own(store, shared_daemon):
    other = larder.mooncake.MooncakeDistributedStore()
    assert other.setup({
        "local_hostname": "localhost", "metadata_server": "ignored",
        "master_server_addr": f"larder://{shared_daemon.socket}",
        "tenant_id": "another",
    }) == 0
    store.put("shared?", b"mine")
    assert other.get("shared?") == b"" and other.get_size("shared?") == -704
    other.put("shared?", b"yours")
    assert store.remove_all() == 1
    assert other.get("shared?") == b"yours" and other.remove_all() == 1


def test_large_and_many(store):
    value = np.random.default_rng(2).integers(0, 256, 40 << 20, dtype=np.uint8)
    assert store.put_from("large", value.ctypes.data, value.nbytes) == 0
    assert store.get_size("large") == value.nbytes
    out = np.zeros_like(value)
    assert store.get_into("large", out.ctypes.data, out.nbytes) == value.nbytes
    assert np.array_equal(out, value)
    assert store.put("too large", bytes(1)) == 0
    too_large = ctypes.c_char()
    size = larder.mooncake.VALUE_BYTES_MAX + 1
    # Refused by its size: nothing of it is read.
    assert store.put_from("t", ctypes.addressof(too_large), size) == -600
    count = 500
    keys = [f"many {i}" for i in range(count)]
    at = value.ctypes.data
    codes = store.batch_put_from(keys, [at + i for i in range(count)], [999] * count)
    assert codes == [0] * count
    assert store.batch_is_exist(keys) == [1] * count
    assert store.get_batch(keys) == [value[i : i + 999].tobytes() for i in range(count)]


def test_nothing_raises_when_there_is_no_daemon(daemon):
    store = larder.mooncake.MooncakeDistributedStore()
    assert store.put("a", b"v") == store.is_exist("a") == -1010
    assert store.get("a") == b"" and store.get_buffer("a") is None
    assert store.health_check() == -1010 and store.close() == 0
    assert store.setup("l", "m", 0, 0, "tcp", "", "larder:///nobody/here") == -900
    assert store.put("a", b"v") == -1010
    address = f"larder://{daemon.socket}"
    assert store.setup("l", "m", 0, 0, "tcp", "", address) == 0
    assert store.put("a", b"v") == 0
    daemon.kill()
    assert store.put("b", b"v") == store.get_size("a") == store.is_exist("a") == -900
    assert store.batch_is_exist(["a", "b"]) == [-900] * 2
    assert store.get("a") == b"" and store.remove("a") == -900
    assert store.health_check() == -900
    daemon.start()
    until(lambda: store.put("b", b"v") == 0)
    assert store.get("b") == b"v"
    assert store.close() == 0 and store.close() == 0
    assert store.get_size("b") == -1010


def test_takes_the_place_of_the_module(shared_daemon, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "import mooncake.store\n"
        "from mooncake import store as again\n"
        "from mooncake.store import MooncakeDistributedStore, ReplicateConfig\n"
        "assert again is mooncake.store and __name__ == '__main__'\n"
        "store = MooncakeDistributedStore()\n"
        "assert store.setup('l', 'm', 0, 0, 'tcp', '', 'm:1') == 0\n"
        "assert store.put('installed', b'v', ReplicateConfig()) == 0\n"
        "print(store.get('installed').decode(), sys.argv[1:])\n"
    )
    out = run("-m", "larder.mooncake", "--socket", shared_daemon.socket, program,
              "--socket", "mine")
    assert out == "v ['--socket', 'mine']\n"
    # Too late, it says so.
    late = "import mooncake.store, larder.mooncake as m\n" \
           "try: m.install()\nexcept RuntimeError as e: print(e)"
    assert "imported already" in run("-c", late)


def test_the_same_values_in_c(daemon):
    program = conftest.BIN / "mooncake_c_test"
    if not program.exists():
        pytest.skip("tools/build larder_mooncake mooncake_c_test")
    address = f"larder://{daemon.socket}"
    subprocess.run([program, address], check=True, timeout=300)
    store = larder.mooncake.MooncakeDistributedStore()
    assert store.setup("l", "m", 0, 0, "tcp", "", address) == 0
    assert store.get("c left") == b"for Python" and store.remove_all() == 1


def test_unsupported_calls_look_so(store):
    for name in ("put_tensor", "mount_segment", "get_into_ranges", "setup_dummy"):
        assert not hasattr(store, name)  # how programs ask
    assert store.remove_by_regex(".*") == -1011
    with pytest.raises(TypeError):
        store.put("a", "text")


def test_the_document(daemon):
    documents.run("client/python/docs/mooncake.md", socket=daemon.socket)

"""The package as it is installed: types, and nothing it should not need."""

import pathlib
import subprocess
import sys

import larder


def test_the_stub_types_what_users_write(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import larder\n"
        "def load(space: larder.Space, ids: larder.Ids, view: larder.View) -> int:\n"
        "    with larder.Client('/run/x', deadline=1.5) as client:\n"
        "        client.ping()\n"
        "    return space.load(ids, [view]).usable\n"
    )
    subprocess.run([sys.executable, "-m", "mypy", "--strict", program], check=True)
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import larder\nlarder.Client(5)\n")
    assert subprocess.run([sys.executable, "-m", "mypy", wrong]).returncode == 1


def test_imports_no_engine():
    code = "import sys, larder; print([m for m in sys.modules if m in" \
           " ('torch', 'numpy', 'vllm', 'lmcache', 'sglang')])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]"


def test_brings_its_library_along():
    folder = pathlib.Path(larder.__file__).parent
    assert (folder / "liblarder.so.0").exists() and (folder / "py.typed").exists()


def test_every_public_name_says_what_it_is():
    for name in larder.__all__:
        assert getattr(larder, name).__doc__, name

"""How what adapters rely on is rendered and compared, with an engine made up in two
releases; and that every adapter's imports are on its list."""

import pathlib
import sys
import textwrap

import pytest
import surface

ADAPTERS = pathlib.Path(__file__).resolve().parents[3] / "client" / "python" / "larder"
FOLDERS = {  # of tests -> the engine's package, and the adapter
    "hf": ("transformers", "hf.py"),
    "lmcache": ("lmcache", "lmcache"),
    "sglang": ("sglang", "sglang"),
    "trtllm": ("tensorrt_llm", "trtllm.py"),
    "vllm": ("vllm", "vllm"),
}

OLD = """
    import abc, dataclasses, enum

    class Base(abc.ABC):
        limit = 3
        def __init__(self, config: "Config"):
            self.config: Config = config
            self.first, self.second = 1, 2
        @abc.abstractmethod
        def load(self, key: str, wait: float = 1.5) -> bool: ...
        @property
        def ready(self) -> bool: return True
        @classmethod
        def of(cls, text): ...
        async def later(self): ...
        def going(self): ...
        def _own(self): ...

    @dataclasses.dataclass
    class Config:
        name: str
        sizes: list = dataclasses.field(default_factory=list)

    class Kind(enum.Enum):
        FULL = 1

    class Helper:
        def help(self): ...

    def make(marker=object()): ...
"""
NEW = """
    import abc, dataclasses, enum

    class Base(abc.ABC):
        limit = 3
        def __init__(self, config: "Config"):
            self.config: Config = config
            self.first = 1
        @abc.abstractmethod
        def load(self, key: str, *, wait: float = 1.5) -> bool: ...
        @abc.abstractmethod
        def save(self, key: str) -> None: ...
        @property
        def ready(self) -> bool: return True
        @classmethod
        def of(cls, text): ...
        async def later(self): ...
        def hook(self): ...
        def _own(self): ...

    @dataclasses.dataclass
    class Config:
        name: str
        sizes: list = dataclasses.field(default_factory=list)
        salt: str | None = None

    class Kind(enum.Enum):
        FULL = 1

    def make(marker=object()): ...
"""
NAMES = [
    "made_up.Base.*", "made_up.Base.config", "made_up.Base.second", "made_up.Config",
    "made_up.Config.name", "made_up.Kind", "made_up.Helper", "made_up.Helper.help",
    "made_up.make", "made_up.sub.Thing", "not_there.Thing",
]  # fmt: skip


@pytest.fixture
def release(tmp_path, monkeypatch):
    """Renders NAMES for an engine whose only module has the given text."""
    made = iter(range(9))

    def rendered(text):
        folder = tmp_path / str(next(made))
        folder.mkdir()
        (folder / "made_up.py").write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(folder)
        sys.modules.pop("made_up", None)
        return surface.render(NAMES)

    yield rendered
    sys.modules.pop("made_up", None)


def test_rendering(release):
    assert release(OLD) == {
        "made_up.Base": "class(ABC)",
        "made_up.Base.__init__": "(self, config: 'Config')",
        "made_up.Base.going": "(self)",
        "made_up.Base.later": "async (self)",
        "made_up.Base.limit": "= 3",
        "made_up.Base.load": "abstract (self, key: str, wait: float = 1.5) -> bool",
        "made_up.Base.of": "classmethod (cls, text)",
        "made_up.Base.ready": "property -> bool",
        "made_up.Base.config": "attribute, Config",
        "made_up.Base.second": "attribute",
        "made_up.Config": "dataclass",
        "made_up.Config.name": "str",
        "made_up.Config.sizes": "list = list()",
        "made_up.Kind": "class(Enum)",
        "made_up.Kind.FULL": "= 1",
        "made_up.Helper": "class",
        "made_up.Helper.help": "(self)",
        "made_up.make": "(marker=<object object>)",
        "made_up.sub.Thing": "absent: made_up has no sub",
        "not_there.Thing": "absent: there is no package not_there",
    }


def test_a_lock_says_it_all(release):
    rendered = release(OLD)
    assert surface.read(surface.written("engine 1", rendered)) == ("engine 1", rendered)


def test_the_report_names_what_changed(release):
    old = surface.written("engine 1", release(OLD))
    new = surface.written("engine 2", release(NEW))
    assert surface.report(old, new) == textwrap.dedent("""\
        engine 1 -> 2: what the adapter relies on has changed
          gone, and the adapter uses it:
            Base.second: made_up.Base has no second
            Helper: made_up has no Helper
          new abstract methods, without which the adapter's class cannot be made:
            Base.save(self, key: str) -> None, in made_up
          gone from classes that the adapter uses:
            Base.going gone from made_up
          changed:
            Base.load, in made_up:
              abstract (self, key: str, wait: float = 1.5) -> bool
            became
              abstract (self, key: str, *, wait: float = 1.5) -> bool
          new, perhaps of use:
            Base.hook: (self), in made_up
            Config.salt: str | None = None, in made_up""")
    assert surface.report(old, old) == "engine 1 -> 1: what the adapter relies on is the same"


def test_an_engine_that_does_not_import_is_absent_not_an_error(release):
    rendered = release("import asdf_is_not_installed")
    assert rendered["made_up.Config"] == (
        "absent: made_up does not import: No module named 'asdf_is_not_installed'"
    )


def test_an_override_that_is_not_listed_is_found(release):
    rendered = release(OLD)
    import made_up

    class Ours(made_up.Base):
        def load(self, key, wait=1.5): ...
        def going(self): ...
        def mine(self): ...
        def _own(self): ...

    assert surface.not_listed(rendered, "made_up", Ours) == set()
    del rendered["made_up.Base.going"]
    assert surface.not_listed(rendered, "made_up", Ours) == {"made_up.Base.going"}


def test_parameters():
    assert surface.parameters("abstract (self, a: dict[str, int] = {}, *b) -> x") == [
        "self", "a", "b"]  # fmt: skip
    assert surface.parameters("(self: m.S, k: str, c: m.C = <m.C object>) -> int") == [
        "self", "k", "c"]  # fmt: skip
    assert surface.parameters("property") == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_an_adapter_imports_is_listed(folder):
    package, adapter = FOLDERS[folder]
    path = ADAPTERS / adapter
    sources = [path] if path.is_file() else sorted(path.glob("*.py"))
    listed = surface.listed(folder)
    imported = surface.imports(sources, package)
    assert imported
    unlisted = {
        name
        for name in imported
        if not any(each == name or each.startswith(f"{name}.") for each in listed)
    }
    assert unlisted == set()


@pytest.mark.parametrize("folder", [*FOLDERS, "mooncake_store", "nixl"])
def test_the_lock_belongs_to_the_pin_and_the_list(folder):
    title, lock = surface.read(surface.locked(folder))
    pin = surface.pinned(folder)
    assert pin is None or title == " ".join(pin)
    wanted = {name.removesuffix(".*") for name in surface.listed(folder)}
    assert wanted and wanted <= set(lock)
    # What is listed is there, but for where trtllm.py looks first.
    absent = {name for name, text in lock.items() if text.startswith(surface.ABSENT)}
    assert all("pyexecutor.connectors" in name for name in absent)

"""What Larder's adapters rely on of an engine, as text that can be compared.

tests/python/NAME/surface.txt lists names of the engine, one a line: classes (with
their fields, or what must be implemented), functions, attributes. `.*` behind a
class stands for every public member: for what an adapter derives from, so that a
new hook is seen too. surface.lock beside it says what they are in the pinned
release; `tools/test-engines --surface NAME` makes it, and `--newest` and `--with`
say how another release differs.

  python surface.py NAME     what the names are for this Python
"""

import ast
import collections.abc
import dataclasses
import enum
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import typing
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
# Rendered in place of a name that cannot be found, with the reason behind it.
ABSENT = "absent"
# Before what a class that derives must have.
ABSTRACT = "abstract "
Surface = dict[str, str]


# ---- Files ----


def listed(name: str) -> list[str]:
    """The names in NAME's surface.txt."""
    file = HERE / name / "surface.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def pinned(name: str) -> tuple[str, str] | None:
    """(package, version) of the engine that NAME's requirements pin."""
    for file in sorted((HERE / name).glob("requirements*.txt")):
        if found := re.search(r"^(\S+)==(\S+)\s+# engine", file.read_text(), re.M):
            return found[1], found[2]
    return None


def locked(name: str) -> str:
    """NAME's surface.lock."""
    return (HERE / name / "surface.lock").read_text()


def written(title: str, surface: Surface) -> str:
    """A surface as the text of a lock."""
    return "".join([f"# {title}\n", *(f"{n}: {text}\n" for n, text in surface.items())])


def read(text: str) -> tuple[str, Surface]:
    """The title and the surface of a lock."""
    title, *lines = text.splitlines()
    return title.removeprefix("# "), dict(line.split(": ", 1) for line in lines)


# ---- Rendering ----


def render(names: list[str]) -> Surface:
    """What the names are here. Never raises: what is not there is rendered so."""
    surface: Surface = {}
    for name in names:
        plain = name.removesuffix(".*")
        try:
            owner, found = _find(plain)
        except LookupError as error:
            surface[plain] = f"{ABSENT}: {error.args[0]}"
            continue
        if inspect.isclass(found):
            members = _class(found, every=plain != name)
            surface[plain] = _kind(found)
            surface.update({f"{plain}.{m}": text for m, text in members.items()})
        elif inspect.isclass(owner):
            surface[plain] = found
        else:
            surface[plain] = _function(found) if callable(found) else _value(found)
    return {name: _tidy(text) for name, text in surface.items()}


def _find(name: str) -> tuple[Any, Any]:
    """The owner of what a dotted name stands for, and that; of a class's attribute
    its text. LookupError says what is missing from where."""
    parts = name.split(".")
    owner: Any = None
    found: Any = None
    for at, part in enumerate(parts):
        path, before = ".".join(parts[: at + 1]), ".".join(parts[:at])
        if found is None or inspect.ismodule(found):
            try:
                owner, found = found, importlib.import_module(path)
                continue
            except ModuleNotFoundError as error:
                if error.name != path:  # something that the module asks for
                    raise LookupError(f"{path} does not import: {error}") from None
                if found is None:
                    raise LookupError(f"there is no package {path}") from None
            except Exception as error:  # noqa: BLE001: engines raise anything
                raise LookupError(f"{path} does not import: {error!r}") from None
        owner = found
        if inspect.isclass(owner) and at == len(parts) - 1:
            text = _member(owner, part)
            if text is None:
                raise LookupError(f"{before} has no {part}")
            return owner, text
        if not hasattr(owner, part):
            raise LookupError(f"{before} has no {part}")
        found = getattr(owner, part)
    return owner, found


def _kind(cls: type) -> str:
    bases = ", ".join(b.__name__ for b in cls.__bases__ if b is not object)
    kind = "dataclass" if dataclasses.is_dataclass(cls) else "class"
    return f"{kind}({bases})" if bases else kind


def _class(cls: type, every: bool) -> Surface:
    """Its fields; without any, how it is made and what must be implemented.
    `every`: and all else that is public."""
    members = _fields(cls)
    if not members and "__init__" in _all(cls):
        members["__init__"] = _member(cls, "__init__") or "callable"
    for name in sorted(_all(cls)):
        must = name in getattr(cls, "__abstractmethods__", ())
        if must or (every and not name.startswith("_") and name not in members):
            members[name] = _member(cls, name) or "attribute"
    return members


def _all(cls: type) -> dict[str, Any]:
    """Attributes of a class and its bases, but for those of Python itself."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__ not in ("builtins", "abc", "enum", "typing"):
            found.update(vars(base))
    return found


def _fields(cls: type) -> Surface:
    """Of enums, dataclasses, pydantic models, msgspec structures, named tuples."""
    types_of = _annotations(cls)
    if issubclass(cls, enum.Enum):
        return {member.name: f"= {member.value!r}" for member in cls}
    if dataclasses.is_dataclass(cls):
        return {f.name: _typed(f.type, _default(f)) for f in dataclasses.fields(cls)}
    if isinstance(of := getattr(cls, "model_fields", None), dict):
        return {n: _typed(f.annotation, _default(f)) for n, f in of.items()}
    names = getattr(cls, "__struct_fields__", None) or getattr(cls, "_fields", ())
    if isinstance(names, tuple):
        return {n: _typed(types_of.get(n, Any), "") for n in names}
    return {}


def _default(field: Any) -> str:
    """Of a dataclass's field or a pydantic one; "" if a value must be given."""
    if field.default_factory not in (None, dataclasses.MISSING):
        return f" = {getattr(field.default_factory, '__name__', 'factory')}()"
    if field.default is dataclasses.MISSING or "Undefined" in repr(field.default):
        return ""
    return f" = {field.default!r}"


def _typed(annotation: Any, default: str) -> str:
    """An annotation and a default. Without what Annotated adds: help texts."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = annotation.__origin__
    if not isinstance(annotation, str):
        annotation = inspect.formatannotation(annotation)
    elif annotation.startswith("Annotated["):
        inside = ast.parse(annotation, mode="eval").body.slice  # type: ignore[attr-defined]
        annotation = ast.unparse(inside.elts[0])
    return annotation + default


def _annotations(cls: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        found.update(vars(base).get("__annotations__", {}))
    return found


def _member(cls: type, name: str) -> str | None:
    """An attribute of a class or of its instances; None if there is none."""
    fields = _fields(cls)
    if name in fields:
        return fields[name]
    found = _all(cls)
    if name in found:
        text = _attribute(found[name])
        must = name in getattr(cls, "__abstractmethods__", ())
        return f"{ABSTRACT}{text}" if must else text
    if name in (types_of := _annotations(cls)):
        return _typed(types_of[name], "")
    return _assigned(cls, name)


def _attribute(found: Any) -> str:
    if isinstance(found, (classmethod, staticmethod)):
        return f"{type(found).__name__} {_function(found.__func__)}"
    if isinstance(found, (property, functools.cached_property)):
        getter = found.fget if isinstance(found, property) else found.func
        try:
            returns = inspect.signature(getter).return_annotation  # type: ignore[arg-type]
        except (ValueError, TypeError):
            return "property"
        known = returns is not inspect.Signature.empty
        return f"property -> {_typed(returns, '')}" if known else "property"
    return _function(found) if callable(found) else _value(found)


def _function(found: Any) -> str:
    kind = "async " if inspect.iscoroutinefunction(found) else ""
    try:
        return kind + str(inspect.signature(found))
    except (ValueError, TypeError):
        # Of C++: pybind11 writes its signatures, a line each, into the text.
        lines = (found.__doc__ or "").splitlines()
        call = rf"^(?:\d+\. )?{re.escape(getattr(found, '__name__', ''))}(\(.*)"
        calls = [m[1] for line in lines if (m := re.match(call, line))]
        return " or ".join(c for c in calls if c != "(*args, **kwargs)") or "callable"


def _value(found: Any) -> str:
    plain = (str, int, float, bool, tuple, type(None), enum.Enum)
    return f"= {found!r}" if isinstance(found, plain) else f"a {type(found).__name__}"


def _assigned(cls: type, name: str) -> str | None:
    """What the class's own code says of `self.NAME`, which exists only later."""
    for base in cls.__mro__:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        plain = False
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and _is_own(node.target, name):
                return f"attribute, {ast.unparse(node.annotation)}"
            if isinstance(node, ast.Assign):
                plain |= any(_is_own(target, name) for target in node.targets)
        if plain:
            return "attribute"
    return None


def _is_own(target: ast.expr, name: str) -> bool:
    if isinstance(target, ast.Tuple):
        return any(_is_own(each, name) for each in target.elts)
    return (
        isinstance(target, ast.Attribute)
        and target.attr == name
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    )


def _tidy(text: str) -> str:
    """On one line, and without addresses, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(text.split()))


# ---- Comparing ----


def report(old_text: str, new_text: str) -> str:
    """How a surface differs from a lock, for whoever has to adapt to it."""
    (old_title, old), (new_title, new) = read(old_text), read(new_text)
    gone, less, must, changed, fresh = [], [], [], [], []
    for name in [*old, *(name for name in new if name not in old)]:
        was, now = old.get(name, ABSENT), new.get(name, ABSENT)
        if was == now or (_absent(was) and _absent(now)):
            continue
        short, module = _short(name)
        if _within_absent(name, new) or _within_absent(name, old):
            continue  # its class says it all
        if _absent(now) and name in new:
            gone.append(f"{short}: {now.removeprefix(f'{ABSENT}: ')}")
        elif _absent(now):
            less.append(f"{short} gone from {module}")
        elif now.startswith(ABSTRACT) and not was.startswith(ABSTRACT):
            must.append(f"{short}{now.removeprefix(ABSTRACT)}, in {module}")
        elif _absent(was):
            fresh.append(f"{short}: {now}, in {module}")
        else:
            changed.append(f"{short}, in {module}:\n      {was}\n    became\n      {now}")
    title = f"{old_title} -> {new_title.split()[-1]}"
    if not (gone or less or must or changed or fresh):
        return f"{title}: what the adapter relies on is the same"
    text = f"{title}: what the adapter relies on has changed"
    for what, entries in (
        ("gone, and the adapter uses it", gone),
        ("new abstract methods, without which the adapter's class cannot be made", must),
        ("gone from classes that the adapter uses", less),
        ("changed", changed),
        ("new, perhaps of use", fresh),
    ):
        if entries:
            text += f"\n  {what}:" + "".join(f"\n    {entry}" for entry in entries)
    return text


def _absent(text: str) -> bool:
    return text.startswith(ABSENT)


def _within_absent(name: str, surface: Surface) -> bool:
    """Whether its class is listed and not there."""
    parts = name.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts))]
    return any(_absent(surface.get(one, "")) for one in above)


def _short(name: str) -> tuple[str, str]:
    """("Class.method", "its.module")."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
    return ".".join(parts[at:]), ".".join(parts[:at])


# ---- For the tests of the adapters ----


def imports(sources: collections.abc.Iterable[pathlib.Path], package: str) -> set[str]:
    """The names that Python sources import from `package`."""
    found = set()
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                if (node.module or "").split(".")[0] == package:
                    found |= {f"{node.module}.{each.name}" for each in node.names}
    return found


def not_listed(surface: Surface, package: str, *classes: type) -> set[str]:
    """What our classes override of the engine's without the surface having it."""
    missing = set()
    for cls in classes:
        bases = [b for b in cls.__mro__ if b.__module__.split(".")[0] == package]
        for name in vars(cls):
            homes = [f"{b.__module__}.{b.__qualname__}" for b in bases if hasattr(b, name)]
            if homes and not name.startswith("_"):
                if not any(f"{home}.{name}" in surface for home in homes):
                    missing.add(f"{homes[0]}.{name}")
    return missing


def parameters(text: str) -> list[str]:
    """Names of what a rendered function takes; of the first, if it has several."""
    inside = re.search(r"\((.*?)\)(?: -> .*)?$", text.split(" or ")[0], re.S)
    found, depth, start = [], 0, True
    for part in re.split(r"([\[\](){}<>,])", inside[1] if inside else ""):
        if start and part.strip():
            found.append(re.split(r"[:=\s]", part.strip().lstrip("*"))[0])
        start = part == "," and depth == 0
        depth += (part in tuple("[({<")) - (part in tuple("])}>"))
    return [name for name in found if name]


def check_lock(name: str) -> None:
    """Fails if NAME's lock is not what the pinned release has. For a test, in NAME's
    environment; another release is skipped, `tools/test-engines` compares it."""
    import pytest

    package, wanted = pinned(name) or ("", "")
    if version(package) != wanted:
        pytest.skip(f"{package} {version(package)} is not the pinned release")
    # In a process of its own: tests change what they import.
    ran = subprocess.run(
        [sys.executable, __file__, name], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == locked(name), (
        f"{report(locked(name), ran.stdout)}\nIf Larder is right with that: "
        f"tools/test-engines --surface {name}"
    )


def here(name: str) -> str:
    """NAME's surface as this Python has it, as the text of a lock."""
    names = listed(name)
    pin = pinned(name)
    package = pin[0] if pin else names[0].split(".")[0].replace("_", "-")
    return written(f"{package} {version(package)}", render(names))


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def main() -> int:
    (name,) = sys.argv[1:]
    # Engines log to stdout, some from C++: only the result may get there.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # What it takes to import the engine at all is in the tests' conftest.
    if (conftest := HERE / name / "conftest.py").exists():
        spec = importlib.util.spec_from_file_location("conftest", conftest)
        assert spec is not None and spec.loader is not None
        module = sys.modules["conftest"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    answer.write(here(name))
    answer.close()
    return 0


if __name__ == "__main__":
    code = main()
    os._exit(code)  # threads of engines do not matter

"""Digest of a function as it was written: its source, and the source and constants of its author's that it uses.

What is installed (the standard library, site-packages) enters by name: its versions are noted in `run.json`. What a
function remembers of its calls (counters, caches, open files) does not enter: the same script, started again, has the
same digest.
"""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import inspect
import sysconfig
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_INSTALLED = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")}
)
_CONTAINERS = (dict, list, set)
_MAKERS = ("__init__", "__post_init__", "__new__")
_CHANGERS = (
    "append",
    "extend",
    "insert",
    "add",
    "update",
    "setdefault",
    "pop",
    "popitem",
    "remove",
    "discard",
    "clear",
)
CONTENTS = "[…]"
_PACKAGE = __name__.partition(".")[0]


def code_digest(function: Any) -> str:
    """Digest of a function, method, class, `functools.partial` or callable object, 16 hexadecimal digits."""
    reader = _Reader()
    reader.read("", function, always=True)
    digest = hashlib.blake2b(digest_size=8)
    for line in reader.lines:
        digest.update(line.encode(errors="surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()


class _Reader:
    """Writes down all that an object's behaviour was written with, each thing once, in the order of its use."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        # By `id`; the objects too, since an id is only good while its object lives.
        self._seen: dict[int, Any] = {}

    def read(self, role: str, value: Any, always: bool = False) -> None:
        """Write down `value`, which plays a `role`; `always` also where it is installed."""
        if isinstance(value, dict):
            self._read_all(role, {str(key): entry for key, entry in value.items()})
        elif isinstance(value, set | frozenset):
            self.lines.append(f"{role} = {sorted(map(repr, value))}")
        elif isinstance(value, list | tuple):
            self._read_all(role, dict(_numbered(tuple(value))))
        elif isinstance(value, _CONSTANTS):
            self.lines.append(f"{role} = {value!r}")
        elif isinstance(value, types.MethodType):
            self.read(role, value.__func__, always)
            self.read(f"{role} of", value.__self__, always)
        elif isinstance(value, functools.partial):
            self.read(role, value.func, always)
            self._read_all(f"{role} given", {"arguments": value.args, **value.keywords})
        elif isinstance(value, types.FunctionType | type):
            self._read_source(role, value, always)
        else:
            self._read_object(role, value, always)

    def _read_all(self, role: str, values: Mapping[str, Any]) -> None:
        for name in sorted(values):
            self.read(f"{role}.{name}", values[name])

    def _read_source(self, role: str, value: Any, always: bool) -> None:
        self.lines.append(f"{role} is {value.__module__}.{value.__qualname__}")
        if id(value) in self._seen or (_is_installed(value) and not always):
            return
        self._seen[id(value)] = value
        self.lines.append(_source(value))
        if isinstance(value, type):
            self._read_class(value)
        else:
            self._read_function(value)

    def _read_class(self, value: type) -> None:
        for base in value.__bases__:
            self.read("base", base)
        for method in _functions_of(value):
            self._read_function(method)

    def _read_function(self, function: types.FunctionType) -> None:
        self._read_all("default", dict(_numbered(function.__defaults__)))
        self._read_all("default", function.__kwdefaults__ or {})
        changing = _changing(function.__code__)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        names = sorted(_names(function.__code__))
        values = {}
        for name in names:
            if name in function.__globals__:
                values[name] = function.__globals__[name]
        for name, cell in cells:
            values[name] = _content(cell)
        for name, value in values.items():
            if isinstance(value, types.ModuleType):
                self._read_module(name, value, names)
            elif not _is_changed(name, value, changing):
                self.read(name, value)

    def _read_module(self, role: str, module: types.ModuleType, names: list[str]) -> None:
        """The functions and classes of a module that go by one of the names that a function uses."""
        self.lines.append(f"{role} is module {module.__name__}")
        if not _is_file_here(getattr(module, "__file__", None)):
            return
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, types.FunctionType | type):
                self.read(name, value)

    def _read_object(self, role: str, value: Any, always: bool) -> None:
        """An instance: its class, and what it was made with as far as that is plain and stays as it is."""
        wrapped = getattr(value, "__wrapped__", None)  # functools.lru_cache and the like
        if isinstance(wrapped, types.FunctionType):
            self.read(role, wrapped, always)
            return
        # A builtin is told by its name.
        name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "")
        self.lines.append(f"{role} is {name}")
        self.read(role, type(value), always)
        # What other objects hold (arguments of the command line, clients, trainers, models) is too far from how the
        # function was written, and another attempt at the same run may hold something else.
        if always and not _is_installed(type(value)) and not _is_ours(type(value)):
            self._read_attributes(value)

    def _read_attributes(self, value: Any) -> None:
        changing: set[str] = set()
        for method in _functions_of(type(value)):
            if method.__name__ not in _MAKERS:
                changing |= _changing(method.__code__)
        for name, entry in sorted(getattr(value, "__dict__", {}).items()):
            if not _is_changed(name, entry, changing):
                self.read(name, entry)


def _numbered(values: tuple[Any, ...] | None) -> Iterator[tuple[str, Any]]:
    """`("0", first)`, `("1", second)`, …; nothing of `None`."""
    for i, value in enumerate(values or ()):
        yield str(i), value


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _functions_of(owner: type) -> list[types.FunctionType]:
    members = [getattr(member, "__func__", member) for _, member in sorted(vars(owner).items())]
    return [member for member in members if isinstance(member, types.FunctionType)]


def _is_changed(name: str, value: Any, changing: set[str]) -> bool:
    """Whether a value is among those that functions change, as [`_changing`] tells; of entries, not of which one."""
    return name in changing or (CONTENTS in changing and isinstance(value, _CONTAINERS))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _names(code: types.CodeType) -> set[str]:
    return {name for part in _codes(code) for name in part.co_names}


def _changing(code: types.CodeType) -> set[str]:
    """Names outside itself that a function changes: counters and caches, not constants.

    With `CONTENTS` among them, it assigns to an entry of some container.
    """
    changing = set()
    for part in _codes(code):
        before: Any = None
        for step in dis.get_instructions(part):
            if step.opname in ("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR"):
                changing.add(step.argval)
            elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
                changing.add(CONTENTS)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in _CHANGERS:
                changing.add(before)
            before = step.argval
            # Steps that do two things at once have two names.
            if isinstance(before, tuple) and before:
                before = before[-1]
    return {name for name in changing if isinstance(name, str)}


def _is_ours(value: Any) -> bool:
    return str(value.__module__).partition(".")[0] == _PACKAGE


def _is_installed(value: Any) -> bool:
    """Whether a function or class comes with Python or a library; our graders count as the user's."""
    if _is_ours(value):
        return False
    path = _file_of(value)
    if path is None:  # a builtin, or typed into an interpreter
        return isinstance(value, type) and value.__module__ != "__main__"
    return not _is_file_here(path)


def _file_of(value: Any) -> str | None:
    if isinstance(value, types.FunctionType):
        return value.__code__.co_filename
    try:
        return inspect.getsourcefile(value)
    except (TypeError, OSError):  # its module was loaded without being registered
        return next((method.__code__.co_filename for method in _functions_of(value)), None)


def _is_file_here(path: str | None) -> bool:
    return path is not None and not str(Path(path).resolve()).startswith(_INSTALLED)


def _source(value: Any) -> str:
    """The source without comments and layout; the bytecode where there is no source."""
    try:
        # By its code: a function with `__wrapped__` would give the source of what it wraps.
        source = inspect.getsource(getattr(value, "__code__", value))
    except (OSError, TypeError):
        if isinstance(value, type):
            return "\n".join(_source(method) for method in _functions_of(value))
        return repr([_bytecode(part) for part in _codes(value.__code__)])
    try:
        return ast.unparse(ast.parse(textwrap.dedent(source)))
    except SyntaxError:  # the line of a lambda may end in the middle of an expression
        return source


def _bytecode(code: types.CodeType) -> tuple[Any, ...]:
    constants = []
    for constant in code.co_consts:
        # The code of inner functions is read on its own; its repr has an address.
        if not isinstance(constant, types.CodeType):
            constants.append(constant)
    return code.co_code, code.co_names, code.co_varnames, constants

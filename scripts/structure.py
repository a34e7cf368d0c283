"""The package's structure in figures: packages, modules, imports, layers, and the density of the lines.

    python scripts/structure.py            # this checkout
    python scripts/structure.py FOLDER     # a package elsewhere, for a comparison

An *import* is one module importing another one of the package, also inside functions; a name that an `__init__.py`
re-exports counts as an import of the module that defines it. A module's *layer* is one above the highest layer that it
imports. *Density* is statements and expressions per line of code, without docstrings, comments and blank lines.
"""

from __future__ import annotations

import argparse
import ast
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "trl_learnalign"


@dataclass(frozen=True)
class Module:
    """A source file of the package.

    Args:
        name (`str`): Dotted, without the package's name; empty for the package itself.
        tree (`ast.Module`): Its syntax.
        source (`str`): Its text.
    """

    name: str
    tree: ast.Module
    source: str

    @property
    def package(self) -> str:
        """The top-level package or module that it belongs to."""
        return self.name.split(".")[0]

    def code_lines(self) -> int:
        """Lines that are neither blank nor comment nor docstring."""
        documented = {
            line
            for text in docstrings(self.tree)
            for line in range(text.lineno, (text.end_lineno or text.lineno) + 1)
        }
        return sum(
            bool(line.strip()) and not line.strip().startswith("#") and number not in documented
            for number, line in enumerate(self.source.splitlines(), start=1)
        )

    def comment_lines(self) -> int:
        """Lines with nothing but a comment."""
        return sum(line.strip().startswith("#") for line in self.source.splitlines())

    def nodes(self) -> int:
        """Statements and expressions, docstrings left out."""
        left_out = {id(text) for text in docstrings(self.tree)}
        left_out |= {id(text.value) for text in docstrings(self.tree)}
        return sum(
            isinstance(node, (ast.stmt, ast.expr)) and id(node) not in left_out
            for node in ast.walk(self.tree)
        )


def docstrings(tree: ast.Module) -> list[ast.Expr]:
    """The statements that are docstrings of the module, its classes and functions."""
    texts = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) or not node.body:
            continue
        first = node.body[0]
        value = first.value if isinstance(first, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            texts.append(first)
    return texts


def read_package(folder: Path = PACKAGE) -> dict[str, Module]:
    """All modules of a package, by name."""
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        source = path.read_text()
        modules[name] = Module(name, ast.parse(source), source)
    return modules


def imports(module: Module, modules: dict[str, Module], package: str) -> set[str]:
    """Names of the modules that a module imports, at its top or inside functions."""
    targets = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            for alias in node.names:
                targets.add(resolved(node.module, alias.name, modules, package))
    own = {target for target in targets if target.split(".")[0] == package}
    names = {target.removeprefix(package).removeprefix(".") for target in own}
    return {name for name in names if name in modules and name != module.name}


def resolved(source: str, name: str, modules: dict[str, Module], package: str) -> str:
    """The module of `from source import name`; for a re-exported name, the module that defines it."""
    inner = source.removeprefix(package).removeprefix(".")
    child = f"{inner}.{name}".removeprefix(".")
    if child in modules:
        return f"{package}.{child}"
    exporter = modules.get(inner)
    for node in exporter.tree.body if exporter else ():
        names = (
            {alias.asname or alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom)
            else set()
        )
        if name in names and isinstance(node, ast.ImportFrom) and node.module:
            return node.module
    return source


def import_graph(modules: dict[str, Module], package: str = PACKAGE.name) -> dict[str, set[str]]:
    """Module → the modules that it imports."""
    return {name: imports(module, modules, package) for name, module in modules.items()}


def layers(graph: dict[str, set[str]]) -> dict[str, int]:
    """Layer of each module, from 1 at the bottom; the modules of an import cycle share one layer."""
    levels: dict[str, int] = {}

    def level(name: str, above: tuple[str, ...]) -> int:
        if name in levels:
            return levels[name]
        below = [level(other, (*above, name)) for other in graph[name] if other not in above]
        height = 1 + max(below, default=0)
        if not above or not set(graph[name]) & set(above):
            levels[name] = height
        return height

    return {name: level(name, ()) for name in graph}


def longest(
    modules: dict[str, Module], kind: type[ast.AST] | tuple[type[ast.AST], ...]
) -> list[tuple[int, str]]:
    """Lines of each function or class, most first."""
    sizes = [
        (node.end_lineno - node.lineno + 1, f"{name}.{node.name}")
        for name, module in modules.items()
        for node in ast.walk(module.tree)
        if isinstance(node, kind)
    ]
    return sorted(sizes, reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=PACKAGE, help="folder of the package"
    )
    folder = parser.parse_args().folder.resolve()
    modules = read_package(folder)
    graph = import_graph(modules, folder.name)
    lines = sum(module.code_lines() for module in modules.values())
    comments = sum(module.comment_lines() for module in modules.values())
    nodes = sum(module.nodes() for module in modules.values())
    density = sorted(
        (
            (module.nodes() / module.code_lines(), name)
            for name, module in modules.items()
            if module.code_lines()
        ),
        reverse=True,
    )
    packages = {name.split(".")[0] for name in modules if name}
    print(f"top-level packages     {len(packages)}")
    print(f"modules                {len(modules)}")
    print(f"imports                {sum(map(len, graph.values()))}")
    print(f"layers                 {max(layers(graph).values())}")
    print(f"lines of code          {lines}")
    print(
        f"nodes a line           {nodes / lines:.2f}, densest: "
        + ", ".join(f"{n} {d:.1f}" for d, n in density[:6])
    )
    print(f"comments               {comments / (lines + comments):.1%} of code and comment lines")
    functions = longest(modules, (ast.FunctionDef, ast.AsyncFunctionDef))
    print("longest functions      " + ", ".join(f"{name} {size}" for size, name in functions[:5]))
    print(
        "longest classes        "
        + ", ".join(f"{name} {size}" for size, name in longest(modules, ast.ClassDef)[:4])
    )


if __name__ == "__main__":
    main()

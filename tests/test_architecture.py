"""Packages import only from lower layers, and private names of other libraries stay in one package."""

import ast
import itertools
import re

import cases
import pytest
import structure

LAYERS = (
    {"rng", "intervals", "distributed", "version", "markup", "config", "toy"},
    {"plan", "scoring", "success", "gradients", "data", "adaptive"},
    {"records"},
    {"pool", "bridge"},
    {"selectors"},
    {"ranking"},
    {"diversity"},
    {"measuring", "preflight", "evaluation"},
    {"training"},
    {"", "report", "axolotl"},  # "" is the package itself
    {"cli"},
    {"__main__"},
)
"""A package imports from itself and from the layers below it."""

ALONE = {"toy"}
"""Imports no other package of ours: the toy tasks and their model are independent of the library."""

OUTSIDE = {"trl", "transformers", "accelerate"}
ALLOWED_BELOW_THE_BRIDGE = {
    "distributed": {"accelerate"},
    "gradients.layers": {"transformers"},
}
"""Gathering of tensors; the class `Conv1D`, whose weight is transposed."""


def layer_of(module):
    package = module.split(".")[0]
    return next(number for number, packages in enumerate(LAYERS) if package in packages)


def upward(graph):
    """Imports from a higher or the same layer; every module may import the package itself, for its version."""
    wrong = []
    for module, imported in graph.items():
        for other in imported - {""}:
            inside = module.split(".")[0] == other.split(".")[0]
            if not inside and (
                layer_of(other) >= layer_of(module) or module.split(".")[0] in ALONE
            ):
                wrong.append(f"{module} imports {other}")
    return sorted(wrong)


@pytest.fixture(scope="module")
def modules():
    return structure.read_package()


def test_packages_import_only_from_lower_layers(modules):
    assert upward(structure.import_graph(modules)) == []


def test_an_import_from_a_higher_layer_is_found(modules):
    graph = structure.import_graph(modules)
    graph["scoring"] = {*graph["scoring"], "bridge.trainer"}
    graph["toy.tasks"] = {"rng"}
    assert upward(graph) == ["scoring imports bridge.trainer", "toy.tasks imports rng"]


def imported_libraries(module):
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_packages_below_the_bridge_do_not_import_trl(modules):
    below = [
        name
        for name in modules
        if layer_of(name) < layer_of("bridge") and name.split(".")[0] not in ALONE
    ]
    assert "scoring" in below
    for name in below:
        foreign = set(imported_libraries(modules[name])) & OUTSIDE - ALLOWED_BELOW_THE_BRIDGE.get(
            name, set()
        )
        assert not foreign, f"{name} imports {foreign}"


def private_accesses(module):
    """Private attributes of objects of other libraries: `trainer._x`, `self.trainer._x`, `config._x`."""
    for node in ast.walk(module.tree):
        if (
            not isinstance(node, ast.Attribute)
            or not node.attr.startswith("_")
            or node.attr.startswith("__")
        ):
            continue
        owner = (
            node.value.attr
            if isinstance(node.value, ast.Attribute)
            else getattr(node.value, "id", None)
        )
        if owner in ("trainer", "model", "tokenizer", "accelerator", "args", "config"):
            yield f"{module.name}:{node.lineno} {owner}.{node.attr}"


def test_only_the_bridge_uses_private_names_of_the_trainer(modules):
    inside, outside = [], []
    for name, module in modules.items():
        (inside if name.split(".")[0] == "bridge" else outside).extend(private_accesses(module))
    assert outside == []
    assert inside, "the bridge uses private names; the search must find them"


def test_contributing_lists_every_package_once(modules):
    plan = (cases.ROOT / "CONTRIBUTING.md").read_text()
    listed = []
    for line in plan.splitlines():
        if line.startswith("| `"):
            listed += re.findall(r"`(\w+)/?`", line.split("|")[1])
    packages = {name.split(".")[0] for name in modules} - {"", "__main__", "version"}
    assert sorted(listed) == sorted(packages)


def test_contributing_lists_packages_from_the_lowest_layer_up():
    plan = (cases.ROOT / "CONTRIBUTING.md").read_text()
    rows = [line.split("|")[1] for line in plan.splitlines() if line.startswith("| `")]
    layers = [{layer_of(package) for package in re.findall(r"`(\w+)/?`", row)} for row in rows]
    for below, above in itertools.pairwise(layers):
        assert max(below) <= min(above)


def test_the_data_flow_names_existing_files():
    text = (cases.ROOT / "CONTRIBUTING.md").read_text()
    flow = text.split("## Data flow")[1].split("\n## ")[0]
    named = re.findall(r"`([\w/]+\.py)`", flow)
    assert len(named) > 10
    package = cases.ROOT / "trl_learnalign"
    for name in named:
        assert (package / name).exists() or list(package.rglob(name)), name

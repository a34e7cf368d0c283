"""Write docs/api.md from the docstrings of the public names.

python scripts/api_reference.py           # write it
python scripts/api_reference.py --check   # end with an error if it is not current
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"

HEAD = """# API

Made from the docstrings (`make docs`), which also say what is raised. What `trl_learnalign` itself exports comes first
in each part. Commands: `trl-learnalign --help`.
"""

PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Train": {
        "trl_learnalign.LearnAlignCallback": (
            "table",
            "selected",
            "save_selection",
            "plan",
            "is_scoring",
        ),
        "trl_learnalign.AdaptiveOrderCallback": (),
        "trl_learnalign.LearnAlignConfig": ("adaptive", "skipping", "control"),
        "trl_learnalign.plan_run": (),
        "trl_learnalign.CurriculumSampler": (),
        "trl_learnalign.evaluation.held_out.held_out_accuracy": (),
    },
    "Rank prompts in your own way": {
        "trl_learnalign.SELECTORS": (),
        "trl_learnalign.Selector": ("score",),
        "trl_learnalign.Pool": ("success_rate", "learnability"),
        "trl_learnalign.gradients.layers.register_rule": (),
    },
    "Read what a run has left": {
        "trl_learnalign.report.read_run": (),
        "trl_learnalign.report.Run": (
            "phases",
            "accuracies",
            "final_accuracy",
            "rewards",
            "scored_stages",
            "ledger",
            "finished",
        ),
        "trl_learnalign.report.write_report": (),
        "trl_learnalign.report.compare": (),
        "trl_learnalign.report.write_comparison": (),
    },
}
"""Parts of the page: names, each with those of its methods and properties that are for users."""

NOTES = {
    "trl_learnalign.LearnAlignConfig": "Arguments: [configuration.md](configuration.md).",
    "trl_learnalign.SELECTORS": "Name → [`Selector`], built in: [selectors.md](selectors.md).",
    "trl_learnalign.Pool": "What a selector is given.",
}
"""What the page says beside a docstring, or in place of one."""

WITHOUT_ARGUMENTS = {"trl_learnalign.LearnAlignConfig"}
SECTIONS = ("Args:", "Returns:", "Raises:")


@dataclasses.dataclass(frozen=True)
class Documented:
    """A docstring in its parts.

    Args:
        summary (`str`): Its first paragraph.
        sections (`dict`): Heading → lines, each an entry.
    """

    summary: str
    sections: dict[str, list[str]]


def page() -> str:
    """The page."""
    places = [place for part in PARTS.values() for place in part]
    lines = [HEAD, *overview()]
    for part, names in PARTS.items():
        lines += [f"## {part}\n"]
        for place, members in names.items():
            lines += entry(place, members)
    text = "\n".join(lines).rstrip() + "\n"
    return linked(text, {place.split(".")[-1] for place in places})


def overview() -> list[str]:
    """One line for each part, with links to its names."""
    lines = []
    for part, names in PARTS.items():
        links = ", ".join(f"[`{place.split('.')[-1]}`]" for place in names)
        lines.append(f"- {part}: {links}")
    return [*lines, ""]


def linked(text: str, names: set[str]) -> str:
    """References that docstrings write as [`name`]: links where the page has the name, else plain code."""

    def link(found: re.Match[str]) -> str:
        name = found[1].split(".")[0]
        return f"[`{found[1]}`](#{name.lower()})" if name in names else f"`{found[1]}`"

    return re.sub(r"\[`([\w.]+)`\](?!\()", link, text)


def find(place: str) -> Any:
    """What a dotted path names."""
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(module), name)


def entry(place: str, members: tuple[str, ...]) -> list[str]:
    """A name: where it is, its signature, what it is, its arguments, and its members."""
    thing, name = find(place), place.split(".")[-1]
    lines = [f"### {name}\n"]
    if not callable(thing):
        return [*lines, f"`{place}`{source_of(thing)}\\\n{NOTES[place]}\n"]
    lines += [f"`{place}{signature(thing)}`{source_of(thing)}\n"]
    documented = read(thing)
    lines += [f"{documented.summary}\n"]
    if place in NOTES:
        lines += [f"{NOTES[place]}\n"]
    lines += sections(documented, place not in WITHOUT_ARGUMENTS)
    properties = [name for name in members if not callable(getattr(thing, name))]
    if properties:
        lines += ["Properties:\n"]
        lines += [f"- **`{name}`**: {read(getattr(thing, name)).summary}" for name in properties]
        lines += [""]
    for member in members:
        if member not in properties:
            lines += method_entry(thing, member)
    return lines


def method_entry(owner: type, name: str) -> list[str]:
    """A method: its signature, what it does, its arguments."""
    method = getattr(owner, name)
    head = f"{owner.__name__}.{name}{signature(method)}"
    documented = read(method)
    return [f"**`{head}`**\n", f"{documented.summary}\n", *sections(documented, True)]


def source_of(thing: Any) -> str:
    """A link to the file that a class or a function is in."""
    if not callable(thing):
        return ""
    path = Path(inspect.getfile(inspect.unwrap(thing))).resolve().relative_to(ROOT)
    return f" ([source](../{path}))"


def signature(thing: Any) -> str:
    """Names and defaults; types stand at the arguments."""
    if dataclasses.is_dataclass(thing):
        return "(…)"
    parts = []
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.name == "self":
            continue
        default = ""
        if parameter.default is not inspect.Parameter.empty:
            default = f"={parameter.default!r}"
        stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
        parts.append(f"{stars}{parameter.name}{default}")
    return f"({', '.join(parts)})"


def read(thing: Any) -> Documented:
    """The docstring of a class, a function or a property."""
    text = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    found: dict[str, list[str]] = {}
    opening, *rest = re.split(rf"^({'|'.join(SECTIONS)})$", text, flags=re.MULTILINE)
    for heading, body in zip(rest[::2], rest[1::2], strict=True):
        found[heading] = [" ".join(body.split())] if heading == "Returns:" else list(items(body))
    return Documented(" ".join(opening.split("\n\n")[0].split()), found)


def items(body: str) -> Iterator[str]:
    """The entries of a section, each on one line: what is indented further belongs to the entry above."""
    text = textwrap.dedent(body.strip("\n"))
    for item in re.split(r"\n(?=\S)", text):
        yield " ".join(item.split())


def sections(documented: Documented, with_arguments: bool) -> list[str]:
    """Arguments as a list, and what is returned; errors name their remedy when they come."""
    lines = []
    if with_arguments:
        lines += [argument(item) for item in documented.sections.get("Args:", [])]
    lines += [f"- returns {item}" for item in documented.sections.get("Returns:", [])]
    return [*lines, ""] if lines else []


def argument(item: str) -> str:
    """An argument with its name in bold."""
    found = re.match(r"\**(\w+)( \(.*?\))?: ", item)
    if found is None:
        raise ValueError(f"{item!r} is not of the form 'name (`type`): text'.")
    return f"- **`{found[1]}`**{found[2] or ''}: {item[found.end() :]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    given = parser.parse_args()
    if not given.check:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        sys.exit(f"{PAGE} is not current: run make docs")
    else:
        print(f"{PAGE.name} is current")


if __name__ == "__main__":
    main()

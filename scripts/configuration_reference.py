"""Write docs/configuration.md from the settings' own declarations.

python scripts/configuration_reference.py           # write it
python scripts/configuration_reference.py --check   # end with an error if it is not current
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import typing
from pathlib import Path
from typing import Any

from trl_learnalign.cli.arguments import RecipeArguments
from trl_learnalign.config import LearnAlignConfig, parts_of

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

HEAD = """# Settings

Made from the declarations in the code (`make docs`); `python recipes/gsm8k_staged.py --help` prints the same, with
those of trainer and model. On the command line and in YAML files they stand beside the settings of `GRPOConfig` and
`ModelConfig`, whose names they do not clash with. Bad values end with a message that names the value and the remedy.
"""

FIRST = {
    "stages": "how many prompts, in how many stages",
    "stage_passes": "how often, or `stage_steps`: for how many steps",
    "warmup_samples": "prompts of the warm-up before the first scoring; 0: none",
    "after_warmup": "whether the warm-up counts as training",
    "selector": "how prompts are ranked",
    "order": 'in which order a stage trains on them; `"adaptive"` chooses anew for each generation',
    "skip_zero_advantages": "whether rollouts that teach nothing are left out of training",
    "success_reward": "which reward says that a rollout is right, if there are several",
    "completions_per_step": "the batch, on any number of processes",
}
"""Settings that most runs decide."""


def page() -> str:
    """The page."""
    lines = [
        HEAD,
        "Most runs decide only these:\n",
        *(f"- `{name}`: {text}" for name, text in FIRST.items()),
        "",
        "## Selection: `LearnAlignConfig`\n",
    ]
    for part, names in parts_of(LearnAlignConfig).items():
        lines += [f"### {heading(part)}\n", *entries(LearnAlignConfig, names)]
    lines += [
        "## Recipes: where prompts come from\n",
        "Besides these, recipes take TRL's `ScriptArguments` (`dataset_config`, `dataset_train_split`, …).\n",
        *entries(RecipeArguments, inspect.get_annotations(RecipeArguments)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def heading(part: type) -> str:
    """The first line of a part's docstring."""
    return (inspect.getdoc(part) or part.__name__).splitlines()[0].rstrip(".")


def entries(cls: type, names: typing.Iterable[str]) -> list[str]:
    """One paragraph per field."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    return [entry(fields[name], hints[name]) for name in names]


def entry(field: dataclasses.Field[Any], hint: Any) -> str:
    """Name, type, default and help of a field."""
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    head = f"**`{field.name}`** (`{type_text(hint)}`, default `{default!r}`)\\"
    return f"{head}\n{field.metadata['help']}\n"


def type_text(hint: Any) -> str:
    """A type as one writes it; choices without the word `Literal`."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    is_plain = isinstance(hint, type) and not typing.get_args(hint)
    return hint.__name__ if is_plain else str(hint).replace("typing.", "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    given = parser.parse_args()
    if given.check:
        if not PAGE.exists() or PAGE.read_text() != page():
            sys.exit(f"{PAGE} is not current: run make docs")
        print(f"{PAGE.name} is current")
    else:
        PAGE.write_text(page())


if __name__ == "__main__":
    main()

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
from trl_learnalign.config import LearnAlignConfig, sections_of

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

HEAD = """# Settings

Made from the declarations in the code (`make docs`); `python recipes/gsm8k_staged.py --help` prints the same, with
those of trainer and model. On the command line and in YAML files they stand beside the settings of `GRPOConfig` and
`ModelConfig`, whose names they do not clash with. Bad values end with a message that names the value and the remedy.
"""


FIRST = {
    "order": "`shuffled`: the control, the whole pool pass after pass. `trainer`: skipping alone.",
    "skip_zero_advantages": "False for a control only: it saves compute and changes no gradient.",
    "stages": "To choose a subset: once (`[1000]`), or anew with the policy as it is then (`[0.5, 0.3, 0.2]`).",
    "selector": "To choose it in another way: `random` is the control that scores nothing, `learnalign` the paper's.",
    "stage_epochs": "To train on it more than once; `stage_steps` counts optimizer steps instead.",
    "rollout_budget": "Where scoring costs too much for the subset that it chooses: 0.4.",
    "warmup_samples": "To let the policy find the form of an answer before it is scored, as the paper does: 300.",
    "success_reward": "With several rewards, if not exactly one of them has *accuracy* in its name.",
    "compute_budget": "To compare ways to select at the same cost.",
    "completions_per_step": "In recipes, for the same batch on any number of processes.",
}
"""Settings that most runs decide, and when to change them. (The parsers take a field's metadata for their own.)"""

OPENING = """The defaults below are the paper's, `LearnAlignConfig()`. `LearnAlignConfig.adaptive()` trains on
the whole pool in adaptive order, scores nothing and skips rollouts that teach nothing; on the command line its
defaults hold. Most runs change no more than these:

| setting | when to change it |
|---|---|"""


def page() -> str:
    """The page."""
    lines = [
        HEAD,
        OPENING,
        *(f"| [`{name}`](#{name}) | {when} |" for name, when in FIRST.items()),
        "",
        "## Selection: `LearnAlignConfig`\n",
    ]
    for title, names in sections_of(LearnAlignConfig).items():
        lines += [f"### {title}\n", *entries(LearnAlignConfig, names)]
    lines += [
        "## Recipes: where prompts come from\n",
        "Besides these, recipes take TRL's `ScriptArguments` (`dataset_config`, `dataset_train_split`, …).\n",
        *entries(RecipeArguments, inspect.get_annotations(RecipeArguments)),
    ]
    return "\n".join(lines).rstrip() + "\n"


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
    anchor = f'<a id="{field.name}"></a>' if field.name in FIRST else ""
    head = f"{anchor}**`{field.name}`** (`{type_text(hint)}`, default `{default!r}`)\\"
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

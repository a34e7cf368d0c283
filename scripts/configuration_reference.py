"""Write docs/configuration.md from the settings' own declarations.

python scripts/configuration_reference.py           # write it
python scripts/configuration_reference.py --check   # end with an error if it is not current
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any

from trl_learnalign.cli.jobs import RecipeArguments
from trl_learnalign.config import LearnAlignConfig

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"

HEAD = """# Settings

Made from the declarations in the code (`make docs`); `python recipes/gsm8k_staged.py --help` prints the same, with
those of trainer and model. On the command line and in YAML files they stand beside the settings of `GRPOConfig` and
`ModelConfig`, whose names they do not clash with. Bad values end with a message that names the value and the remedy.
"""


def page() -> str:
    """The page."""
    own = [field for field in dataclasses.fields(RecipeArguments) if field.name in RecipeArguments.__annotations__]
    parts = [
        HEAD,
        "## Selection: `LearnAlignConfig`\n",
        *entries(LearnAlignConfig, dataclasses.fields(LearnAlignConfig)),
        "## Recipes: where prompts come from\n",
        "Besides these, recipes take TRL's `ScriptArguments` (`dataset_config`, `dataset_train_split`, …).\n",
        *entries(RecipeArguments, own),
    ]
    return "\n".join(parts).rstrip() + "\n"


def entries(cls: type, fields: typing.Sequence[dataclasses.Field[Any]]) -> list[str]:
    """One paragraph per field."""
    hints = typing.get_type_hints(cls)
    found = []
    for field in fields:
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        kind = getattr(hints[field.name], "__name__", "") if isinstance(hints[field.name], type) else ""
        kind = kind if kind and kind != "list" else str(hints[field.name]).replace("typing.", "")
        found.append(f"**`{field.name}`** (`{kind}`, default `{default!r}`)\\\n{field.metadata['help']}\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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

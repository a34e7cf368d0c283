"""A section of the model card: how prompts were selected, held-out accuracy and the citation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_learnalign import version
from trl_learnalign.plan import Plan
from trl_learnalign.records import layout
from trl_learnalign.records.export import PhaseSummary, phase_summaries, rollouts_of_run
from trl_learnalign.records.run_record import RunContents
from trl_learnalign.records.store import write_atomically
from trl_learnalign.version import __version__

if TYPE_CHECKING:
    from trl import GRPOTrainer

    from trl_learnalign.training.callback import LearnAlignCallback

BEGIN, END = "<!-- trl_learnalign: begin -->", "<!-- trl_learnalign: end -->"


def section(contents: RunContents) -> str:
    """The section in Markdown.

    Args:
        contents (`RunContents`): `run.json`.
    """
    phases = phase_summaries(contents)
    columns = {
        heading: name
        for heading, name in COLUMNS.items()
        if name in ALWAYS or any(getattr(phase, name) is not None for phase in phases)
    }
    headings = ["phase", *columns, "held-out accuracy"]
    lines = [
        BEGIN,
        "## Data selection",
        "",
        " ".join(_sentences(contents)),
        "",
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
        *(_row(phase, list(columns.values())) for phase in phases),
        "",
        f"`{contents.success_reward}` decides whether a rollout is correct; reward functions: "
        f"{', '.join(f'`{name}`' for name in contents.trainer.reward_funcs)}.",
        "",
        "```bibtex",
        version.BIBTEX,
        "```",
        END,
    ]
    return "\n".join(lines)


COLUMNS = {
    "prompts": "selected",
    "of": "candidates",
    "success rate, selected": "success_rate_selected",
    "rest": "success_rate_left_out",
    "useful groups": "useful",
    "tokens not trained on": "tokens_skipped",
    "steps": "steps",
}
"""Headings of the table and the phase attribute of each; columns without any value are omitted."""

ALWAYS = ("selected", "steps")


def _sentences(contents: RunContents) -> list[str]:
    """How the prompts were chosen."""
    config, rollouts = contents.config, contents.plan.geometry.rollouts
    made_with = f"trl_learnalign {__version__}"
    sentences = []
    if contents.selects:
        sentences.append(
            f"Trained on prompts selected with [LearnAlign](https://arxiv.org/abs/{version.ARXIV}) "
            f"(selector `{contents.selector}`, {made_with}), {rollouts} rollouts per prompt, "
            f"projected gradients of {config['feature_dim']} dimensions, selection seed {config['selection_seed']}."
        )
    else:
        sentences.append(
            f"Trained on {_pool(contents.plan)} with {made_with}, "
            f"{rollouts} rollouts per prompt, selection seed {config['selection_seed']}."
        )
    if "adaptive" in contents.orders:
        sentences.append(
            "The order of the prompts was adaptive: each generation had those with the largest expected gain, by "
            "success rates that were estimated from all rollouts so far."
        )
    rolled_out = rollouts_of_run(contents)
    if rolled_out is not None and rolled_out.groups != rolled_out.groups_trained:
        sentences.append(
            f"Of {rolled_out.groups:,} groups of rollouts, {rolled_out.groups_trained:,} were selected for training "
            "(dynamic sampling)."
        )
    if rolled_out is not None and rolled_out.skipped_share is not None:
        sentences.append(
            f"Rollouts without an advantage, {rolled_out.skipped_share:.0%} of the tokens, were left out of the loss, "
            "which does not change its gradient."
        )
    return sentences


def _pool(plan: Plan) -> str:
    return f"all of a pool of {plan.prompts}" if plan.dataset_size else "a stream of prompts"


def _row(phase: PhaseSummary, columns: list[str]) -> str:
    accuracy = None if phase.accuracy is None else phase.accuracy.value
    cells = [phase.name, *(getattr(phase, name) for name in columns), accuracy]
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def with_section(card: str, text: str) -> str:
    """A model card with the section; it replaces an earlier version or is appended."""
    if BEGIN in card and END in card:
        before, rest = card.split(BEGIN, 1)
        _last_version, after = rest.split(END, 1)
        return before + text + after
    return f"{card.rstrip()}\n\n{text}\n"


def describe(folder: Path, contents: RunContents) -> None:
    """Add the section to the model card of an output folder; it replaces an earlier version.

    Args:
        folder (`Path`): The output folder; nothing is written if it has no card.
        contents (`RunContents`): `run.json`.
    """
    path = folder / layout.MODEL_CARD
    if path.is_file():
        card = path.read_text(encoding="utf-8")
        write_atomically(path, with_section(card, section(contents)).encode())


def renew(folder: Path, contents: RunContents) -> None:
    """Bring the section of a model card up to date, if there is one; arguments as in [`describe`]."""
    path = folder / layout.MODEL_CARD
    if path.is_file() and BEGIN in path.read_text(encoding="utf-8", errors="replace"):
        describe(folder, contents)


def _model_name(trainer: GRPOTrainer) -> str:
    """The model name that the hub would show."""
    hub_name = trainer.args.hub_model_id
    if hub_name:
        return str(hub_name).rsplit("/", 1)[-1]
    return Path(trainer.args.output_dir).resolve().name


def with_local_names(card: str, base: str, place: str) -> str:
    """TRL's model card with local names instead of "None" for a model or base model that is not on the hub.

    Args:
        card (`str`): The card.
        base (`str`): Source of the base model, or empty.
        place (`str`): Location of the trained model.
    """
    known = f"`{base}`" if base else "an unnamed model"
    named = card.replace("[None](https://huggingface.co/None)", known)
    return named.replace('model="None"', f'model="{place}"')


def add_to_model_card(trainer: GRPOTrainer, callback: LearnAlignCallback) -> Path | None:
    """Write TRL's model card, with local names, and the section into the output folder; on the main process.

    Args:
        trainer (`GRPOTrainer`): The trainer, after training.
        callback (`LearnAlignCallback`): Its callback.
    """
    if not trainer.accelerator.is_main_process:
        return None
    path = Path(trainer.args.output_dir) / layout.MODEL_CARD
    trainer.create_model_card(model_name=_model_name(trainer), tags=["learnalign"])
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    base = trainer.model.config.name_or_path
    card = with_local_names(card, base, str(trainer.args.output_dir))
    write_atomically(path, with_section(card, section(callback.record.contents)).encode())
    return path

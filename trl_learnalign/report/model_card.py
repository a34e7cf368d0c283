"""A section of the model card: how the prompts were selected, and whom to cite."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_learnalign import __version__
from trl_learnalign.records import layout
from trl_learnalign.records.contents import RunContents
from trl_learnalign.records.store import write_atomically
from trl_learnalign.records.summary import PhaseSummary, phase_summaries
from trl_learnalign.report import citation

if TYPE_CHECKING:
    from trl import GRPOTrainer

    from trl_learnalign.training.callback import LearnAlignCallback

BEGIN, END = "<!-- trl_learnalign: begin -->", "<!-- trl_learnalign: end -->"


def section(contents: RunContents) -> str:
    """The section in Markdown.

    Args:
        contents (`RunContents`): `run.json`.
    """
    config, rollouts = contents.config, contents.plan.geometry.rollouts
    lines = [
        BEGIN,
        "## Data selection",
        "",
        f"Trained on prompts selected with [LearnAlign](https://arxiv.org/abs/{citation.ARXIV}) "
        f"(selector `{contents.selector}`, trl_learnalign {__version__}), {rollouts} rollouts per prompt, "
        f"projected gradients of {config['feature_dim']} dimensions, selection seed {config['selection_seed']}.",
        "",
        "| phase | prompts | of | success rate, selected | rest | steps | held-out accuracy |",
        "|---|---|---|---|---|---|---|",
        *map(_row, phase_summaries(contents)),
        "",
        f"Success is decided by `{contents.success_reward}`, reward functions: "
        f"{', '.join(f'`{name}`' for name in contents.trainer.reward_funcs)}.",
        "",
        "```bibtex",
        citation.BIBTEX,
        "```",
        END,
    ]
    return "\n".join(lines)


def _row(phase: PhaseSummary) -> str:
    cells = (
        phase.name,
        phase.selected,
        phase.candidates,
        phase.success_rate_selected,
        phase.success_rate_left_out,
        phase.steps,
        None if phase.accuracy is None else phase.accuracy.value,
    )
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def with_section(card: str, text: str) -> str:
    """A model card with the section in the place of its last version, or at its end."""
    if BEGIN in card and END in card:
        before, rest = card.split(BEGIN, 1)
        _last_version, after = rest.split(END, 1)
        return before + text + after
    return f"{card.rstrip()}\n\n{text}\n"


def add_to_model_card(trainer: GRPOTrainer, callback: LearnAlignCallback) -> Path | None:
    """Write TRL's model card into the output folder, with a section on the selection; on the main process.

    Args:
        trainer (`GRPOTrainer`): The trainer, after training.
        callback (`LearnAlignCallback`): Its callback.
    """
    if not trainer.accelerator.is_main_process:
        return None
    path = Path(trainer.args.output_dir) / layout.MODEL_CARD
    trainer.create_model_card(tags=["learnalign"])
    card = path.read_text(encoding="utf-8") if path.exists() else ""
    write_atomically(path, with_section(card, section(callback.record.contents)).encode())
    return path

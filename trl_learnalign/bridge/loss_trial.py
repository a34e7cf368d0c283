"""TRL's loss, tried on made-up rows: is it what skipping takes it to be?

Rows are left out of training on the ground that the loss is a sum over rows, divided by something known
(`row_losses.DENOMINATORS`), and that padding adds nothing. That is a matter of the release (trl 1.8 averages `luspo`
over padding, too), so it is found out where it is used. The model is not called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import trl
from torch import Tensor

from trl_learnalign.bridge import rollout_rows
from trl_learnalign.bridge.lending import left_as_found
from trl_learnalign.bridge.objective import objective_gradients
from trl_learnalign.bridge.row_losses import DENOMINATORS, ROWS, TOKENS

if TYPE_CHECKING:
    from trl import GRPOTrainer

# Rows with a gradient first; they end before the others, so that columns fall away with those.
_ADVANTAGES = (1.0, -0.5, 0.0, 0.0)
_LENGTHS = (2, 1, 3, 3)
_USEFUL = 2
_TOLERANCE = 1e-4


def loss_problem(trainer: GRPOTrainer) -> str | None:
    """Why this trainer's loss of some rows is not its share of the loss of all, or `None` if it is.

    Args:
        trainer (`GRPOTrainer`): The trainer, for whose loss `row_losses.skipping_problem` finds nothing.
    """
    changed = (
        f"trl {trl.__version__} with loss_type={trainer.loss_type!r}: the loss of rows with a gradient depends on "
        "those without one"
    )
    whole = _made_up_rows(trainer)
    try:
        with left_as_found(trainer):
            trainer.model.eval()
            of_whole = _gradient(trainer, whole)
            of_part = _gradient(trainer, _useful_part(trainer, whole))
    except Exception as error:  # whatever a loss that is not known may raise
        return f"the loss of trl {trl.__version__} could not be tried ({error!r})"
    expected = of_whole[:_USEFUL, : of_part.shape[1]]
    largest = of_whole.abs().max()
    outside = of_whole.abs().sum() - expected.abs().sum()
    difference = (of_part - expected).abs().max()
    # Written so that NaN is a difference.
    is_share = difference <= _TOLERANCE * largest and outside.abs() <= _TOLERANCE * largest
    return None if is_share else changed


def _made_up_rows(trainer: GRPOTrainer) -> rollout_rows.Batch:
    device = trainer.accelerator.device
    advantages = torch.tensor(_ADVANTAGES, device=device)
    lengths = torch.tensor(_LENGTHS, device=device)
    rows = len(advantages)
    width = int(lengths.max())
    columns = torch.arange(width, device=device)
    mask = (columns < lengths.unsqueeze(1)).long()
    ids = torch.ones_like(mask)
    prompt = ids[:, :1]
    return {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
        # Read where vLLM samples; one number for each row goes with every mode.
        "importance_sampling_ratio": torch.ones(rows, 1, device=device),
    }


def _useful_part(trainer: GRPOTrainer, whole: rollout_rows.Batch) -> rollout_rows.Batch:
    """The rows with a gradient, as skipping would train on them."""
    padding = rollout_rows.padding_of(trainer)
    chosen = rollout_rows.take(whole, range(_USEFUL))
    part = rollout_rows.trim(chosen, padding, trainer.pad_to_multiple_of)
    factor = denominator(trainer.loss_type, part) / denominator(trainer.loss_type, whole)
    part["advantages"] = part["advantages"] * factor
    return part


def denominator(loss_type: str, batch: rollout_rows.Batch) -> float:
    """What TRL divides the loss of this micro-batch by, where the micro-batch decides.

    Args:
        loss_type (`str`): Of the trainer.
        batch (mapping): The micro-batch.
    """
    kind = DENOMINATORS[loss_type]
    if kind == TOKENS:
        return max(1.0, float(rollout_rows.loss_mask(batch).sum()))
    if kind == ROWS:
        return float(rollout_rows.row_count(batch))
    return 1.0


def _gradient(trainer: GRPOTrainer, batch: rollout_rows.Batch) -> Tensor:
    """Of the objective with respect to made-up log-probabilities, `(R, C)`."""
    mask = batch["completion_mask"]
    rows, columns = mask.shape
    numbers = torch.arange(rows, device=mask.device).unsqueeze(1)
    places = torch.arange(columns, device=mask.device)
    # Different in every place, and the same in a part as in the whole.
    log_probs = -0.5 - 0.1 * numbers - 0.01 * places
    gradient, _ = objective_gradients(trainer, batch, log_probs, torch.ones_like(log_probs))
    return gradient

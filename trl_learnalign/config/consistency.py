"""Checks of settings against each other; each raises a `ValueError` that names the settings and the remedy."""

from __future__ import annotations

from collections.abc import Sequence


def check_stages(
    stages: Sequence[float], reselect: str, after_warmup: str, warmup_samples: int
) -> None:
    """Stages fit into the pool, and there is a warm-up to restart from."""
    total = sum(stages)
    # Three tenths and seven tenths are not exactly one in floating point.
    if stages[0] <= 1 and reselect == "remaining" and total > 1 + 1e-9:
        raise ValueError(
            f"stages={stages} add up to {total:g} of the pool: with reselect='remaining' the fractions must add up to "
            "at most 1; lower them, or use reselect='all'."
        )
    if after_warmup == "restart" and warmup_samples == 0:
        raise ValueError(
            "after_warmup='restart' with warmup_samples=0: there is no warm-up to restart from; set "
            "after_warmup='continue' or warmup_samples above 0."
        )


def check_length(
    stages: Sequence[float],
    stage_epochs: Sequence[int] | None,
    stage_steps: Sequence[int] | None,
    on_shortfall: str,
) -> None:
    """Passes or steps say how long each stage is, not both."""
    if stage_epochs is not None and len(stage_epochs) not in (1, len(stages)):
        raise ValueError(
            f"stage_epochs={stage_epochs} for {len(stages)} stages: give one number, or one for each."
        )
    if stage_steps is None or not any(stage_steps):
        return
    if len(stage_steps) not in (1, len(stages)) or not all(stage_steps):
        raise ValueError(
            f"stage_steps={stage_steps} for {len(stages)} stage(s): give one number above 0, or one for each; 0 "
            "alone counts stage_epochs instead."
        )
    if any(passes != 1 for passes in stage_epochs or [1]):
        raise ValueError(
            f"stage_epochs={stage_epochs} and stage_steps={stage_steps} both say how long a stage is: set "
            "stage_steps=0 to count passes, or leave stage_epochs at 1."
        )
    if on_shortfall == "shrink":
        raise ValueError(
            f"stage_steps={stage_steps} gives a stage its steps whatever the number of its prompts, and "
            "on_shortfall='shrink' takes steps away with the prompts: set on_shortfall='fill', or count stage_epochs."
        )


def check_selectors(names: Sequence[str], stages: Sequence[float]) -> None:
    """There is one selector, or one for each stage."""
    if len(names) not in (1, len(stages)):
        raise ValueError(
            f"selector={names} for {len(stages)} stage(s): give one name, or one for each stage."
        )


def check_halves(reliability: bool, gradient_rollouts: str) -> None:
    """Both halves of the rollouts have gradients where they are compared."""
    if reliability and gradient_rollouts == "one_correct":
        raise ValueError(
            "reliability=True compares gradients of two halves of the rollouts, and "
            "gradient_rollouts='one_correct' takes a single one: set gradient_rollouts='all' or reliability=False."
        )


def check_order(order: Sequence[str], stages: Sequence[float], warmup_samples: int) -> None:
    """There is one order, or one for each stage; the trainer's own takes the whole pool."""
    if len(order) not in (1, len(stages)):
        raise ValueError(
            f"order={order} for {len(stages)} stage(s): give one order, or one for each."
        )
    if "trainer" not in order:
        return
    if (len(order), list(stages)) != (1, [1.0]):
        raise ValueError(
            f"order={order} with stages={stages}: in the trainer's own order all prompts are trained on and none "
            "selected; set stages=1, or choose 'shuffled' or 'adaptive'."
        )
    if warmup_samples:
        raise ValueError(
            f"order='trainer' with warmup_samples={warmup_samples}: nothing is selected, so there is nothing to warm "
            "up for; set warmup_samples=0, or choose 'shuffled' or 'adaptive'."
        )


def check_distinct(name: str, values: Sequence[float]) -> None:
    """No value is given twice."""
    if len(set(values)) < len(values):
        raise ValueError(f"{name}={values}: give numbers that differ from each other.")


def check_budget(rollout_budget: float | None, pool_sample: int | None) -> None:
    """One setting says how many candidates are scored."""
    if rollout_budget is not None and pool_sample is not None:
        raise ValueError(
            f"rollout_budget={rollout_budget} and pool_sample={pool_sample} both say how many candidates are scored: "
            "leave one of them unset."
        )


def check_trainers_order(
    rollout_budget: float | None, compute_budget: float | None, plateau_patience: int
) -> None:
    """In the trainer's own order nothing is scored and no stage ends early."""
    if rollout_budget is not None:
        raise ValueError(
            f"rollout_budget={rollout_budget} with order='trainer': nothing is scored there; leave rollout_budget "
            "unset, or choose 'shuffled' or 'adaptive'."
        )
    for name, value in [("compute_budget", compute_budget), ("plateau_patience", plateau_patience)]:
        if value:
            raise ValueError(
                f"{name}={value:g} with order='trainer': in the trainer's own order a run has the trainer's own "
                "number of steps. Choose order='shuffled', which trains on the whole pool likewise."
            )

"""A stock trainer beside each order: to all others log, checkpoints, evaluations, epochs and events are the same."""

import itertools

import pytest
import torch
from pairs import pairwise
from stock_cases import CONFIGS, shape, trained

SETTINGS = {
    "order": ["trainer", "adaptive", "shuffled"],
    "logging_strategy": ["steps", "epoch", "no"],
    "save_strategy": ["epoch", "steps", "no"],
    "eval_strategy": ["epoch", "steps", "no"],
    # Micro-batches of an optimizer step, of a generation, and passes over a generation.
    "geometry": [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 4, 1), (1, 1, 2)],
    "length": [dict(num_train_epochs=2), dict(num_train_epochs=1.5), dict(max_steps=5)],
    "resumed": [False, True],
}
ODD = [(3, 2, 1), (4, 1, 1), (2, 3, 1), (3, 2, 2)]
"""Geometries in which a pass is no whole number of optimizer steps, or of generations."""


def options_of(setting):
    accumulation, per_generation, iterations = setting["geometry"]
    options = dict(
        gradient_accumulation_steps=accumulation,
        steps_per_generation=per_generation,
        num_iterations=iterations,
        max_steps=-1,
        logging_steps=2,
        save_steps=2,
        eval_steps=3,
        **{name: setting[name] for name in setting if name.endswith("_strategy")},
    )
    options |= setting["length"]
    if setting["save_strategy"] == setting["eval_strategy"] != "no":
        options |= dict(
            load_best_model_at_end=True,
            metric_for_best_model="eval_reward",
            save_steps=3,
            greater_is_better=True,
        )
    return options


def assert_as_stock(folder, order, kill_at=None, **options):
    stock = trained(folder / "stock", None, kill_at, **options)
    ours = trained(folder / "ours", order, kill_at, **options)
    weights = stock["weights"], ours["weights"]
    if order != "trainer":
        stock, ours = shape(stock), shape(ours)
    for part in ("epochs", "events", "events after", "checkpoints", "best", "rewards", "log"):
        assert ours[part] == stock[part], part
    if order == "trainer":
        assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    return ours


def check(tmp_path, setting):
    kill_at = 4 if setting["resumed"] and setting["save_strategy"] != "no" else None
    assert_as_stock(tmp_path, setting["order"], kill_at, **options_of(setting))


def name_of(setting):
    return "-".join(
        str(list(value.items()) if isinstance(value, dict) else value) for value in setting.values()
    ).replace(" ", "")


@pytest.mark.parametrize("setting", pairwise(SETTINGS), ids=name_of)
def test_nobody_else_sees_a_difference(tmp_path, setting):
    check(tmp_path, setting)


def everything():
    """All orders, geometries and lengths, resumed and not; the strategies take turns."""
    names = [name for name in SETTINGS if name.endswith("_strategy")]
    strategies = itertools.cycle(itertools.product(*(SETTINGS[name] for name in names)))
    runs = itertools.product(
        SETTINGS["geometry"] + ODD, SETTINGS["length"], CONFIGS, SETTINGS["resumed"]
    )
    for geometry, length, order, resumed in runs:
        values = dict(zip(names, next(strategies), strict=True))
        yield dict(order=order, **values, geometry=geometry, length=length, resumed=resumed)


@pytest.mark.slow
@pytest.mark.parametrize("setting", everything(), ids=name_of)
def test_nobody_else_sees_a_difference_anywhere(tmp_path, setting):
    check(tmp_path, setting)

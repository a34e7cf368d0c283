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


OWN = ("adaptive", "shuffled")
EPOCHS = dict(logging_strategy="epoch", save_strategy="epoch", eval_strategy="epoch")
SETTINGS_OF_ODD = dict(
    EPOCHS,
    geometry=(3, 2, 1),
    length=dict(num_train_epochs=1.5),
    resumed=True,
    prompts=8,
)
"""Four micro-batches a pass, two steps of three: a unit is longer than a pass."""


def micro_steps_of_a_pass(options, prompts=12):
    per_generation = options["steps_per_generation"]
    return prompts // (2 * per_generation) * per_generation * options["num_iterations"]


def steps_of_a_pass(options, prompts):
    return -(-micro_steps_of_a_pass(options, prompts) // options["gradient_accumulation_steps"])


def without_micro_steps(run):
    """What is told of a step, not of its parts: the trainer's last one in a pass may be smaller than ours."""
    events = {
        name: [event for event in run[name] if event[0] != "on_substep_end"]
        for name in ("events", "events after")
    }
    return {**run, **events, "rewards": None}


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


def resumes_inside_a_generation(run, options):
    """Whether a checkpoint lies between two parts of a generation, which a stock trainer then rolls out anew."""
    if run["resumed at"] is None:
        return False
    prompts = options.get("prompts", 12)
    passes, steps = divmod(run["resumed at"], steps_of_a_pass(options, prompts))
    done = passes * micro_steps_of_a_pass(options, prompts)
    done += steps * options["gradient_accumulation_steps"]
    return done % (options["steps_per_generation"] * options["num_iterations"]) != 0


STOCK = {}
"""What stock trainers have shown: the same for every order beside them."""


def stock_run(folder, kill_at, options):
    """What a stock trainer shows; the parts that no resumed one can show are those of one that was not killed."""
    key = repr((kill_at, sorted(options.items())))
    if key not in STOCK:
        STOCK[key] = new_stock_run(folder, kill_at, options)
    return dict(STOCK[key])


def new_stock_run(folder, kill_at, options):
    stock = trained(folder / "stock", None, kill_at, **options)
    if not resumes_inside_a_generation(stock, options):
        return stock
    whole = trained(folder / "whole", None, **options)
    rewards = whole["rewards"][whole["saves"][stock["resumed at"]] :]
    return stock | dict(rewards=rewards, weights=whole["weights"], log=whole["log"])


def without_what_a_process_gathers(log, resumed_at):
    """Rows of a log; of the first after a resume and of the last, means over a process, only when they came."""
    known = ("step", "epoch", "learning_rate")
    first = next((i for i, row in enumerate(log) if "loss" in row and row["step"] > resumed_at), -1)
    return [
        {name: row[name] for name in known if name in row} if i in (first, len(log) - 1) else row
        for i, row in enumerate(log)
    ]


def assert_as_stock(folder, order, kill_at=None, **options):
    stock = stock_run(folder, kill_at, options)
    ours = trained(folder / "ours", order, kill_at, **options)
    if resumes_inside_a_generation(stock, options):
        for run in (stock, ours):
            run["log"] = without_what_a_process_gathers(run["log"], stock["resumed at"])
    weights = stock["weights"], ours["weights"]
    if order != "trainer":
        stock, ours = shape(stock), shape(ours)
    accumulation = options["gradient_accumulation_steps"]
    if order in OWN and micro_steps_of_a_pass(options, options.get("prompts", 12)) % accumulation:
        stock, ours = without_micro_steps(stock), without_micro_steps(ours)
    for part in ("epochs", "events", "events after", "checkpoints", "best", "rewards", "log"):
        assert ours[part] == stock[part], part
    if order == "trainer":
        assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    return ours


def check(tmp_path, setting):
    options, prompts = options_of(setting), setting.get("prompts", 12)
    kill_at = None
    if setting["resumed"] and setting["save_strategy"] != "no":
        steps = options["max_steps"]
        if steps < 0:
            steps = options["num_train_epochs"] * steps_of_a_pass(options, prompts)
        kill_at = 3 if steps > 3 else 2
        options |= dict(save_steps=2, eval_steps=2)
    assert_as_stock(tmp_path, setting["order"], kill_at, **options, prompts=prompts)


def name_of(setting):
    return "-".join(
        str(list(value.items()) if isinstance(value, dict) else value) for value in setting.values()
    ).replace(" ", "")


@pytest.mark.parametrize("setting", pairwise(SETTINGS), ids=name_of)
def test_nobody_else_sees_a_difference(tmp_path, setting):
    check(tmp_path, setting)


@pytest.mark.parametrize("order", [*OWN, "trainer, skipping"])
def test_nobody_else_sees_a_difference_where_passes_are_no_whole_steps(tmp_path, order):
    setting = dict(SETTINGS_OF_ODD, order=order)
    check(tmp_path, setting)


@pytest.mark.parametrize(
    "options",
    [
        dict(eval_on_start=True, logging_first_step=True, logging_steps=3, save_total_limit=1),
        dict(eval_delay=1, eval_strategy="epoch", save_strategy="epoch", save_total_limit=2),
        dict(save_strategy="best", eval_strategy="epoch", metric_for_best_model="eval_reward"),
        dict(num_train_epochs=0.4, logging_strategy="epoch", save_strategy="epoch"),
    ],
    ids=str,
)
def test_other_strategies_too(tmp_path, options):
    """Settings that are rarer."""
    settings = dict(
        max_steps=-1, num_train_epochs=2, eval_steps=2, save_steps=2, steps_per_generation=2
    )
    settings |= dict(gradient_accumulation_steps=1, num_iterations=1, **options)
    for order in ("adaptive", "trainer"):
        assert_as_stock(tmp_path / order, order, **settings)


@pytest.mark.parametrize("order", ["trainer", "adaptive"])
def test_a_training_that_somebody_stops_ends_as_stock(tmp_path, order):
    """In the middle of a pass, and of what feeds several steps."""
    options = options_of(dict(EPOCHS, geometry=(1, 2, 1), length=dict(num_train_epochs=2)))
    assert_as_stock(tmp_path, order, **options, stop_at=3)


def test_no_row_of_the_log_is_lost_where_a_phase_ends(tmp_path):
    """A pool with a column of few values, whose shares are logged when the phase ends."""
    options = options_of(
        dict(
            logging_strategy="steps",
            save_strategy="no",
            eval_strategy="no",
            geometry=(1, 1, 1),
            length=dict(max_steps=4),
        )
    )
    ours = assert_as_stock(tmp_path, "adaptive", **options, prompts=48, groups=3)
    assert [row["step"] for row in ours["log"] if "loss" in row] == [2, 4]
    assert ours["apart"], "nothing was logged apart: the test tests nothing"


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

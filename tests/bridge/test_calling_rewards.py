"""Rewards are called as TRL calls them: in training, after a phase, and without a trainer."""

import asyncio
import functools

import cases
import pytest

from trl_learnalign.bridge.objective import rewards_of
from trl_learnalign.evaluation.grading import Grader
from trl_learnalign.evaluation.held_out import held_out_accuracy

ROWS = [{"prompt": f"{number}?", "solution": str(number)} for number in range(3)]
TEXTS, IDS = ["a", "bb", "ccc"], [[4], [5, 5], [6, 6, 6]]


async def by_awaiting(completions, **_):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


class Awaited:
    """An object that is called."""

    async def __call__(self, completions, **_):
        return [float(len(text)) for text in completions]


def by_ids(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def by_state(completions, trainer_state, **_):
    return [len(text) + float(trainer_state.global_step) for text in completions]


def by_logging(completions, solution, log_extra, log_metric, **_):
    log_extra("wanted", list(solution))
    log_metric("longest", max(map(len, completions)))
    return [float(len(text)) for text in completions]


def scaled(completions, scale, **_):
    return [scale * len(text) for text in completions]


FORMS = [
    by_awaiting,
    Awaited(),
    functools.partial(by_awaiting),
    by_ids,
    by_state,
    by_logging,
    functools.partial(scaled, scale=1.0),
]


@pytest.mark.parametrize("reward", FORMS, ids=lambda reward: getattr(reward, "__name__", None))
@pytest.mark.parametrize("with_trainer", [False, True])
def test_every_form_of_a_reward_is_called(tmp_path, reward, with_trainer):
    trainer = cases.trainer(tmp_path) if with_trainer else None
    assert rewards_of(reward, ROWS, TEXTS, IDS, trainer) == [1.0, 2.0, 3.0]
    verdicts = Grader("own", reward).verdicts(ROWS, TEXTS, IDS)
    assert [verdict.reward for verdict in verdicts] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_gets_what_it_gets_in_training(tmp_path, is_async):
    calls = []

    def note(**given):
        calls.append(given)
        return [0.0] * len(given["completions"])

    async def note_later(**given):
        return note(**given)

    reward = note_later if is_async else note
    trainer = cases.trainer(tmp_path, rewards=[reward], max_steps=1)
    trainer.train()
    training = calls[0]
    held_out_accuracy(trainer, cases.dataset(4), reward)
    Grader("own", reward).verdicts(ROWS, TEXTS, IDS)
    held_out, evaluated = calls[-2:]
    for given in (held_out, evaluated):
        assert given.keys() == training.keys()
        assert {name: type(value) for name, value in given.items()} == {
            name: type(value) for name, value in training.items()
        }
    assert held_out["trainer_state"] is trainer.state
    assert all(isinstance(token, int) for ids in held_out["completion_ids"] for token in ids)


def test_what_a_reward_logs_is_no_part_of_training(tmp_path):
    trainer = cases.trainer(tmp_path, rewards=[by_logging])
    before = vars(trainer).copy()
    rewards_of(by_logging, ROWS, TEXTS, IDS, trainer)
    assert vars(trainer) == before
    assert not trainer._pending_extra_logs
    assert not trainer._pending_metrics


@pytest.mark.parametrize("with_trainer", [False, True])
def test_rows_that_cannot_be_judged_have_no_reward_and_no_warning(tmp_path, with_trainer, caplog):
    trainer = cases.trainer(tmp_path) if with_trainer else None
    found = rewards_of(lambda **_: [None, float("nan"), 1.0], ROWS, TEXTS, IDS, trainer)
    assert found == [None, None, 1.0]
    assert "returned None" not in caplog.text


def too_few(completions, **_):
    return [1.0]


def wordy(completions, **_):
    return ["right"] * len(completions)


def failing(completions, **_):
    raise OSError("the grader is gone")


@pytest.mark.parametrize("reward", [too_few, wordy, failing, lambda: None])
def test_a_reward_that_fails_is_named_with_what_it_should_do(reward):
    with pytest.raises(
        RuntimeError, match=rf"{reward.__name__}' failed \(.*one number per completion, or None"
    ):
        rewards_of(reward, ROWS, TEXTS, IDS)


def test_the_trainers_loop_is_used_where_it_has_one(tmp_path):
    loops = []

    async def note(completions, **_):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    trainer = cases.trainer(tmp_path, rewards=[note])
    rewards_of(note, ROWS, TEXTS, IDS, trainer)
    rewards_of(note, ROWS, TEXTS, IDS)
    assert loops[0] is trainer.async_loop
    assert loops[1].is_closed()

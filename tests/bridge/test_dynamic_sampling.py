"""Generations of the groups that teach: which ones, with which rollouts, and the gradient that they give."""

import cases
import numpy as np
import pandas as pd
import pytest
import sampling_cases
import torch
from environments import Room, pretend_to_call_tools
from hypothesis import given, settings
from hypothesis import strategies as st
from interruptions import KillAt, Killed
from peft import LoraConfig
from sampling_cases import More, Trained, right_reward, successes, texts_of
from skipping_cases import ROUNDING, distances, half_idle_reward

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge.dynamic_sampling import (
    SampledCounts,
    dynamic_sampling_problem,
    install_dynamic_sampling,
)
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.inference import roll_out, training_rows
from trl_learnalign.bridge.policy import weights_digest
from trl_learnalign.bridge.rollout_rows import choose_groups
from trl_learnalign.bridge.skipping import install_skipping
from trl_learnalign.training.checkpoints import last_complete_checkpoint

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def threefold_reward(completions, **_):
    return [3 * reward for reward in right_reward(completions)]


def is_useful(row):
    return 0 < successes(row) < 4


def expected_choice(batches, count):
    """As the words go: batch after batch what teaches; of the one that has too much, the most learnable."""
    chosen, arrival = (
        [],
        {row: i for i, row in enumerate(row for batch in batches for row in batch)},
    )
    for batch in batches:
        useful = [row for row in batch if is_useful(row)]
        useful.sort(key=lambda row: (-successes(row) * (4 - successes(row)), arrival[row]))
        chosen += useful[: count - len(chosen)]
    idle = [row for batch in batches for row in batch if not is_useful(row)]
    chosen += idle[: count - len(chosen)]
    return sorted(chosen, key=arrival.get)


def sampled(folder, skip=False, oversample=1.0, max_batches=4, **options):
    """A run with dynamic sampling: trainer, what went through it, what it observed and asked for."""
    trainer = sampling_cases.trainer(folder, **options)
    steps, more, observed = Trained(trainer), More(), []
    sampler = install_dynamic_sampling(trainer, more, oversample, max_batches, observed.append)
    if skip:
        install_skipping(trainer)
    trainer.train()
    return trainer, steps, sampler, observed, more


def flat(batches):
    return [row for batch in batches for row in batch]


def flagged(rows, flags):
    return [row for row, flag in zip(rows, flags, strict=True) if flag]


def batches_of(outcome, generation, prompts, sizes):
    """The rows of each batch of a generation, by what was asked for."""
    given = list(range(generation * prompts, (generation + 1) * prompts))
    everything = given + outcome.asked_rows.tolist()
    ends = np.cumsum(sizes)
    return [everything[end - size : end] for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize(
    "objective",
    [
        dict(loss_type="dapo"),
        dict(loss_type="bnpo", rewards=[right_reward, threefold_reward]),
        dict(loss_type="grpo", beta=0.1, peft_config=LORA, learning_rate=0.1),
    ],
)
def test_generations_are_of_the_groups_that_teach_with_those_very_rollouts(tmp_path, objective):
    """The gradient is that of a stock trainer which is given these prompts and makes the same rollouts."""
    # Row 5 k is never solved and row 5 k + 4 always: of rows 0 ... 3, 4 ... 7 three and two teach.
    settings = dict(objective, gradient_accumulation_steps=2)
    trainer, steps, sampler, observed, more = sampled(tmp_path / "ours", **settings)
    prompts, kept = 4, []
    for generation, outcome in enumerate(observed):
        batches = batches_of(outcome, generation, prompts, [4] * (len(outcome.useful) // 4))
        assert [row for row in flat(batches) if is_useful(row)] == flagged(
            flat(batches), outcome.useful
        )
        choice = expected_choice(batches, prompts)
        assert flagged(flat(batches), outcome.trained) == choice
        assert sorted(steps.texts[generation]) == texts_of(choice)
        assert all(is_useful(row) for row in choice)
        kept += choice
    assert more.asked == [(0, 0, 4), (2, 0, 4)]
    stock = sampling_cases.trainer(tmp_path / "stock", rows=kept, **settings)
    stock_steps = Trained(stock)
    stock.train()
    assert max(distances(stock_steps.gradients, steps.gradients)) < ROUNDING
    assert sampler.counts.batches == 4
    assert sampler.counts.rollouts == 4 * 16
    assert (
        sampler.counts.tokens_generated + sampler.counts.tokens_prompt
        == trainer.state.num_input_tokens_seen
    )


def test_oversampling_keeps_the_most_learnable(tmp_path):
    settings = dict(gradient_accumulation_steps=2, max_batches=1, oversample=1.5)
    _, steps, sampler, observed, more = sampled(tmp_path, **settings)
    assert more.asked == [(0, 0, 2), (2, 0, 2)]
    for generation, outcome in enumerate(observed):
        batch = batches_of(outcome, generation, 4, [6])[0]
        assert sorted(steps.texts[generation]) == texts_of(expected_choice([batch], 4))
    counts = sampler.counts
    assert (counts.generations, counts.batches, counts.rollouts) == (2, 2, 48)
    texts = [text for step in steps.texts for text in step]
    assert counts.tokens_chosen == sum(
        len(text) + 1 for text in texts
    )  # one token a character, and the end


def test_another_measure_of_learnability_may_decide(tmp_path):
    trainer = sampling_cases.trainer(tmp_path, max_steps=1, per_device_train_batch_size=8)
    steps = Trained(trainer)
    easiest = lambda rewards: rewards[:, :, 0].mean(dim=1).numpy()  # noqa: E731
    install_dynamic_sampling(
        trainer, lambda *_: [6, 7, 8, 11, 12, 13], 4.0, 1, learnability=easiest
    )
    trainer.train()
    assert sorted(steps.texts[0]) == texts_of([8, 13])  # three of four right


def test_groups_that_differ_by_rounding_alone_do_not_teach(tmp_path):
    """In float32 the mean of six times 0.3 is not 0.3, and TRL's advantages are not quite 0."""

    def reward(completions, **_):
        return [0.3] * len(completions)

    trainer = cases.trainer(
        tmp_path, rewards=reward, num_generations=6, per_device_train_batch_size=12, max_steps=1
    )
    observed = []
    install_dynamic_sampling(trainer, lambda *_: [0], 1.5, observe=observed.append)
    trainer.train()
    assert not observed[0].useful.any()
    assert not any(trainer._logs["advantages"])


@pytest.mark.parametrize("skip", [False, True])
def test_where_too_few_teach_the_others_fill_up_and_are_skipped_if_asked_for(tmp_path, skip):
    """Rows 0, 5, ... teach nothing: a cap of two batches, and one group that does."""
    rows = [0, 5, 10, 1, 15, 20, 25, 30]
    settings = dict(rows=rows, max_steps=1, gradient_accumulation_steps=2, loss_type="dapo")
    trainer = sampling_cases.trainer(tmp_path / "ours", **settings)
    steps = Trained(trainer)
    # In the trainer's dataset, row 3 is prompt 1.
    observed = []
    install_dynamic_sampling(
        trainer, lambda micro_step, start, count: [4, 5, 6, 7], 1.0, 2, observed.append
    )
    if skip:
        install_skipping(trainer)
    trainer.train()
    stock = sampling_cases.trainer(tmp_path / "stock", **settings)
    stock_steps = Trained(stock)
    stock.train()
    # Filled up in the order of arrival: what the sampler gave.
    assert observed[0].trained.tolist() == [True] * 4 + [False] * 4
    assert distances(stock_steps.gradients, steps.gradients)[0] < ROUNDING
    assert sum(steps.rows) == (4 if skip else 16)


def test_order_of_installing_makes_no_difference(tmp_path):
    found = []
    for first in ("sampling", "skipping"):
        trainer = sampling_cases.trainer(tmp_path / first, gradient_accumulation_steps=2)
        steps = Trained(trainer)
        before = dict(vars(trainer))
        skipper = install_skipping(trainer) if first == "skipping" else None
        sampler = install_dynamic_sampling(trainer, More(), 1.0, 2)
        skipper = install_skipping(trainer) if skipper is None else skipper
        trainer.train()
        found.append(torch.stack(steps.gradients))
        (skipper if first == "sampling" else sampler).detach()
        (sampler if first == "sampling" else skipper).detach()
        assert trainer._prepare_inputs == before.get(
            "_prepare_inputs", type(trainer)._prepare_inputs.__get__(trainer)
        )
        assert "_prepare_inputs" not in vars(trainer)
        assert "_generate_and_score_completions" not in vars(trainer)
        assert "_calculate_rewards" not in vars(trainer)
    assert torch.equal(*found)


def every_other_rollout(completions, **_):
    return [float(i % 2) for i in range(len(completions))]


def test_where_the_first_batch_is_enough_nothing_changes_to_the_last_bit(tmp_path):
    """With rollouts that are drawn: also the random numbers are the same."""
    runs = []
    for dynamic in (False, True):
        trainer = cases.trainer(
            tmp_path / str(dynamic),
            rewards=every_other_rollout,
            max_steps=3,
            num_iterations=2,
            steps_per_generation=2,
        )
        if dynamic:
            install_dynamic_sampling(trainer, More(), 1.0, 4)
        trainer.train()
        logged = [
            {
                name: value
                for name, value in entry.items()
                if "time" not in name and "per_second" not in name
            }
            for entry in trainer.state.log_history
        ]
        runs.append(
            (
                torch.cat([p.detach().flatten() for p in trainer.model.parameters()]),
                logged,
                trainer._logs,
            )
        )
    (stock, stock_log, stock_table), (ours, our_log, our_table) = runs
    assert torch.equal(stock, ours)
    assert our_table == stock_table
    for theirs, entry in zip(stock_log, our_log, strict=True):
        assert {
            name: value for name, value in entry.items() if not name.startswith("learnalign/")
        } == theirs


def test_logs_tell_of_everything_and_the_table_of_what_is_trained_on(tmp_path):
    def logging_reward(completions, prompts, log_extra, log_metric, **_):
        log_extra("number", [sampling_cases.number_of(prompt) for prompt in prompts])
        log_metric("calls", 1.0)
        return right_reward(completions)

    rewards = [logging_reward, threefold_reward]
    settings = dict(
        rewards=rewards,
        logging_steps=1,
        log_completions=True,
        gradient_accumulation_steps=2,
        max_steps=2,
    )
    trainer, _, _, observed, _ = sampled(tmp_path, **settings)
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    for step, (entry, outcome) in enumerate(zip(logged, observed, strict=True), start=1):
        rolled_out = range(4 * (step - 1), 4 * step), outcome.asked_rows.tolist()
        rows = [row for part in rolled_out for row in part]
        assert entry["rewards/logging_reward/mean"] == pytest.approx(
            np.mean([successes(row) / 4 for row in rows])
        )
        lengths = [len(sampling_cases.completion(row, k)) + 1 for row in rows for k in range(4)]
        assert entry["completions/mean_length"] == pytest.approx(np.mean(lengths))
        assert entry["completions/max_length"] == max(lengths)
        assert entry["frac_reward_zero_std"] <= 1
        assert entry["calls"] == 1
        assert entry["learnalign/useful_rolled_out"] == pytest.approx(
            np.mean([is_useful(row) for row in rows])
        )
        assert entry["learnalign/batches_rolled_out"] == len(rows) / 4
        table = pd.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        trained = flagged(rows, outcome.trained)
        assert table["number"].tolist() == np.repeat(trained, 4).tolist()
        assert [sampling_cases.number_of(prompt) for prompt in table["prompt"]] == table[
            "number"
        ].tolist()
        assert table["logging_reward"].tolist() == [
            float(text.startswith("y")) for text in table["completion"]
        ]
        assert (table.groupby("number")["advantage"].std() > 0).all()


def test_statistics_of_rewards_are_those_of_all_rollouts_together(tmp_path):
    """By NumPy, of what was observed: of the batches' own a mean would be another number."""

    def now_and_then(completions, **_):
        return [None if len(text) % 3 == 0 else len(text) / 4 for text in completions]

    settings = dict(
        rewards=[right_reward, now_and_then], reward_weights=[1, 0.5], logging_steps=1, max_steps=3
    )
    trainer, _, _, observed, _ = sampled(tmp_path, **settings)
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert max(entry["learnalign/batches_rolled_out"] for entry in logged) > 1
    for entry, outcome in zip(logged, observed, strict=True):
        right, other = outcome.rewards.double().numpy().reshape(-1, 2).T
        total = right + 0.5 * np.nan_to_num(other)
        for name, values in (("right_reward", right), ("now_and_then", other)):
            assert entry[f"rewards/{name}/mean"] == pytest.approx(np.nanmean(values))
            assert entry[f"rewards/{name}/std"] == pytest.approx(np.nanstd(values, ddof=1))
        assert entry["reward"] == pytest.approx(total.mean())
        assert entry["reward_std"] == pytest.approx(total.std(ddof=1))


def test_what_is_observed_is_everything_that_was_rolled_out(tmp_path):
    _, _, _, observed, _ = sampled(
        tmp_path, gradient_accumulation_steps=2, steps_per_generation=4, max_steps=4
    )
    assert [outcome.micro_step for outcome in observed] == [0, 4]
    for generation, outcome in enumerate(observed):
        rows = [*range(8 * generation, 8 * generation + 8), *outcome.asked_rows.tolist()]
        assert outcome.rewards.shape == (len(rows), 4, 1)
        assert outcome.rewards.sum(dim=(1, 2)).tolist() == [successes(row) for row in rows]
        assert outcome.trained.sum() == 8


def test_rollouts_that_feed_several_steps_are_chosen_once(tmp_path):
    settings = dict(steps_per_generation=2, num_iterations=2, max_steps=8)
    _, steps, _, observed, _ = sampled(tmp_path, **settings)
    assert [outcome.micro_step for outcome in observed] == [0, 4]
    for generation in range(2):
        first, second, third, fourth = steps.texts[4 * generation : 4 * generation + 4]
        assert (first, second) == (third, fourth)
        outcome = observed[generation]
        rows = flat(batches_of(outcome, generation, 4, [4] * (len(outcome.useful) // 4)))
        trained = flagged(rows, outcome.trained)
        assert sorted(first + second) == texts_of(trained)


def test_evaluation_and_scoring_roll_out_what_they_ask_for(tmp_path):
    trainer = sampling_cases.trainer(tmp_path)
    more = More()
    install_dynamic_sampling(trainer, more, 2.0, 4)
    trainer.evaluate(cases.dataset(4))
    rows = training_rows(trainer, trainer.train_dataset, [0] * 4 + [1] * 4)
    with preserve_trainer_state(trainer):
        inputs, _ = roll_out(trainer, rows, 3)
    assert len(inputs["advantages"]) == 8
    assert more.asked == []


def test_environments_are_reset_for_every_batch(tmp_path, monkeypatch):
    pretend_to_call_tools(monkeypatch)
    resets = []

    def room_reward(completions, environments, **_):
        resets.append([room.resets for room in environments])
        return [float(i in (0, 5)) * (len(resets) % 2) for i in range(len(completions))]

    data = cases.dataset(12, conversational=True)
    trainer = cases.trainer(
        tmp_path, data=data, rewards=room_reward, environment_factory=Room, max_steps=2
    )
    observed = []
    install_dynamic_sampling(
        trainer, lambda step, start, count: [3] * count, 1.5, 3, observed.append
    )
    trainer.train()
    # There is room for two groups. Two of the first three teach, none of the next three, and both of two more.
    assert resets == [[1] * 12, [2] * 12, [3] * 8]
    assert [outcome.useful.tolist() for outcome in observed] == [
        [True, True, False],
        [False] * 3 + [True, True],
    ]


# ---- Resuming -------------------------------------------------------------------------------------------------------


def go(folder, kill_at=None, resume=False):
    """A run whose rollouts are drawn, and feed several optimizer steps."""
    trainer = cases.trainer(
        folder,
        rewards=half_idle_reward,
        data=cases.dataset(16),
        save_strategy="steps",
        save_steps=1,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_iterations=2,
    )
    observed = []
    sampler = install_dynamic_sampling(
        trainer, lambda step, start, count: range(count), 1.5, 2, observed.append
    )
    install_skipping(trainer)
    config = LearnAlignConfig(warmup_samples=0, selector="random", stages=[16])
    trainer.add_callback(LearnAlignCallback(trainer, config))
    if kill_at is not None:
        trainer.add_callback(KillAt(kill_at))
    found = last_complete_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return norms, weights_digest(trainer), observed, sampler


def test_a_run_that_was_killed_in_the_middle_of_a_generation_comes_to_the_same(tmp_path):
    norms, weights, observed, _ = go(tmp_path / "whole")
    assert len(norms) == 8
    assert not all(outcome.trained.all() for outcome in observed)
    for step in (1, 4, 6):
        with pytest.raises(Killed):
            go(tmp_path / str(step), kill_at=step)
        resumed_norms, resumed, seen, _ = go(tmp_path / str(step), resume=True)
        assert resumed_norms == norms
        assert resumed == weights
        assert [outcome.micro_step for outcome in seen] == ([8] if step <= 4 else [])


def test_counts_go_on_from_their_state(tmp_path):
    first, second = (sampled(tmp_path / str(run))[2] for run in range(2))
    second.load_state_dict(first.state_dict())
    assert second.counts == first.counts == SampledCounts(**first.state_dict())


# ---- Refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("oversample", "max_batches", "message"),
    [
        (0.5, 1, r"oversample=0\.5, max_batches=1: give numbers of at least 1"),
        (1.0, 0, r"oversample=1\.0, max_batches=0: give numbers of at least 1"),
        (
            1.0,
            1,
            r"oversample=1, max_batches=1: no additional prompts would be rolled out",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, oversample, max_batches, message):
    with pytest.raises(ValueError, match=message):
        install_dynamic_sampling(cases.trainer(tmp_path), More(), oversample, max_batches)


def test_trainers_whose_rollouts_cannot_be_put_together_are_refused(tmp_path):
    plain = cases.trainer(tmp_path)
    assert dynamic_sampling_problem(plain) is None
    stream = cases.trainer(tmp_path, data=cases.dataset().to_iterable_dataset(), max_steps=1)
    absolute = cases.trainer(tmp_path, cases.model("gpt2"), num_iterations=2)
    with pytest.raises(ValueError, match="the training dataset is a stream"):
        install_dynamic_sampling(stream, More(), 2.0)
    with pytest.raises(ValueError, match="log-probabilities depend on padding"):
        install_dynamic_sampling(absolute, More(), 2.0)
    assert dynamic_sampling_problem(cases.trainer(tmp_path, cases.model("gpt2"))) is None
    vespo = cases.trainer(tmp_path, loss_type="vespo", vllm_importance_sampling_clip_max=0.5)
    vespo.use_vllm = True
    with pytest.raises(ValueError, match="padding enters the loss"):
        install_dynamic_sampling(vespo, More(), 2.0)


def test_too_few_rows_are_an_error(tmp_path):
    trainer = sampling_cases.trainer(tmp_path)
    install_dynamic_sampling(trainer, lambda *_: [1], 2.0)
    with pytest.raises(ValueError, match="more_rows returned 1 rows, but 2 were requested"):
        trainer.train()


def test_entries_that_nobody_knows_are_an_error(tmp_path):
    trainer = sampling_cases.trainer(tmp_path)
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: {
        **generate(rows),
        "curiosity": torch.ones(len(rows)),
    }
    install_dynamic_sampling(trainer, More(), 2.0)
    with pytest.raises(
        ValueError, match=r"cannot combine these rollouts.*\['curiosity'\].*Switch it off"
    ):
        trainer.train()


def test_what_was_installed_last_is_detached_first(tmp_path):
    trainer = cases.trainer(tmp_path)
    before = dict(vars(trainer))
    first, second = (install_dynamic_sampling(trainer, More(), 2.0) for _ in range(2))
    with pytest.raises(
        RuntimeError,
        match="_prepare_inputs was replaced again in the meantime: undo the later replacement first",
    ):
        first.detach()
    second.detach()
    first.detach()
    assert vars(trainer) == before


@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=20),
    st.integers(0, 20),
    st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_groups_are_chosen_as_the_words_say(groups, count, random):
    count = min(count, len(groups))
    batches = np.sort([random.randrange(3) for _ in groups])
    right = np.array([successes for successes, _ in groups])
    useful, learnability = (right > 0) & (right < 4), right / 4 * (1 - right / 4)
    chosen = choose_groups(useful, learnability, batches, count)
    expected = [number for number in range(len(groups)) if useful[number]]
    expected.sort(
        key=lambda number: (batches[number], -right[number] * (4 - right[number]), number)
    )
    expected += [number for number in range(len(groups)) if not useful[number]]
    assert chosen.tolist() == sorted(expected[:count])

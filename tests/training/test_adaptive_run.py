"""Continual selection inside the trainer: what is trained on, what is kept, and what stays untouched."""

import dataclasses
import json
import logging

import cases
import numpy as np
import pandas as pd
import pytest
import sampling_cases
import torch
from adaptive_cases import LEAVES, go, history, settings, weights
from datasets import Dataset
from interruptions import KillAt, Killed
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.adaptive import Outcomes
from trl_learnalign.measuring import embeddings
from trl_learnalign.records.store import StoreError
from trl_learnalign.training.sampler import AdaptiveSampler

# ---- The order ------------------------------------------------------------------------------------------------------


def test_prompts_are_drawn_by_what_came_out_before(tmp_path):
    """From outside: the history alone, replayed, draws the same prompts and predicts the same rates."""
    _, callback = go(tmp_path, settings(stage_steps=10))
    table = history(callback)
    assert len(table) == 20
    sampler = AdaptiveSampler(
        callback.run.order.adaptive.belief.features, callback.config, callback.plan.geometry
    )
    sampler.begin_stage("stage_1", np.arange(24))
    for step, rows in table.groupby("step"):
        drawn = sampler.draw(step, 2)
        assert rows["index"].tolist() == drawn.tolist()
        expected = sampler.belief.posterior(drawn, step + 1).success_rate
        np.testing.assert_array_equal(rows["predicted"], expected)
        right, wrong = rows["right"].to_numpy(), rows["wrong"].to_numpy()
        assert right.tolist() == [sampling_cases.successes(row) for row in rows["index"]]
        sampler.belief.record(Outcomes.at(step + 1, drawn, right, wrong), step + 1)


LIMIT = 4
"""Tokens after which completions are cut off, where they are."""


def cut_off(prompts, trainer):
    """Rollouts of which the longer ones do not end."""
    made = sampling_cases.roll_out(prompts, trainer)
    return {**made, "completion_ids": [ids[:LIMIT] for ids in made["completion_ids"]]}


def lengths_of(row, limit=100):
    """Tokens of a prompt, and the mean of its completions, by the tokenizer."""
    encode = cases.tokenizer()
    completions = [
        min(limit, len(encode(sampling_cases.completion(row, rollout)).input_ids) + 1)
        for rollout in range(sampling_cases.ROLLOUTS)
    ]
    return len(encode(cases.dataset(24)[row]["prompt"]).input_ids), np.mean(completions)


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("changes", [{}, dict(max_generation_batches=3, oversample=1.5)])
def test_lengths_are_those_of_the_rollouts(tmp_path, changes, is_cut):
    """From outside: the tokenizer's lengths of the texts that the rollout function returns.

    TRL empties the mask of a completion that is cut off; its tokens were generated all the same.
    """
    options = dict(mask_truncated_completions=True, rollout_func=cut_off) if is_cut else {}
    _, callback = go(tmp_path, settings(stage_steps=6, **changes), **options)
    table = history(callback)
    assert len(table) >= 12
    for row, read, written in table[["index", "prompt_tokens", "completion_tokens"]].itertuples(
        index=False
    ):
        assert (read, written) == lengths_of(row, LIMIT if is_cut else 100)


@pytest.mark.parametrize("prompts", [22, 23])
def test_dynamic_sampling_rolls_out_more_of_the_whole_pool(tmp_path, prompts):
    """Nothing is ever right, so all batches are rolled out. A pass of 23 prompts leaves one over."""
    config = settings(order="shuffled", max_generation_batches=4, stage_epochs=1)
    options = dict(rewards=lambda completions, **_: [0.0] * len(completions), prompts=prompts)
    _, callback = go(tmp_path, config, **options)
    table = history(callback)
    generations = [part["index"].to_numpy() for _, part in table.groupby("step", sort=False)]
    assert {len(rows) for rows in generations} == {8}
    more = np.concatenate([rows[2:] for rows in generations])
    counts = np.bincount(more, minlength=prompts)
    assert counts.max() <= 6  # three on average
    assert np.mean(counts > 0) > 0.9
    assert all(len(set(rows.tolist())) == 8 for rows in generations)


def test_cheap_prompts_are_trained_on_more_if_the_gain_is_divided_by_the_cost(tmp_path):
    """All prompts are equally hard; every other one has completions of sixteen letters instead of one."""

    def roll_out(prompts, trainer):
        made = sampling_cases.roll_out(prompts, trainer)
        number = [sampling_cases.number_of(prompt) for prompt in prompts]
        encode = trainer.processing_class
        for place, own in enumerate(number):
            text = ("y" if place % 2 else "n") + "abcde" * (own % 2) * 3
            made["completion_ids"][place] = [*encode(text).input_ids, encode.eos_token_id]
        return made

    shares = {}
    for by_cost in (False, True):
        config = settings(
            adaptive_embeddings="none",
            adaptive_exploration=0.0,
            adaptive_cool_down=1,
            adaptive_gain_per_cost=by_cost,
            generation_price=8.0,
            stage_steps=40,
        )
        trainer, callback = go(tmp_path / str(by_cost), config, rollout_func=roll_out)
        assert history(callback)["success_rate"].eq(0.5).all()
        shares[by_cost] = (history(callback)["index"].iloc[40:] % 2).mean()
    assert shares[True] < 0.3 < 0.4 < shares[False]
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    names = "learnalign/predicted_rollout_cost", "learnalign/observed_rollout_cost"
    predicted, observed = (logged[-1][name] for name in names)
    assert predicted == pytest.approx(observed, rel=0.3)


def test_more_of_what_is_rolled_out_teaches_than_of_the_pool(tmp_path):
    """Three prompts of five can be learned, by their number; a column tells the number's rest."""
    data = cases.dataset(100)
    kind = np.eye(5)[np.arange(100) % 5]
    data = data.add_column("kind", kind.tolist())
    trainer = GRPOTrainer(
        model=cases.model(),
        reward_funcs=sampling_cases.right_reward,
        args=cases.grpo_config(tmp_path, num_generations=4, learning_rate=0.0),
        train_dataset=data,
        processing_class=cases.tokenizer(),
        rollout_func=sampling_cases.roll_out,
    )
    config = settings(
        adaptive_embeddings="kind", stage_steps=40, adaptive_cool_down=2, adaptive_exploration=0.0
    )
    callback = LearnAlignCallback(trainer, config)
    trainer.add_callback(callback)
    trainer.train()
    table = history(callback)
    useful = ((table["right"] > 0) & (table["wrong"] > 0)).to_numpy()
    assert useful[20:].mean() > 0.9  # 0.6 of the pool
    late = table.iloc[40:]
    assert np.abs(late["predicted"] - late["success_rate"]).mean() < 0.2


def test_a_stage_learns_from_what_was_scored(tmp_path):
    config = settings(stages=[0.5, 0.5], order=["shuffled", "adaptive"], selector="learnability")
    _, callback = go(tmp_path / "a", config)
    assert callback.run.order.adaptive.belief.generation > 0
    scored = pd.read_parquet(callback.folder / "stage_1.parquet")
    known = callback.run.order.adaptive.belief.last_rolled_out[scored["index"]]
    assert (known >= 0).all()  # whoever was scored has been seen
    table = history(callback)
    first = table[table["phase"] == "stage_2"].iloc[0]
    assert abs(first["predicted"] - first["success_rate"]) < 0.5
    # The order of the first stage is the plan's, whatever is believed.
    plain = LearnAlignConfig(
        warmup_samples=0, stages=[0.5, 0.5], selector="learnability", feature_dim=64
    )
    _, other = go(tmp_path / "b", plain)
    stage_1 = [
        frame[frame["phase"] == "stage_1"]["index"].tolist() for frame in (table, history(other))
    ]
    assert stage_1[0] == stage_1[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_dataloader_workers_change_nothing(tmp_path, workers):
    config = settings(stage_steps=6)
    _, callback = go(tmp_path / "run", config, dataloader_num_workers=workers)
    _, reference = go(tmp_path / "reference", config)
    pd.testing.assert_frame_equal(history(callback), history(reference))


def test_hidden_states_of_a_killed_run_are_deleted(tmp_path, monkeypatch):
    """Killed after the features were written: the larger folder that they were made of goes with the next run."""
    config = settings(adaptive_embeddings="hidden", stage_steps=2)
    with monkeypatch.context() as patched:
        patched.setattr(embeddings.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            go(tmp_path, config)
    left = tmp_path / "_learnalign" / embeddings.PHASE
    assert left.exists()
    _, callback = go(tmp_path, config)
    assert not left.exists()
    assert callback.trainer.state.global_step == 2


def killed(*_, **__):
    raise Killed


# ---- Interrupted ----------------------------------------------------------------------------------------------------

VARIANTS = {
    "adaptive": ({}, {}),
    "oversampled": (dict(oversample=1.5), {}),
    "batches": (dict(max_generation_batches=3), {}),
    "several steps a generation": ({}, dict(steps_per_generation=2, num_iterations=2)),
    "several generations a step": ({}, dict(gradient_accumulation_steps=4, steps_per_generation=2)),
    "staged": (dict(stages=[0.5, 0.5], warmup_samples=4), {}),
    "by cost": (dict(adaptive_gain_per_cost=True, generation_price=8.0), {}),
}


GATED = "adaptive", "batches"  # the others show nearly the same


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in GATED)) for name in VARIANTS],
)
def test_a_run_killed_at_any_step_goes_on_bit_by_bit(tmp_path, variant):
    changes, options = VARIANTS[variant]
    config = settings(**changes)
    trainer, callback = go(tmp_path / "whole", config, **options)
    expected = history(callback), weights(trainer), callback.record.contents.ledger.total
    total = callback.plan.total_steps
    for step in {1, 2, total // 2, total // 2 + 1, total - 1}:
        folder = tmp_path / f"killed-{step}"
        with pytest.raises(Killed):
            go(folder, config, kill_at=step, **options)
        trainer, callback = go(folder, config, resume=True, **options)
        pd.testing.assert_frame_equal(history(callback), expected[0])
        assert all(torch.equal(a, b) for a, b in zip(weights(trainer), expected[1], strict=True))
        ledger = callback.record.contents.ledger.total
        assert dataclasses.replace(ledger, seconds=0) == dataclasses.replace(expected[2], seconds=0)


def test_a_checkpoint_without_the_features_it_began_with_is_refused(tmp_path):
    with pytest.raises(Killed):
        go(tmp_path, settings(), kill_at=2)
    (tmp_path / "checkpoint-2" / "learnalign_features.safetensors").unlink()
    (tmp_path / "_learnalign" / "prompt_features.safetensors").unlink()
    trainer = sampling_cases.trainer(tmp_path, rows=list(range(24)), max_steps=-1)
    trainer.add_callback(LearnAlignCallback(trainer, settings()))
    with pytest.raises(
        StoreError, match=r"checkpoint-2 cannot .*: learnalign_features\.safetensors is missing"
    ):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "changed",
    [
        dict(order="shuffled"),
        dict(adaptive_decay=0.9),
        dict(oversample=2),
        dict(skip_zero_advantages=False),
    ],
)
def test_another_order_in_the_same_folder_is_another_run(tmp_path, changed):
    go(tmp_path, settings(stage_steps=2))
    with pytest.raises(StoreError, match="was written by another run"):
        go(tmp_path, settings(**{"stage_steps": 2, "skip_forced_scoring": True, **changed}))


def test_the_price_makes_another_run_only_where_the_order_depends_on_it(tmp_path):
    for by_cost in (False, True):
        folder, given = tmp_path / str(by_cost), dict(stage_steps=3, adaptive_gain_per_cost=by_cost)
        with pytest.raises(Killed):
            go(folder, settings(**given), kill_at=2)
        if by_cost:
            with pytest.raises(StoreError, match=r"another run(?s:.*)generation_price"):
                go(folder, settings(**given, generation_price=8), resume=True)
        trainer, _ = go(
            folder, settings(**given, generation_price=1 if by_cost else 8), resume=True
        )
        assert trainer.state.global_step == 3


# ---- What is skipped ------------------------------------------------------------------------------------------------


def test_skipping_changes_the_cost_and_not_the_weights(tmp_path):
    options = dict(stage_steps=8, order="shuffled", skip_forced_scoring=True)
    skipped, with_skipping = go(tmp_path / "skipped", settings(**options))
    whole, without = go(tmp_path / "whole", settings(**options, skip_zero_advantages=False))
    for one, other in zip(weights(skipped), weights(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert history(with_skipping)["index"].tolist() == history(without)["index"].tolist()
    costs = [c.record.contents.ledger.total for c in (with_skipping, without)]
    assert costs[0].tokens_generated == costs[1].tokens_generated
    assert costs[0].tokens_prompt == costs[1].tokens_prompt
    table = history(with_skipping)
    idle = table[(table["right"] == 0) | (table["wrong"] == 0)]
    texts = cases.dataset(24)["prompt"]
    tokens = {
        row: sum(len(texts[row]) + len(sampling_cases.completion(row, k)) + 1 for k in range(4))
        for row in range(24)
    }
    spared = costs[1].tokens_trained - costs[0].tokens_trained
    left = sum(tokens[row] for row in idle["index"]) - spared
    # A step without a useful row keeps one, so that there is something to go through.
    steps_without = (idle.groupby("step").size() == 2).sum()
    longest = max(map(len, texts)) + 8
    assert spared > 0
    assert 0 <= left <= longest * steps_without


def test_where_rows_have_a_gradient_all_the_same_nothing_is_skipped_and_it_is_said(
    tmp_path, caplog
):
    cases.model().save_pretrained(tmp_path / "policy")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        _, callback = go(tmp_path / "run", settings(stage_steps=2), policy=policy, beta=0.1)
    assert callback.additions.not_skipped is not None
    assert "ollouts without an advantage are trained on like the others" in caplog.text
    assert "beta" in callback.additions.not_skipped


def test_of_what_is_rolled_out_besides_the_most_learnable_is_trained_on(tmp_path):
    trainer, callback = go(tmp_path, settings(oversample=2.0, stage_steps=6))
    table = history(callback)
    assert (table.groupby("step").size() == 4).all()  # two are trained on
    log = [entry for entry in trainer.state.log_history if "learnalign/useful_groups" in entry]
    seen = table.assign(useful=(table["right"] > 0) & (table["wrong"] > 0)).groupby("step")[
        "useful"
    ]
    most = np.minimum(seen.sum().to_numpy(), 2) / 2
    for entry in log:
        steps = slice(0, 6)
        assert entry["learnalign/useful_groups"] == pytest.approx(most[steps].mean())


# ---- What is left alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(gradient_accumulation_steps=2, num_iterations=2)])
def test_with_nothing_switched_on_a_stock_trainer_trains_bit_identically(tmp_path, options):
    def trained(name, with_callback):
        trainer = cases.trainer(tmp_path / name, num_train_epochs=2, **options)
        if with_callback:
            config = LearnAlignConfig(**LEAVES, order="trainer")
            trainer.add_callback(LearnAlignCallback(trainer, config))
        trainer.train()
        logged = [
            (entry.get("loss"), entry.get("grad_norm")) for entry in trainer.state.log_history
        ]
        return weights(trainer), logged, trainer.state.global_step

    plain, beside = trained("plain", False), trained("beside", True)
    assert plain[2] == beside[2] > 0
    assert plain[1] == beside[1]
    assert all(torch.equal(a, b) for a, b in zip(plain[0], beside[0], strict=True))


def test_the_trainers_own_order_can_be_skipped_and_sampled_in(tmp_path):
    options = dict(save_strategy="no", max_steps=4)
    plain, _ = go(tmp_path / "plain", LearnAlignConfig(**LEAVES, order="trainer"), **options)
    config = LearnAlignConfig(**LEAVES, order="trainer", skip_zero_advantages=True)
    skipped, callback = go(tmp_path / "skipped", config, **options)
    for one, other in zip(weights(plain), weights(skipped), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert callback.additions.skipper.counts.rows_trained < 32
    config = dataclasses.replace(config, max_generation_batches=3)
    _, callback = go(tmp_path / "sampled", config, **options)
    assert callback.additions.sampler.counts.batches > 4


def in_own_order(folder, kill_at=None, resume=False):
    """Rollouts that went through the model, step by step, in the trainer's own order with dynamic sampling."""
    options = dict(save_strategy="steps", save_steps=1, gradient_accumulation_steps=2)
    trainer = sampling_cases.trainer(
        folder, rows=list(range(24)), max_steps=6, steps_per_generation=1, **options
    )
    trained = sampling_cases.Trained(trainer)
    config = LearnAlignConfig.adaptive(order="trainer", oversample=1.5, max_generation_batches=3)
    trainer.add_callback(LearnAlignCallback(trainer, config))
    if kill_at is not None:
        trainer.add_callback(KillAt(kill_at))
    trainer.train(resume_from_checkpoint=resume or None)
    return trained.texts


def test_a_resumed_run_in_the_trainers_own_order_asks_for_the_prompts_it_would_have_asked_for(
    tmp_path,
):
    whole = in_own_order(tmp_path / "whole")
    for step in (1, 4):
        with pytest.raises(Killed):
            in_own_order(tmp_path / str(step), kill_at=step)
        rest = in_own_order(tmp_path / str(step), resume=True)
        assert list(map(sorted, rest)) == list(map(sorted, whole[step:]))


# ---- Embeddings -----------------------------------------------------------------------------------------------------


def embed(prompts):
    return [[float(len(prompt)), float(prompt.count("a"))] for prompt in prompts]


def too_few(prompts):
    return [[1.0]]


def test_a_function_of_ones_own_tells_prompts_apart(tmp_path):
    config = settings(stage_steps=2, adaptive_embeddings="test_adaptive_run:embed")
    _, callback = go(tmp_path, config)
    lengths = np.array([len(text) for text in cases.dataset(24)["prompt"]])
    features = callback.run.order.adaptive.belief.features
    assert len(np.unique(features, axis=0)) == len(
        np.unique(lengths)
    )  # alike where the function says so
    notes = json.loads((callback.folder / "run.json").read_text())["phases"]
    assert "embeddings" not in notes.get("base", {})  # no model has read anything


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "is not 'hidden', 'none', a column of the dataset"),
        ("no_such_module:embed", "cannot be imported"),
        ("test_adaptive_run:absent", "cannot be imported"),
    ],
)
def test_embeddings_that_are_not_there_are_named_before_anything_expensive(tmp_path, name, message):
    trainer = cases.trainer(tmp_path)
    with pytest.raises(ValueError, match=message):
        LearnAlignCallback(trainer, settings(adaptive_embeddings=name))


def test_a_column_without_numbers_is_named(tmp_path):
    data = Dataset.from_dict({"prompt": ["a", "b", "c", "d"], "kind": [["x"]] * 4})
    trainer = cases.trainer(tmp_path, data=data)
    with pytest.raises(ValueError, match=r"row 0 of the column has \['x'\], which is not a list"):
        LearnAlignCallback(trainer, settings(adaptive_embeddings="kind"))


def test_a_function_with_too_few_rows_is_named(tmp_path):
    with pytest.raises(ValueError, match="returned 1 rows for 24 prompts"):
        go(tmp_path, settings(adaptive_embeddings="test_adaptive_run:too_few"))


def test_reading_the_prompts_is_charged_and_done_once(tmp_path):
    config = settings(stage_steps=2)
    _, callback = go(tmp_path, config, save_strategy="no")
    cost = callback.record.contents.ledger.entries["base"]["scoring"]
    assert cost.tokens_forward == sum(map(len, cases.dataset(24)["prompt"]))
    assert not (callback.folder / "embeddings").exists()  # hidden states take much more room
    features = (callback.folder / "prompt_features.safetensors").read_bytes()
    _, again = go(tmp_path, config, save_strategy="no")
    assert (again.folder / "prompt_features.safetensors").read_bytes() == features
    # A run is charged for what it uses, whoever has read the prompts.
    assert again.record.contents.ledger.entries["base"]["scoring"].tokens_forward == (
        cost.tokens_forward
    )


def test_reading_the_prompts_says_how_far_it_is(tmp_path, caplog):
    logger = "trl_learnalign.measuring.base"
    caplog.set_level(logging.INFO, logger)
    go(tmp_path, settings(stage_steps=1, shard_size=12), disable_tqdm=False)
    first, last = [record.getMessage() for record in caplog.records if record.name == logger]
    assert first.startswith("all prompts: embeddings: 12 of 24 prompts (50%), ")
    assert last == "all prompts: embeddings: 24 of 24 prompts (100%)"


# ---- Settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(order="sorted"), "choose one of 'auto', 'shuffled', 'adaptive', 'trainer'"),
        (dict(order=["adaptive", "shuffled"]), "for 1 stage"),
        (dict(order="trainer", stages=[0.5, 0.5]), "set stages=1"),
        (dict(order="trainer", warmup_samples=4), "set warmup_samples=0"),
        (dict(oversample=0.5), "give a number of at least 1"),
        (dict(max_generation_batches=0), "whole number of at least 1"),
        (dict(adaptive_decay=1.5), "above 0 and at most 1"),
        (dict(adaptive_concentration=[0.0]), "give a number of at least 0.01"),
        (dict(adaptive_exploration=2), "a share from 0 to 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LearnAlignConfig(**{**LEAVES, **options})

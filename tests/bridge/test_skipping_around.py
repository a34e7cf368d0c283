"""What surrounds skipping: when it is off, what it does not touch, how it is given back, resumed and planned."""

import logging
import re

import cases
import numpy as np
import pytest
import skipping_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interruptions import KillAt, Killed
from peft import LoraConfig
from skipping_cases import half_idle_reward
from trl import GRPOTrainer

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge import inference, objective, rollout_rows
from trl_learnalign.bridge.dynamic_sampling import install_dynamic_sampling
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.inference import roll_out, training_rows
from trl_learnalign.bridge.policy import weights_digest
from trl_learnalign.bridge.rollout_rows import plan_rows
from trl_learnalign.bridge.skipping import ZeroAdvantageFilter, install_skipping
from trl_learnalign.records.notes import RolloutsNote
from trl_learnalign.training.checkpoints import last_complete_checkpoint

# ---- Off, with a word -----------------------------------------------------------------------------------------------

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
OFF = {
    "beta": (dict(beta=0.1, peft_config=LORA), "beta=0.1: the KL term has a gradient in every row"),
    "entropy": (dict(entropy_coef=0.01), "the entropy bonus has a gradient in every row"),
    "adaptive entropy": (
        dict(use_adaptive_entropy=True),
        "the entropy bonus has a gradient in every row",
    ),
    "quantile": (
        dict(top_entropy_quantile=0.5),
        "top_entropy_quantile=0.5: which tokens enter the loss depends on all rows",
    ),
    "noise": (
        dict(neftune_noise_alpha=5.0),
        "neftune_noise_alpha=5.0: the noise depends on padding",
    ),
}


@pytest.mark.parametrize("case", OFF)
def test_where_every_row_may_have_a_gradient_nothing_is_skipped_and_the_log_says_why(
    tmp_path, caplog, case
):
    options, reason = OFF[case]
    trainer = cases.trainer(tmp_path, **options)
    assert_off(trainer, caplog, reason)


def assert_off(trainer, caplog, reason):
    before = dict(vars(trainer))
    callbacks = list(trainer.callback_handler.callbacks)
    with caplog.at_level(logging.WARNING):
        said = install_skipping(trainer)
    assert reason in said
    assert caplog.messages == [
        f"Skipping is off, and rollouts without an advantage are trained on like the others: {said}."
    ]
    assert vars(trainer) == before
    assert trainer.callback_handler.callbacks == callbacks


def test_a_loss_of_its_own_is_not_skipped(tmp_path, caplog, monkeypatch):
    class Squared(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) ** 2

    monkeypatch.setattr(cases, "GRPOTrainer", Squared)
    assert_off(
        cases.trainer(tmp_path),
        caplog,
        "Squared overrides _compute_loss, so the normaliser of its loss",
    )


def test_a_loss_that_was_replaced_is_not_skipped(tmp_path, caplog):
    trainer = cases.trainer(tmp_path)
    trainer.compute_loss = trainer.compute_loss
    assert_off(trainer, caplog, "compute_loss of this trainer was replaced")


def test_an_unknown_loss_is_not_skipped(tmp_path, caplog):
    trainer = cases.trainer(tmp_path)
    trainer.loss_type = "new"
    assert_off(trainer, caplog, "loss_type='new': its normaliser is unknown")


def test_the_load_balancing_of_experts_is_not_skipped(tmp_path, caplog):
    trainer = cases.trainer(tmp_path)
    trainer.aux_loss_enabled = True
    assert_off(
        trainer, caplog, "the load balancing of a mixture of experts has a gradient in every row"
    )


def test_an_adapter_that_mixes_rows_is_not_skipped(tmp_path, caplog):
    from peft import LilyConfig

    lily = LilyConfig(r=2, target_modules=["q_proj"], stride_A=1, num_B=2, task_type="CAUSAL_LM")
    assert_off(
        cases.trainer(tmp_path, peft_config=lily),
        caplog,
        "whose router averages over all rows of a forward pass",
    )


ADAM = dict(max_steps=6, weight_decay=0.1, learning_rate=1e-2)


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_experts_that_idle_rows_alone_may_reach_are_not_skipped_and_the_log_says_why(
    tmp_path, caplog
):
    """A gradient of 0 is another thing for AdamW than none."""
    stock, _, _ = skipping_cases.trained(tmp_path / "stock", False, family="routed", **ADAM)
    with caplog.at_level(logging.WARNING):
        ours, _, skipper = skipping_cases.trained(tmp_path / "ours", True, family="routed", **ADAM)
    assert torch.equal(weights(stock), weights(ours))
    assert re.search(r"which modules run depends on the tokens \(.*experts", skipper.problem)
    said = f"Skipping is off, and rollouts without an advantage are trained on like the others: {skipper.problem}."
    assert caplog.messages.count(said) == 1
    assert skipper.counts.rows_given == 0


def test_experts_that_are_not_trained_are_no_reason(tmp_path):
    options = dict(family="routed", peft_config=LORA, **ADAM)
    stock, _, _ = skipping_cases.trained(tmp_path / "stock", False, **options)
    ours, steps, skipper = skipping_cases.trained(tmp_path / "ours", True, **options)
    assert skipper.problem is None
    assert sum(steps.rows) < skipper.counts.rows_given
    torch.testing.assert_close(weights(stock), weights(ours), rtol=1e-6, atol=1e-7)


def test_a_run_notes_why_its_experts_are_not_skipped(tmp_path):
    trainer = cases.trainer(tmp_path, cases.model("routed"), max_steps=2)
    callback = LearnAlignCallback(trainer, LearnAlignConfig.adaptive(order="shuffled"))
    trainer.add_callback(callback)
    trainer.train()
    note = callback.record.get("stage_1", RolloutsNote)
    assert "which modules run depends on the tokens" in note.not_skipped
    assert note.tokens_trained is None


def test_a_clip_range_without_1_under_vespo_is_not_skipped(tmp_path, caplog):
    trainer = cases.trainer(tmp_path, loss_type="vespo")
    trainer.use_vllm = True
    assert objective.skipping_problem(trainer) is None
    trainer.vllm_importance_sampling_clip_max = 0.5
    assert_off(
        trainer,
        caplog,
        "a clip range of the vLLM ratio that excludes 1, so padding enters the loss",
    )


def test_entries_that_nobody_knows_leave_the_generation_whole(tmp_path, caplog, monkeypatch):
    class Curious(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            return {**batch, "curiosity": torch.ones(len(batch["advantages"]))}

    monkeypatch.setattr(cases, "GRPOTrainer", Curious)
    with caplog.at_level(logging.WARNING):
        _, steps, skipper = skipping_cases.trained(tmp_path, True, max_steps=2)
    assert steps.rows == [8, 8]
    assert skipper.counts.rows_trained == 16
    said = [message for message in caplog.messages if "curiosity" in message]
    assert said == [
        "Rollouts without an advantage are trained on like the others, because a generation has unknown entries, "
        "['curiosity']."
    ]


# ---- What it does not touch -----------------------------------------------------------------------------------------


def test_evaluation_and_scoring_see_every_row(tmp_path):
    plain = cases.trainer(tmp_path / "plain", rewards=half_idle_reward)
    trainer = cases.trainer(tmp_path / "ours", rewards=half_idle_reward)
    assert isinstance(install_skipping(trainer), ZeroAdvantageFilter)
    assert evaluated(trainer) == evaluated(plain)
    rows = training_rows(trainer, trainer.train_dataset, [0] * 4 + [1] * 4)
    with preserve_trainer_state(trainer):
        inputs, _ = roll_out(trainer, rows, 3)
    assert len(inputs["advantages"]) == 8
    assert not inputs["advantages"][:4].any()


def evaluated(trainer):
    torch.manual_seed(1)
    metrics = trainer.evaluate(cases.dataset(4))
    return {
        name: value
        for name, value in metrics.items()
        if "time" not in name and "_per_second" not in name
    }


def test_the_trainer_is_given_back(tmp_path):
    trainer = cases.trainer(tmp_path)
    before, callbacks = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
    accelerator = dict(vars(trainer.accelerator))
    skipper = install_skipping(trainer)
    assert vars(trainer) != before
    skipper.detach()
    assert vars(trainer) == before
    assert vars(trainer.accelerator) == accelerator
    assert trainer.callback_handler.callbacks == callbacks


def test_what_was_installed_last_is_detached_first(tmp_path):
    trainer = cases.trainer(tmp_path)
    before = dict(vars(trainer))
    skipper = install_skipping(trainer)
    sampler = install_dynamic_sampling(trainer, lambda *_: [0], 2.0)
    with pytest.raises(
        RuntimeError,
        match="_prepare_inputs was replaced again in the meantime: undo the later replacement first",
    ):
        skipper.detach()
    sampler.detach()
    skipper.detach()
    assert vars(trainer) == before


def test_skipping_twice_is_skipping_once(tmp_path):
    trainer = cases.trainer(tmp_path)
    install_skipping(trainer)
    with pytest.raises(RuntimeError, match="Skipping is already installed on this trainer"):
        install_skipping(trainer)


# ---- Resuming -------------------------------------------------------------------------------------------------------


def go(folder, kill_at=None, resume=False, **options):
    """A run whose completions feed several optimizer steps."""
    trainer = cases.trainer(
        folder,
        rewards=half_idle_reward,
        data=cases.dataset(16),
        save_strategy="steps",
        save_steps=1,
        loss_type="bnpo",
        **options,
    )
    skipper = install_skipping(trainer)
    config = LearnAlignConfig(warmup_samples=0, selector="random", stages=[16])
    trainer.add_callback(LearnAlignCallback(trainer, config))
    if kill_at is not None:
        trainer.add_callback(KillAt(kill_at))
    found = last_complete_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return skipper, norms, weights_digest(trainer)


def test_a_run_that_was_killed_in_the_middle_of_a_generation_comes_to_the_same(tmp_path):
    options = dict(gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=2)
    skipper, norms, weights = go(tmp_path / "whole", **options)
    assert skipper.counts.rows_trained < skipper.counts.rows_given
    assert len(norms) == 8
    for step in (1, 3, 6):
        with pytest.raises(Killed):
            go(tmp_path / str(step), kill_at=step, **options)
        _, resumed_norms, resumed = go(tmp_path / str(step), resume=True, **options)
        assert resumed_norms == norms
        assert resumed == weights


# ---- Groups of which nothing can be learned -------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    ("rewards", "summed", "one_by_one"),
    [
        ([[0.1, 1], [0.1, 1], [0.1, 1]], True, True),
        ([[0.1, 1], [0.1, 1], [0.2, 1]], False, False),
        ([[0, 1], [1, 0], [0, 1]], True, False),  # the same in sum
        ([[1, NAN], [NAN, 1], [1, NAN]], True, True),  # a function may have no word in it
        ([[NAN, NAN], [1, 2], [NAN, NAN]], True, True),  # one rollout is alone
        ([[NAN, NAN], [1, 2], [0, 2]], False, False),
        ([[NAN, NAN]] * 3, True, True),
    ],
)
def test_a_group_is_silent_if_all_its_rollouts_earned_the_same(
    tmp_path, rewards, summed, one_by_one
):
    functions = [half_idle_reward, skipping_cases.graded_reward]
    options = dict(rewards=functions, num_generations=3, per_device_train_batch_size=6)
    two_groups = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], *rewards])
    for aggregation, expected in (
        ("sum_then_normalize", summed),
        ("normalize_then_sum", one_by_one),
    ):
        trainer = cases.trainer(tmp_path, multi_objective_aggregation=aggregation, **options)
        assert inference.silent_groups(trainer, two_groups).tolist() == [False, expected]


# ---- The plan -------------------------------------------------------------------------------------------------------


@st.composite
def flags_of_ranks(draw):
    micro_batches, ranks = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rows = micro_batches * draw(st.integers(1, 6))
    flags = st.lists(st.booleans(), min_size=rows, max_size=rows)
    lengths = st.lists(st.integers(0, 9), min_size=rows, max_size=rows)
    useful = [np.array(draw(flags)) for _ in range(ranks)]
    tokens = [np.array(draw(lengths)) for _ in range(ranks)]
    in_loss = [length * np.array(draw(flags)) for length in tokens]
    return useful, tokens, in_loss, micro_batches


@given(flags_of_ranks(), st.booleans())
@settings(deadline=None)
def test_every_row_with_a_gradient_is_trained_on_once_and_ranks_get_equally_many(case, movable):
    useful, tokens, in_loss, micro_batches = case
    plan = plan_rows(useful, tokens, in_loss, micro_batches, movable)
    counts = [int(flags.sum()) for flags in useful]
    before = len(useful[0]) // micro_batches
    least = max(1, -(-sum(counts) // len(counts)) if movable else max(counts))
    if plan is None:
        assert least >= len(useful[0])
        return
    chosen = [source for rows in plan.rows for source in rows]
    assert len(set(chosen)) == len(chosen)
    expected = {
        (rank, int(place)) for rank, flags in enumerate(useful) for place in np.flatnonzero(flags)
    }
    assert {(rank, place) for rank, place in chosen if useful[rank][place]} == expected
    assert {len(rows) for rows in plan.rows} == {sum(plan.sizes)} == {least}
    assert len(plan.sizes) == micro_batches
    # As few passes as these rows need, the last ones, and none with more rows than before.
    passes = -(-least // before)
    assert plan.sizes[: micro_batches - passes] == [0] * (micro_batches - passes)
    assert max(plan.sizes[-passes:]) - min(plan.sizes[-passes:]) <= 1
    assert 1 <= min(plan.sizes[-passes:]) <= max(plan.sizes) <= before
    for rank, rows in enumerate(plan.rows):
        lengths = [tokens[source][place] for source, place in rows]
        assert lengths == sorted(lengths, reverse=True)
        # What moves has a gradient, and what is filled up with is a rank's own.
        assert all(source == rank or useful[source][place] for source, place in rows)
        assert movable or all(source == rank for source, _ in rows)
        # One that the loss sees nothing of is taken where there is no other.
        idle = set(np.flatnonzero(~useful[rank])) - {
            place for source, place in rows if source == rank
        }
        taken = [place for source, place in rows if not useful[source][place]]
        if any(in_loss[rank][place] == 0 for place in taken):
            assert all(in_loss[rank][place] == 0 for place in idle)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gemma3", "gpt2", "opt", "biogpt"])
def test_only_models_that_see_distances_alone_ignore_padding(tmp_path, family):
    """Measured: the same row, once with five columns of padding before it."""
    dropout = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "opt": ("dropout",)}.get(
        family, ()
    )
    policy = cases.model(family, **dict.fromkeys(dropout, 0.0)).double().eval()
    trainer = cases.trainer(tmp_path, policy)
    ids = torch.tensor([[5, 9, 4, 8, 7, 6]])
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(11) >= 5).long().unsqueeze(0)
    with torch.no_grad():
        plain = policy(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        moved = policy(input_ids=padded, attention_mask=mask).logits[:, 5:]
    same = torch.allclose(plain, moved, atol=1e-4)
    assert rollout_rows.ignores_padding(trainer) <= same
    assert rollout_rows.ignores_padding(trainer) == (
        family in ("qwen2", "qwen3", "llama", "gemma3")
    )


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        {"layer_types": ["full_attention", "chunked_attention"]},
        {"rope_parameters": None},
    ],
)
def test_models_that_may_see_padding_are_told(tmp_path, change):
    trainer = cases.trainer(tmp_path)
    assert rollout_rows.ignores_padding(trainer)
    for name, value in change.items():
        setattr(trainer.model.config, name, value)
    assert not rollout_rows.ignores_padding(trainer)


def test_virtual_tokens_stand_before_the_padding(tmp_path):
    from peft import PromptTuningConfig

    prompt_tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert not rollout_rows.ignores_padding(cases.trainer(tmp_path, peft_config=prompt_tuning))
    assert rollout_rows.ignores_padding(cases.trainer(tmp_path, peft_config=LORA))

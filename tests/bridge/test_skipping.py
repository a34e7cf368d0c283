"""Leaving out rows without a gradient changes no gradient: against TRL's own, of a trainer that nobody touched."""

import contextlib
import itertools

import cases
import pytest
import skipping_cases
import torch
from skipping_cases import ROUNDING, distances, trained
from trl import GRPOTrainer

from trl_learnalign.bridge import skipping
from trl_learnalign.bridge.objective import DENOMINATORS
from trl_learnalign.bridge.skipping import TrainedCounts, ZeroAdvantageFilter

LOSSES = list(DENOMINATORS)
SCALES = ("group", "batch", "none")
GEOMETRIES = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "iterated": {"num_iterations": 2},
    "accumulated, iterated": {"gradient_accumulation_steps": 2, "num_iterations": 2},
    "several steps": {"steps_per_generation": 3},
    "several steps, accumulated": {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
    "several steps, iterated": {"steps_per_generation": 2, "num_iterations": 2},
    "all": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2},
    # An optimizer step goes over two generations, or over a part of one in the first pass and another in the second.
    "several generations": {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
    "unaligned": {"gradient_accumulation_steps": 2, "steps_per_generation": 3, "num_iterations": 2},
}
ALL = list(itertools.product(LOSSES, SCALES, GEOMETRIES))
# Every loss, scale and geometry at least once; the rest is slow.
GATED = [(LOSSES[i % 8], SCALES[i % 3], geometry) for i, geometry in enumerate(GEOMETRIES)]
PRODUCT = [case if case in GATED else pytest.param(*case, marks=pytest.mark.slow) for case in ALL]


def both(tmp_path, **options):
    """Steps of the same run without and with skipping, after checking that rows were left out."""
    _, stock, _ = trained(tmp_path / "stock", False, **options)
    trainer, ours, skipper = trained(tmp_path / "ours", True, **options)
    assert sum(ours.rows) < sum(stock.rows)
    assert skipper.counts.rows_given == sum(stock.rows)
    assert skipper.counts.rows_trained == sum(ours.rows)
    return stock, ours, trainer


@pytest.mark.parametrize(("loss_type", "scale_rewards", "geometry"), PRODUCT)
def test_gradients_are_those_of_all_rows(tmp_path, loss_type, scale_rewards, geometry):
    settings = {"loss_type": loss_type, "scale_rewards": scale_rewards, **GEOMETRIES[geometry]}
    stock, ours, _ = both(tmp_path, **settings)
    assert max(distances(stock.gradients, ours.gradients)) < ROUNDING


VARIANTS = {
    "sequence": dict(importance_sampling_level="sequence", loss_type="grpo"),
    "sequence, luspo": dict(importance_sampling_level="sequence", loss_type="luspo"),
    "truncated are masked": dict(
        mask_truncated_completions=True, loss_type="bnpo", max_completion_length=12
    ),
    "two-sided": dict(delta=1.1, epsilon=0.01, loss_type="dr_grpo"),
    "off-policy mask": dict(off_policy_mask_threshold=1e-4, loss_type="bnpo"),
    "graded": dict(rewards=skipping_cases.graded_reward, loss_type="sapo"),
    "two rewards": dict(
        rewards=[skipping_cases.half_idle_reward, skipping_cases.graded_reward],
        reward_weights=[1, 0.3],
    ),
    "normalised one by one": dict(
        rewards=[skipping_cases.half_idle_reward, skipping_cases.graded_reward],
        multi_objective_aggregation="normalize_then_sum",
        loss_type="bnpo",
    ),
    "absolute positions": dict(
        family="gpt2", dropout=("resid_pdrop", "embd_pdrop", "attn_pdrop"), loss_type="bnpo"
    ),
    "learned positions": dict(family="opt", dropout=("dropout",), loss_type="grpo"),
    "sliding windows, soft-capped": dict(family="gemma3", loss_type="bnpo"),
    "widths": dict(pad_to_multiple_of=8, loss_type="grpo"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_all_rows_whatever_the_loss_sees(tmp_path, variant):
    stock, ours, _ = both(tmp_path, **{**GEOMETRIES["all"], **VARIANTS[variant]})
    assert max(distances(stock.gradients, ours.gradients)) < ROUNDING


class WithRatios(GRPOTrainer):
    """Rollouts as of a vLLM engine whose probabilities are not quite the trainer's."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        noise = 0.3 * torch.randn(
            batch["completion_mask"].shape, generator=torch.Generator().manual_seed(self._step)
        )
        noise = noise.to(batch["completion_mask"].device) * batch["completion_mask"]
        by_token = self.vllm_importance_sampling_mode.startswith("token")
        ratio = noise.exp() if by_token else noise.sum(dim=1, keepdim=True).exp()
        batch["importance_sampling_ratio"] = ratio
        batch["sampling_per_token_logps"] = batch["old_per_token_logps"] - noise
        return batch

    @contextlib.contextmanager
    def as_with_vllm(self):
        self.use_vllm = True
        try:
            yield
        finally:
            self.use_vllm = False


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", ["vespo", "bnpo"])
def test_gradients_are_those_of_all_rows_with_ratios_of_vllm(
    tmp_path, monkeypatch, mode, loss_type
):
    monkeypatch.setattr(cases, "GRPOTrainer", WithRatios)
    compute_loss, install = GRPOTrainer._compute_loss, ZeroAdvantageFilter.__init__

    def loss_with_vllm(trainer, *arguments):
        with trainer.as_with_vllm():
            return compute_loss(trainer, *arguments)

    def install_with_vllm(skipper, trainer):
        with trainer.as_with_vllm():
            install(skipper, trainer)

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", loss_with_vllm)
    monkeypatch.setattr(ZeroAdvantageFilter, "__init__", install_with_vllm)
    settings = dict(
        loss_type=loss_type, vllm_importance_sampling_mode=mode, off_policy_mask_threshold=0.05
    )
    stock, ours, _ = both(tmp_path, **{**GEOMETRIES["all"], **settings})
    assert max(distances(stock.gradients, ours.gradients)) < ROUNDING


def test_gradients_are_those_of_all_rows_where_the_epoch_ends_in_the_middle_of_an_optimizer_step(
    tmp_path,
):
    """Three micro-batches an epoch, two in an optimizer step: every other step has but one."""
    settings = dict(
        data=cases.dataset(6),
        gradient_accumulation_steps=2,
        steps_per_generation=3,
        loss_type="bnpo",
    )
    stock, ours, _ = both(tmp_path, max_steps=6, **settings)
    assert max(distances(stock.gradients, ours.gradients)) < ROUNDING


@pytest.mark.parametrize(
    "loss_type", [loss for loss, denominator in DENOMINATORS.items() if denominator != "generation"]
)
def test_a_wrong_denominator_would_be_seen(tmp_path, monkeypatch, loss_type):
    monkeypatch.setattr(skipping, "denominator", lambda *_: 1.0)
    stock, ours, _ = both(tmp_path, loss_type=loss_type, gradient_accumulation_steps=2)
    assert max(distances(stock.gradients, ours.gradients)) > 1e3 * ROUNDING


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_rows_of_another_optimizer_step_would_be_seen(tmp_path, monkeypatch, loss_type):
    monkeypatch.setattr(ZeroAdvantageFilter, "_window", lambda skipper, number: (0, 2))
    stock, ours, _ = both(tmp_path, loss_type=loss_type, steps_per_generation=2)
    assert max(distances(stock.gradients, ours.gradients)) > 1e3 * ROUNDING


@pytest.mark.parametrize("workers", [0, 2])
def test_whole_trainings_end_at_the_same_weights(tmp_path, workers):
    """With AdamW, clipping and warm-up: every step's rounding goes into the next one's rollouts, and nothing shows."""
    settings = {
        **GEOMETRIES["all"],
        "max_steps": 12,
        "max_grad_norm": 0.1,
        "warmup_steps": 3,
        "loss_type": "bnpo",
        "dataloader_num_workers": workers,
    }
    stock, _, _ = trained(tmp_path / "stock", False, **settings)
    ours, _, _ = trained(tmp_path / "ours", True, **settings)
    before = torch.cat([p.flatten() for p in cases.model().double().parameters()])
    one, other = (torch.cat([p.flatten() for p in run.model.parameters()]) for run in (stock, ours))
    assert float(((one - other).norm() / (one - before).norm()).detach()) < 1e-4
    assert ours.state.num_input_tokens_seen == stock.state.num_input_tokens_seen


def test_micro_batches_are_as_wide_as_their_longest_row(tmp_path):
    _, stock, _ = trained(tmp_path / "stock", False, **GEOMETRIES["several steps, accumulated"])
    _, ours, _ = trained(tmp_path / "ours", True, **GEOMETRIES["several steps, accumulated"])
    assert sum(rows * width for rows, width in ours.shapes) < sum(ours.rows) * stock.shapes[0][1]


def test_where_every_row_has_a_gradient_training_is_the_same_to_the_last_bit(tmp_path):
    settings = {**GEOMETRIES["all"], "rewards": every_other_rollout, "loss_type": "bnpo"}
    _, stock, _ = trained(tmp_path / "stock", False, **settings)
    _, ours, skipper = trained(tmp_path / "ours", True, **settings)
    assert ours.rows == stock.rows
    assert all(torch.equal(a, b) for a, b in zip(stock.gradients, ours.gradients, strict=True))
    assert skipper.counts.tokens_trained == skipper.counts.tokens_given


def every_other_rollout(completions, **_):
    return [float(i % 2) for i in range(len(completions))]


def test_where_no_row_has_a_gradient_nothing_moves(tmp_path):
    settings = {**GEOMETRIES["accumulated"], "rewards": nothing_to_be_had, "learning_rate": 0.1}
    _, steps, skipper = trained(tmp_path, True, **settings)
    assert steps.rows == [1, 1, 1, 1]  # one row for each step, which has to be taken
    assert all(not gradient.any() for gradient in steps.gradients)
    assert skipper.counts.rows_given == 64


def nothing_to_be_had(completions, **_):
    return [0.0] * len(completions)


def fractional_reward(completions, prompts, **_):
    return [0.1 + 0.9 * reward for reward in skipping_cases.half_idle_reward(completions, prompts)]


@pytest.mark.parametrize("scale_rewards", SCALES)
def test_rewards_that_are_equal_give_no_gradient_whatever_their_mean_is_rounded_to(
    tmp_path, scale_rewards
):
    """In float32 the mean of eight times 0.1 is not 0.1: TRL trains on the difference, divided by 1e-4."""
    settings = dict(
        rewards=fractional_reward, num_generations=8, scale_rewards=scale_rewards, loss_type="bnpo"
    )
    options = {**GEOMETRIES["accumulated"], **settings}
    stock, ours, trainer = both(tmp_path, **options)
    assert max(distances(stock.gradients, ours.gradients)) < 1e-3
    if scale_rewards != "batch":  # where TRL judges groups by themselves
        idle_share = trainer.state.log_history[-1]["frac_reward_zero_std"]
        assert sum(ours.rows) == sum(stock.rows) * (1 - idle_share)
    # And the gradient is that of rewards whose mean is not rounded: 0 and 1, 0.9 of the distance.
    if scale_rewards == "none":
        whole = skipping_cases.half_idle_reward
        _, exact, _ = trained(tmp_path / "exact", False, **{**options, "rewards": whole})
        assert (
            float((0.9 * exact.gradients[0] - ours.gradients[0]).norm() / ours.gradients[0].norm())
            < ROUNDING
        )
    idle = [value for value in trainer._logs["advantages"] if abs(value) < 1e-3]
    assert idle
    assert not any(idle)


def test_the_log_says_what_was_skipped(tmp_path):
    trainer, _, skipper = trained(tmp_path, True, logging_steps=1, gradient_accumulation_steps=2)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    for entry in logged:
        assert 0 <= entry["learnalign/tokens_skipped"] < 1
    counts = skipper.counts
    mean = sum(entry["learnalign/tokens_skipped"] for entry in logged) / 4
    assert mean == pytest.approx(1 - counts.tokens_trained / counts.tokens_given, abs=0.05)
    assert counts.tokens_given == trainer.state.num_input_tokens_seen
    assert 0 < counts.tokens_trained < counts.tokens_given


def test_counts_go_on_from_their_state(tmp_path):
    _, _, skipper = trained(tmp_path / "first", True)
    _, _, other = trained(tmp_path / "second", True)
    before = other.counts
    other.load_state_dict(skipper.state_dict())
    assert other.counts == skipper.counts == TrainedCounts(**skipper.state_dict())
    assert before + before == TrainedCounts(*(2 * value for value in before.__dict__.values()))

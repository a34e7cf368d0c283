"""What the trainer's log says of a run that skips, beside that of a stock trainer."""

import pytest
from skipping_cases import half_idle_reward, trained


def nothing_to_be_had(completions, **_):
    return [0.0] * len(completions)


def logs(folder, skip, **options):
    trainer, _, skipper = trained(folder, skip, logging_steps=1, **options)
    return [entry for entry in trainer.state.log_history if "loss" in entry], skipper


CUT = dict(mask_truncated_completions=True, max_completion_length=12)


@pytest.mark.parametrize("rewards", [nothing_to_be_had, half_idle_reward])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_rows_that_are_masked_do_not_stand_for_the_others(tmp_path, rewards, loss_type):
    options = dict(CUT, rewards=rewards, loss_type=loss_type, max_steps=6)
    stock, _ = logs(tmp_path / "stock", False, **options)
    ours, skipper = logs(tmp_path / "ours", True, **options)
    assert skipper.counts.rows_trained < skipper.counts.rows_given
    seen = 0
    for theirs, entry in zip(stock, ours, strict=True):
        if theirs["entropy"] == 0:  # no completion has ended
            continue
        seen += 1
        assert entry["entropy"] == pytest.approx(theirs["entropy"], rel=0.1)
        for name in theirs:
            if name.startswith("clip_ratio/"):
                assert entry[name] == theirs[name] == 0
    assert seen > 3


def test_where_no_token_is_in_the_loss_nothing_is_said_of_it(tmp_path):
    """Stock says an entropy of 0.0; a mean with it in it is that of no policy."""
    options = dict(CUT, max_completion_length=1, rewards=nothing_to_be_had, seed=3)
    ours, _ = logs(tmp_path, True, **options)
    masked = [entry for entry in ours if entry["completions/clipped_ratio"] == 1]
    assert masked
    for entry in masked:
        assert not [name for name in entry if name.startswith(("entropy", "clip_ratio"))]


def test_a_row_that_is_kept_since_a_step_needs_one_is_counted_apart(tmp_path):
    _, _, skipper = trained(tmp_path / "idle", True, rewards=nothing_to_be_had, max_steps=4)
    counts = skipper.counts
    assert counts.rows_trained == 4
    assert counts.tokens_idle == counts.tokens_trained > 0
    _, _, skipper = trained(tmp_path / "half", True, rewards=half_idle_reward, max_steps=4)
    assert skipper.counts.tokens_idle < skipper.counts.tokens_trained

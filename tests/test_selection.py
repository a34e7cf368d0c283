import itertools
import json

import cases
import numpy as np
import oracles
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, Pool, plan, plan_run, scoring
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.data.prompts import dataset_digest
from trl_learnalign.measuring.base import Context, MeasureJob, Validation
from trl_learnalign.measuring.measure_pool import measure_pool
from trl_learnalign.ranking import Ranking, reliability
from trl_learnalign.records.store import ShardStore
from trl_learnalign.selectors import SELECTORS, Selector, combined, find_selector


def config(**options):
    return LearnAlignConfig(
        **{"warmup_samples": 0, "stages": [4], "feature_dim": 64, "shard_size": 4, **options}
    )


def validation(size=5):
    """Prompts that are not those of training."""
    rows = cases.dataset(size + 20).select(range(20, size + 20))
    return rows.map(lambda row: {"prompt": "z" + row["prompt"]})


# ---- Taking the best ------------------------------------------------------------------------------------------------


def ranking(scores, successes=None, name="token_length", size=12, prompts=None):
    """Scores of the first rows of a dataset of 12; ties by row, the last row first."""
    prompts = np.arange(len(scores)) if prompts is None else prompts
    pool = Pool(prompts, cases.dataset(size), 0, "stage_1", successes=successes)
    return Ranking(
        SELECTORS[name], pool, np.asarray(scores, dtype=float), np.arange(size)[::-1].copy()
    )


def test_the_best_are_taken_best_first():
    found = ranking([0.1, 0.9, np.nan, 0.5, 0.9])
    choice = found.take(4, np.arange(5), "fill", 2)
    assert choice.rows.tolist() == [4, 1, 3, 0]
    assert len(choice.unscored) == 0
    assert found.take(5, np.arange(5), "fill", 2).rows.tolist() == [4, 1, 3, 0, 2]
    assert found.take(5, np.arange(5), "shrink", 2).rows.tolist() == [4, 1, 3, 0]


def test_larger_choices_contain_the_smaller_ones():
    generator = np.random.default_rng(0)
    for sample in (12, 5):
        scores = generator.choice([0.0, 1.0, -1.0, np.nan], sample)
        found = ranking(scores, prompts=np.sort(generator.permutation(12)[:sample]))
        rows = [found.take(size, np.arange(12), "fill", 1).rows.tolist() for size in range(1, 13)]
        for smaller, larger in itertools.pairwise(rows):
            assert larger[: len(smaller)] == smaller
        assert sorted(rows[-1]) == list(range(12))


def test_even_a_shrunk_choice_has_the_least_that_trains():
    wrong = torch.zeros(5, 4, dtype=torch.float64)
    found = ranking(np.zeros(5), wrong, "learnalign")
    assert found.eligible.sum() == 0
    assert found.take(4, np.arange(12), "shrink", 3).rows.tolist() == [4, 3, 2]
    assert found.take(7, np.arange(12), "shrink", 6).rows.tolist() == [4, 3, 2, 1, 0, 11]


LEARNABLE = torch.tensor(
    [[1.0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [float("nan")] * 4, [1, 1, 0, 0]]
)


def scored_by(rule, scores=(0.0, -0.2, 0.0, 0.3, 0.0, -0.1)):
    pool = Pool(np.arange(6), cases.dataset(6), 0, "stage_1", successes=LEARNABLE.double())
    pool.config = config(zero_learnability=rule)
    return Ranking(SELECTORS["learnalign"], pool, np.array(scores), np.arange(6))


def test_prompts_without_a_signal_come_after_every_learnable_one():
    found = scored_by("last")
    assert found.order.tolist() == [3, 5, 1, 0, 2, 4]
    for on_shortfall in ("fill", "shrink"):
        choice = found.take(3, np.arange(6), on_shortfall, 1)
        assert choice.rows.tolist() == [3, 5, 1]
        assert found.shortfall(choice, 3) is None
        assert (
            found.summary(choice).unlearnable_selected
            == found.summary(choice).learnable_left_out
            == 0
        )
    choice = found.take(5, np.arange(6), "fill", 1)
    assert choice.rows.tolist() == [3, 5, 1, 0, 2]
    said = "only 3 of 6 candidates are learnable, fewer than the requested 5; selected: 5, 2 with learnability 0"
    assert found.shortfall(choice, 5) == said
    ranks = found.table(choice)["rank"].to_pylist()
    assert ranks == [4, 3, 5, 1, 6, 2]


def test_the_letter_of_equation_9_is_an_option_and_is_said():
    found = scored_by("by_score")
    assert found.order.tolist() == [3, 0, 2, 4, 5, 1]
    choice = found.take(3, np.arange(6), "fill", 1)
    assert choice.rows.tolist() == [3, 0, 2]
    assert found.summary(choice).unlearnable_selected == 2
    assert found.summary(choice).learnable_left_out == 2
    passed_over = (
        "2 learnable prompts with negative scores rank below them (Eq. 9) and are left out"
    )
    assert found.shortfall(choice, 3).startswith(
        f"2 selected prompts have learnability 0 (p = 0 or 1); {passed_over}"
    )
    said = found.shortfall(found.take(4, np.arange(6), "fill", 1), 4)
    assert said.startswith(
        "only 3 of 6 candidates are learnable, fewer than the requested 4; selected: 4, 3 with"
    )
    assert passed_over in said
    # Selectors that rank all prompts by what they are do as before.
    both = [ranking([0.0, -1.0, 0.5], name="random").order.tolist() for _ in range(2)]
    assert both == [[2, 0, 1]] * 2


def test_halves_are_ranked_by_the_same_rule():
    successes = torch.tensor([[1.0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]]).double()
    for rule, shared in (("last", 1.0), ("by_score", 0.0)):
        pool = Pool(
            np.arange(4),
            cases.dataset(4),
            0,
            "stage_1",
            successes=successes,
            config=config(zero_learnability=rule),
        )
        selector = Selector(
            "mine", lambda of: -of.learnability, frozenset({"rollouts"}), only_learnable=True
        )
        found = Ranking(selector, pool, -pool.learnability, np.arange(4))
        best = {int(i) for i in found.order[:2]}
        assert len(best & {1, 3}) / 2 == shared
        assert reliability(found, 2).overlap_halves == 1.0
        with pytest.MonkeyPatch.context() as patch:
            # Halves that disagree about everything but who is learnable at all.
            signs = iter([1.0, -1.0])
            patch.setattr(
                Selector,
                "score",
                lambda self, of, signs=signs: -next(signs) * np.arange(4) * (of.learnability > 0),
            )
            assert reliability(found, 2).overlap_halves == (1.0 if rule == "last" else 0.0)


def test_the_alignment_column_is_the_alignment_of_gradients_or_missing():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 16, generator=generator)
    target = torch.randn(16, generator=generator)
    learnable = [1, 3, 5]
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    columns = {}
    for name in (
        "learnalign",
        "alignment",
        "validation_alignment",
        "gradient_dot",
        "learnability",
        "random",
    ):
        pool = Pool(
            np.arange(6),
            cases.dataset(6),
            0,
            "stage_1",
            successes=LEARNABLE.double(),
            target=target.double(),
        )
        places = torch.tensor(learnable)
        pool.features, pool.feature_dim = [(places, features[places])], 16
        pool.finite = torch.tensor([True] * 5 + [name != "learnalign"])
        selector = SELECTORS[name]
        found = Ranking(selector, pool, selector.score(pool), np.arange(6))
        column = found.table(found.take(2, np.arange(6), "fill", 1))["alignment"]
        columns[name] = np.array(
            [np.nan if value is None else value for value in column.to_pylist()]
        )
    weights = torch.tensor(pool.learnability).nan_to_num()
    cosines = (unit @ unit[learnable].T).numpy()
    truth = {
        "learnalign": cosines @ weights[learnable].numpy() / 6,
        "alignment": cosines.sum(axis=1) / 6,
        "validation_alignment": (unit @ (target.double() / target.double().norm())).numpy(),
    }
    for name, values in columns.items():
        present = learnable[: 2 if name == "learnalign" else 3] if name in truth else []
        assert np.flatnonzero(~np.isnan(values)).tolist() == present, name
        if present:
            np.testing.assert_allclose(values[present], truth[name][present], atol=1e-6)


def test_needs_of_several_selectors_are_measured_once():
    both = combined([SELECTORS["learnalign"], SELECTORS["ifd"]])
    assert both.needs == {"gradients", "likelihoods"}
    assert both.only_learnable
    assert not combined([SELECTORS["learnalign"], SELECTORS["alignment"]]).only_learnable
    assert combined([SELECTORS["alignment"]]) is SELECTORS["alignment"]
    with pytest.raises(RuntimeError, match="call each of its selectors"):
        both.score(ranking([1.0]).pool)


# ---- A selector for each stage --------------------------------------------------------------------------------------


def test_each_stage_can_have_its_own_selector(tmp_path):
    trainer = cases.trainer(tmp_path)
    callback = LearnAlignCallback(
        trainer, config(stages=[4, 4], selector=["token_length", "learnability"])
    )
    trainer.add_callback(callback)
    trainer.train()
    first, second = (
        pd.read_parquet(tmp_path / "_learnalign" / f"stage_{i}.parquet") for i in (1, 2)
    )
    assert first["success_rate"].isna().all()
    assert (first["score"] == 1).all()  # tokens of a one-digit solution
    np.testing.assert_allclose(second["score"], second["learnability"])
    assert {path.name for path in (tmp_path / "_learnalign").rglob("manifest.json")} == {
        "manifest.json"
    }
    assert (tmp_path / "_learnalign" / "stage_1" / "lengths").exists()
    assert (tmp_path / "_learnalign" / "stage_2" / "rollouts").exists()


def test_one_name_serves_all_stages_and_lists_must_fit():
    assert LearnAlignConfig(selector=["random"]).selector == "random"
    assert LearnAlignConfig(selector="random").selectors == ["random"] * 3
    assert LearnAlignConfig(selector=["random", "ifd", "limr"]).selectors == [
        "random",
        "ifd",
        "limr",
    ]
    with pytest.raises(
        ValueError,
        match=r"selector=\['random', 'ifd'\] for 3 stage\(s\): give one name, or one per",
    ):
        LearnAlignConfig(selector=["random", "ifd"])
    for wrong in ([], None, [3], ""):
        with pytest.raises(
            ValueError, match=r"selector=.*: give a name, or a list with one name per stage"
        ):
            LearnAlignConfig(selector=wrong)


def test_what_a_later_stage_needs_is_asked_for_at_once(tmp_path):
    settings = config(stages=[4, 4], selector=["random", "limr"])
    with pytest.raises(
        ValueError, match="selector='limr' ranks prompts by the success rates of a previous run"
    ):
        plan_run(settings, cases.grpo_config(tmp_path), cases.dataset(), cases.accuracy_reward)
    with pytest.raises(
        ValueError, match="selector='limr' ranks prompts by the success rates of a previous run"
    ):
        LearnAlignCallback(cases.trainer(tmp_path), settings)


# ---- Validation set -------------------------------------------------------------------------------------------------


def measured(tmp_path, trainer, settings, trusted):
    context, validation = (
        Context.of(trainer, settings, scoring_batch_prompts=2),
        Validation(trusted, dataset_digest(trusted)),
    )
    work = MeasureJob(
        "stage_1", np.arange(12), tmp_path / "stage_1", {"dataset": "x"}, 4, quiet=True
    )
    selector = find_selector("validation_alignment")
    pool, report = measure_pool(context, selector, work, validation)
    return pool, selector.score(pool), report


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_target_is_the_mean_gradient_of_the_validation_set(tmp_path, beta):
    """With a KL term prompts without advantages have a gradient too."""
    from trl_learnalign.measuring.generation import roll_out

    cases.model().save_pretrained(
        tmp_path / "policy"
    )  # the reference model is loaded from where the policy was
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    trainer = cases.trainer(tmp_path, policy, beta=beta, scale_rewards="none")
    trusted, settings = validation(), config(projection="none")
    seen = []

    def keep(*arguments):
        seen.append(arguments)
        return roll_out(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_learnalign.measuring.rollouts.roll_out", keep)
        pool, scores, report = measured(tmp_path, trainer, settings, trusted)
    gradients = {}
    for trainer_, prompts, seed, rule, dataset in seen:
        if dataset is not trusted:
            continue
        with preserve_trainer_state(trainer):
            for group in roll_out(trainer_, prompts, seed, rule, dataset):
                # The last call of a shard repeats its first prompts.
                gradients.setdefault(group.prompt, oracles.full_gradient(trainer, group))
    assert sorted(gradients) == list(range(5))
    mean = torch.stack(list(gradients.values())).double().mean(dim=0)
    assert mean.norm() > 0
    np.testing.assert_allclose(
        pool.target, mean, rtol=1e-3, atol=1e-6 * float(mean.abs().max()) + 1e-8
    )
    features = torch.zeros(12, len(mean), dtype=torch.float64)
    for positions, part in pool.features:
        features[positions] = part.double()
    for i in range(12):
        norms = float(features[i].norm() * mean.norm())
        cosine = float(features[i] @ mean) / norms if norms else 0.0
        assert scores[i] == pytest.approx(pool.learnability[i] * cosine, abs=1e-5)
    assert np.abs(scores).max() > 0
    assert report.tokens_generated > pool.lengths.sum()


def test_the_mean_counts_prompts_without_a_gradient_and_not_the_chunks():
    features = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)) * 1e5
    features[4, 3] = torch.inf
    truth = torch.cat([features[:4], features[5:]]).double().sum(dim=0) / 12
    for sizes in ([9], [2, 7], [1] * 9):
        places = torch.arange(9).split(sizes)
        mean = scoring.mean_feature([(place, features[place]) for place in places], 12, 16)
        np.testing.assert_allclose(mean, truth, rtol=1e-9)
        assert torch.equal(mean, scoring.mean_feature([(torch.arange(9), features)], 12, 16))
    assert scoring.mean_feature([], 12, 16).tolist() == [0.0] * 16


def test_a_run_with_a_validation_set(tmp_path):
    trainer = cases.trainer(tmp_path)
    trusted = validation()
    settings = config(selector="validation_alignment", stages=[4, 4])
    callback = LearnAlignCallback(trainer, settings, validation_dataset=trusted)
    trainer.add_callback(callback)
    trainer.train()
    record = json.loads((tmp_path / "_learnalign" / "run.json").read_text())
    assert record["identity"]["validation_dataset"] == dataset_digest(trusted)
    for stage in ("stage_1", "stage_2"):
        store = ShardStore(tmp_path / "_learnalign" / stage / "validation" / "gradients_all", {}, 2)
        assert len(store.finished()) == 2  # five prompts in shards of four
    other = cases.trainer(tmp_path)
    other.add_callback(LearnAlignCallback(other, settings, validation_dataset=validation(4)))
    with pytest.raises(
        RuntimeError, match=r"validation_dataset was '[0-9a-f]{16}' and is '[0-9a-f]{16}'"
    ):
        other.train()


def test_measuring_the_validation_set_resumes(tmp_path, monkeypatch):
    trainer, write = cases.trainer(tmp_path), ShardStore.write
    _, whole, _ = measured(tmp_path / "whole", trainer, config(), validation())
    written = []

    def power_cut(self, number, tensors):
        written.append((self.folder.parent.name, number))
        if written[-1] == ("validation", 1):
            raise OSError("power cut")
        write(self, number, tensors)

    monkeypatch.setattr(ShardStore, "write", power_cut)
    with pytest.raises(OSError, match="power cut"):
        measured(tmp_path / "cut", trainer, config(), validation())
    monkeypatch.undo()
    written.clear()
    monkeypatch.setattr(
        ShardStore,
        "write",
        lambda self, *rest: (
            written.append((self.folder.parent.name, rest[0])),
            write(self, *rest),
        ),
    )
    _, resumed, _ = measured(tmp_path / "cut", trainer, config(), validation())
    assert written == [("validation", 1)]
    assert resumed.tolist() == whole.tolist()


def test_a_validation_set_without_gradients_is_said(tmp_path, caplog):
    trainer = cases.trainer(
        tmp_path,
        rewards=lambda completions, prompts, **_: [
            0.0 if prompt[0] == "z" else value
            for prompt, value in zip(prompts, cases.accuracy_reward(completions), strict=True)
        ],
    )
    _, scores, _ = measured(tmp_path, trainer, config(), validation())
    assert (scores == 0).all()
    assert "stage_1: no validation prompt has a gradient" in caplog.text


@pytest.mark.parametrize(
    ("trusted", "error", "message"),
    [
        ([{"prompt": "a?"}], TypeError, "validation_dataset is a list: give a `datasets.Dataset`"),
        (validation().select([]), ValueError, "validation_dataset is empty"),
        (
            validation().remove_columns("solution"),
            ValueError,
            r"validation_dataset lacks the columns \['solution'\]",
        ),
    ],
)
def test_a_validation_set_that_does_not_fit_is_an_error_at_once(tmp_path, trusted, error, message):
    settings = config(selector="validation_alignment")
    with pytest.raises(error, match=message):
        plan_run(
            settings, cases.grpo_config(tmp_path), cases.dataset(), cases.accuracy_reward, trusted
        )
    with pytest.raises(error, match=message):
        LearnAlignCallback(cases.trainer(tmp_path), settings, validation_dataset=trusted)


def test_validation_rankings_do_not_depend_on_batches(tmp_path):
    trainer, found = cases.trainer(tmp_path), []
    for tokens in (40, 4000):
        settings = config(capture_max_tokens=tokens)
        found.append(measured(tmp_path / str(tokens), trainer, settings, validation())[1])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-8)
    ties = plan.tie_order(0, "stage_1", 12)
    assert scoring.rank(found[1], ties).tolist() == scoring.rank(found[0], ties).tolist()

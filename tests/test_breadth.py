"""How broad a choice is: against the formulas on explicit matrices, on any number of ranks, and where it is told."""

import logging
from dataclasses import replace

import cases
import numpy as np
import pytest
import torch
from threaded_ranks import on_ranks

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, Pool, scoring
from trl_learnalign import diversity as module
from trl_learnalign.diversity import breadth
from trl_learnalign.records.layout import from_json, to_json
from trl_learnalign.records.notes import GradientDiversity, SelectionNote
from trl_learnalign.selectors import SELECTORS

DIM = 32


def pool_of(groups=(30, 6, 6, 6, 6, 6), seed=0, noise=0.3, **measured):
    """Groups of like prompts; the first two prompts teach nothing."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(DIM, len(groups), generator=generator, dtype=torch.float64)
    centres = torch.linalg.qr(square)[0].T
    group = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    size = len(group)
    spread = torch.randn(size, DIM, generator=generator, dtype=torch.float64) * noise / DIM**0.5
    features = centres[group] + spread
    right = torch.randint(2, 7, (size, 1), generator=generator)
    successes = (torch.arange(8) < right).double()
    successes[0], successes[1] = 0.0, 1.0
    return Pool(
        np.arange(size),
        cases.dataset(size),
        0,
        "stage_1",
        successes=successes,
        config=LearnAlignConfig(),
        **{"features": cut(features), "feature_dim": DIM, **measured},
    )


def cut(features, size=7):
    return [(part, features[part]) for part in torch.arange(len(features)).split(size)]


def explicit(pool):
    features = torch.cat([chunk for _, chunk in pool.features or pool.hidden])
    unit = scoring.normalised(features).numpy()
    return unit @ unit.T


def covered(pool, chosen):
    """On the explicit matrix, over those who have something to teach."""
    weights = pool.learnability
    signal = np.maximum(explicit(pool) * np.outer(weights, weights), 0)[:, weights > 0]
    return signal[chosen].max(axis=0).sum() / signal.max(axis=0).sum()


def participation(pool, chosen):
    spectrum = np.linalg.eigvalsh(explicit(pool)[np.ix_(chosen, chosen)])
    return spectrum.sum() ** 2 / (spectrum**2).sum()


def nearest(pool, chosen):
    cosines = explicit(pool)[np.ix_(chosen, chosen)]
    np.fill_diagonal(cosines, -1)
    return cosines.max(axis=1).mean()


def test_figures_are_those_of_the_explicit_matrix():
    pool = pool_of()
    chosen = np.array([40, 3, 33, 4, 50, 5])
    found = breadth(pool, chosen)
    assert found.prompts == 6
    assert found.directions == pytest.approx(participation(pool, chosen), rel=1e-5)
    assert found.covered == pytest.approx(covered(pool, chosen), rel=1e-5)
    assert found.similarity == pytest.approx(nearest(pool, chosen), rel=1e-5)


def test_the_random_choice_is_one_of_its_size():
    """Over seeds, its figures are those of random choices: within what they vary."""
    pool = pool_of()
    chosen = np.arange(2, 14)
    generator = np.random.default_rng(0)
    with_signal = np.arange(2, len(pool))
    draws = [generator.choice(with_signal, 12, replace=False) for _ in range(200)]
    truth = {
        "directions_random": [participation(pool, draw) for draw in draws],
        "covered_random": [covered(pool, draw) for draw in draws],
        "similarity_random": [nearest(pool, draw) for draw in draws],
    }
    found = [breadth(replace(pool, seed=seed), chosen) for seed in range(40)]
    for name, values in truth.items():
        ours = [getattr(each, name) for each in found]
        error = np.std(values) * (1 / 40 + 1 / 200) ** 0.5
        assert abs(np.mean(ours) - np.mean(values)) < 4 * error, name
        assert len(set(ours)) > 20  # another seed, another choice


def test_extremes():
    same = pool_of(groups=(20,), noise=0)
    found = breadth(same, np.arange(2, 10))
    assert found.directions == pytest.approx(1, rel=1e-5)
    assert found.similarity == pytest.approx(1, rel=1e-5)
    apart = pool_of(groups=(1,) * 12, noise=0)
    found = breadth(apart, np.arange(2, 8))
    assert found.directions == pytest.approx(6, rel=1e-5)
    assert found.similarity == pytest.approx(0, abs=1e-6)
    assert breadth(apart, np.arange(12)).covered == 1


def test_prompts_without_a_signal_do_not_count():
    pool = pool_of()
    chosen = np.arange(2, 10)
    assert breadth(pool, np.arange(10)) == breadth(pool, chosen)
    assert breadth(pool, np.array([0, 1, 2])) is None


def test_a_pool_without_features_has_no_breadth():
    assert breadth(pool_of(features=(), feature_dim=0), np.arange(10)) is None


def test_hidden_states_stand_in_for_gradients():
    pool = pool_of()
    hidden = replace(pool, features=(), feature_dim=0, hidden=pool.features, hidden_dim=DIM)
    assert breadth(hidden, np.arange(9)) == breadth(pool, np.arange(9))
    unknown = replace(hidden, successes=None)
    assert breadth(unknown, np.arange(9)).prompts == 9


def test_samples_in_the_place_of_large_pools(monkeypatch):
    monkeypatch.setattr(module, "STOOD_FOR", 60)
    monkeypatch.setattr(module, "COMPARED", 40)
    pool = pool_of(groups=(150, 30, 30, 30, 30, 30), noise=0.6)
    chosen = np.arange(100, 200)
    found = breadth(pool, chosen)
    assert found.prompts == 100
    assert found.covered == pytest.approx(covered(pool, chosen), abs=0.1)
    assert found.directions < participation(pool, chosen)
    assert found.directions == pytest.approx(participation(pool, chosen), rel=0.3)


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_ranks_finds_the_same(count):
    """Chunks are dealt to ranks in turn, as shards are; the selectors' scores and the breadth are equal to the bit."""
    pool = pool_of(seed=1)
    names = ("learnalign_coverage", "learnalign_logdet")
    chosen = np.arange(2, 20)

    def work(ranks):
        mine = pool.features[ranks.index :: ranks.count]
        part = replace(pool, features=mine, ranks=ranks, wanted=15)
        scores = [SELECTORS[name].score(part).tolist() for name in names]
        return scores, breadth(part, chosen)

    (alone,) = on_ranks(1, work)
    assert on_ranks(count, work) == [alone] * count


def test_a_far_narrower_choice_is_warned_of():
    pool = pool_of()
    narrow, broad = breadth(pool, np.arange(2, 14)), breadth(pool, np.arange(18, 42, 2))
    assert narrow.directions < 0.5 * narrow.directions_random
    assert narrow.narrowness.startswith(
        "the gradients of the 12 selected prompts have about 1.2 effective directions"
    )
    assert (
        "learnalign_coverage and learnalign_logdet select more diverse prompts" in narrow.narrowness
    )
    assert broad.narrowness is None


def test_it_is_written_and_read_back():
    entry = breadth(pool_of(), np.arange(2, 14))
    note = SelectionNote(step=0, scored=True, breadth=entry)
    assert from_json(SelectionNote, to_json(note), "note") == note
    assert isinstance(from_json(SelectionNote, to_json(note), "note").breadth, GradientDiversity)


def test_a_run_notes_logs_and_warns(tmp_path, caplog, monkeypatch):
    """A stage's note, its metrics and its line in the log; and a warning, here for any choice."""
    monkeypatch.setattr("trl_learnalign.records.notes.NARROW_DIRECTIONS", 100)
    trainer = cases.trainer(tmp_path)
    settings = LearnAlignConfig(
        warmup_samples=0,
        stages=[6, 4],
        feature_dim=64,
        selector=["learnalign_coverage", "learnalign_logdet"],
    )
    callback = LearnAlignCallback(trainer, settings)
    trainer.add_callback(callback)
    with caplog.at_level(logging.INFO):
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "learnalign/stage" in entry]
    assert len(logged) == 2
    for number, entry in enumerate(logged, start=1):
        note = callback.record.get(f"stage_{number}", SelectionNote)
        noted = note.breadth
        assert entry["learnalign/effective_directions"] == noted.directions
        assert entry["learnalign/effective_directions_random"] == noted.directions_random
        assert entry["learnalign/signal_covered"] == noted.covered
        assert entry["learnalign/nearest_similarity_random"] == noted.similarity_random
        assert 1 <= noted.directions <= noted.prompts
        assert f"stage_{number}: {noted.narrowness}." in caplog.text

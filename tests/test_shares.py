"""Categories of a choice: against independent counts, and warned of only where a random choice is broader."""

from dataclasses import replace

import cases
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from threaded_ranks import on_ranks

from trl_learnalign import LearnAlignConfig, Pool
from trl_learnalign.data.columns import Grouping, check_category_columns, column_groupings
from trl_learnalign.diversity import cluster_grouping, effective_number, feature_grouping, shares_of
from trl_learnalign.records.layout import from_json, to_json
from trl_learnalign.records.notes import SelectionNote

FAMILIES = [f"family {number:02}" for number in range(12)]


def grouping(families, by="family"):
    codes, labels = pd.factorize(np.array(families, dtype=object), sort=True)
    return Grouping(by, tuple(labels), codes.astype(np.int64))


def equal_families(size=480):
    return [FAMILIES[row % 12] for row in range(size)]


def of(families, chosen, seed=0):
    (found,) = shares_of([grouping(families)], np.arange(len(families)), chosen, seed, "stage_1")
    return found


def test_counts_are_those_of_pandas():
    generator = np.random.default_rng(0)
    families = generator.choice(FAMILIES, 300, p=np.arange(1, 13) / 78).tolist()
    chosen = generator.choice(300, 60, replace=False)
    found = of(families, chosen)
    table = pd.Series(families)
    assert {
        category.name: category.pool for category in found.categories
    } == table.value_counts().to_dict()
    in_choice = {category.name: category.chosen for category in found.categories if category.chosen}
    assert in_choice == table[chosen].value_counts().to_dict()
    shares = table[chosen].value_counts(normalize=True)
    assert found.effective == pytest.approx(float(np.prod(shares**-shares)))
    shares = table.value_counts(normalize=True)
    assert found.effective_pool == pytest.approx(float(np.prod(shares**-shares)))
    assert (found.pool, found.chosen, found.distinct) == (300, 60, 12)


def test_the_effective_number_of_equal_categories_is_their_number():
    assert effective_number(np.array([5, 5, 0, 5])) == pytest.approx(3)
    assert effective_number(np.array([0, 7])) == pytest.approx(1)


def test_random_choices_have_as_many_prompts_and_are_seeded():
    families = equal_families()
    found = of(families, np.arange(24))
    again = of(families, np.arange(24))
    other = of(families, np.arange(24), seed=1)
    assert found == again
    assert other.effective_random != found.effective_random
    # Independent draws of as many: the mean of a hundred lies within its own deviation of theirs.
    generator = np.random.default_rng(1)
    draws = [of(families, generator.choice(480, 24, replace=False)).effective for _ in range(60)]
    assert found.effective_random == pytest.approx(np.mean(draws), abs=0.5)
    assert found.effective_random_low < found.effective_random


def test_a_choice_of_two_families_is_warned_of():
    families = equal_families()
    rows = np.arange(480)
    two = rows[rows % 12 < 2][:38]
    chosen = np.concatenate([two, rows[rows % 12 >= 2][:12]])
    found = of(families, chosen)
    assert found.narrowness.startswith(
        "by family, the selection covers an effective 5.0 of 12 categories, a random"
    )
    assert "'family 00', has 38% of the selection and 8% of the pool" in found.narrowness


def test_all_from_one_of_two_categories_is_warned_of():
    families = ["easy" if row % 2 else "hard" for row in range(40)]
    assert of(families, np.arange(0, 40, 2)).is_narrow


@pytest.mark.parametrize("weights", [[1] * 12, [97, 3], [60, 40], [80] + [2] * 10])
@pytest.mark.parametrize("size", [6, 20, 100])
def test_random_choices_are_not_warned_of(weights, size):
    shares = np.array(weights) / sum(weights)
    generator = np.random.default_rng(size)
    families = generator.choice(FAMILIES[: len(weights)], 400, p=shares).tolist()
    warned = 0
    for seed in range(40):
        chosen = generator.choice(400, size, replace=False)
        warned += of(families, chosen, seed).is_narrow
    assert warned <= 1


def test_training_that_comes_back_is_held_against_passes_over_the_pool():
    families = equal_families(24)
    twice = np.concatenate([np.arange(24), np.arange(24)])
    found = of(families, twice)
    assert found.chosen == 48
    assert found.effective == pytest.approx(found.effective_random)
    assert found.effective == pytest.approx(found.effective_random_low)
    half = np.concatenate([np.arange(24), np.zeros(12, dtype=np.int64)])
    assert of(families, half).effective < of(families, half).effective_random_low


def dataset_of_categories():
    size = 60
    features = Features(
        {
            "prompt": Value("string"),
            "answer": Value("string"),
            "family": Value("string"),
            "level": ClassLabel(names=["easy", "hard"]),
            "year": Value("int64"),
            "is_new": Value("bool"),
            "number": Value("int64"),
            "constant": Value("string"),
            "weight": Value("float64"),
            "tags": [Value("string")],
        }
    )
    columns = {
        "prompt": [f"p{row}" for row in range(size)],
        "answer": ["a", "b"] * 30,
        "family": [None, "x", "y"] * 20,
        "level": [0, 1, -1] * 20,
        "year": [2020, 2021] * 30,
        "is_new": [True] * 20 + [False] * 40,
        "number": list(range(size)),
        "constant": ["same"] * size,
        "weight": [0.5, 1.0] * 30,
        "tags": [["a"], ["b"]] * 30,
    }
    return Dataset.from_dict(columns, features)


def test_columns_that_look_like_categories_are_found():
    dataset = dataset_of_categories()
    found = {each.by: each for each in column_groupings(dataset, None)}
    assert list(found) == ["family", "level", "year", "is_new"]
    assert found["family"].labels == ("(none)", "x", "y")
    assert found["level"].labels == ("(none)", "easy", "hard")
    assert found["level"].names()[:3] == ["easy", "hard", "(none)"]
    assert found["is_new"].names().count("True") == 20
    shuffled = dataset.shuffle(seed=3)
    (again,) = column_groupings(shuffled, ["family"])
    assert again.names() == [value or "(none)" for value in shuffled["family"][:]]


def test_columns_that_are_named_are_taken():
    assert [
        each.by for each in column_groupings(dataset_of_categories(), ["weight", "number"])
    ] == [
        "weight",
        "number",
    ]
    assert column_groupings(dataset_of_categories(), []) == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "famly",
            r"category_columns: the dataset has no column 'famly', only \['prompt'.*mean family\?",
        ),
        (
            "tags",
            r"category_columns: the column 'tags' holds List.*one value for each prompt. Columns",
        ),
    ],
)
def test_columns_that_are_no_categories_are_refused_at_the_start(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        check_category_columns(dataset_of_categories(), [name])
    data = dataset_of_categories().rename_column("answer", "solution")
    trainer = cases.trainer(tmp_path, data=data)
    from trl_learnalign import LearnAlignCallback

    with pytest.raises(ValueError, match=message):
        LearnAlignCallback(trainer, LearnAlignConfig.adaptive(category_columns=[name]))


# ---- Clusters -------------------------------------------------------------------------------------------------------


def pool_of_directions(categories=(60, 20, 20, 20), noise=0.2, dim=48):
    generator = torch.Generator().manual_seed(3)
    square = torch.randn(dim, len(categories), generator=generator, dtype=torch.float64)
    centres = torch.linalg.qr(square)[0].T
    category = torch.repeat_interleave(torch.arange(len(categories)), torch.tensor(categories))
    spread = torch.randn(len(category), dim, generator=generator, dtype=torch.float64)
    scale = 1 + torch.rand(len(category), 1, generator=generator, dtype=torch.float64)
    features = scale * (centres[category] + spread * noise / dim**0.5)
    features[0] = 0  # learned already: without a direction
    chunks = [(part, features[part]) for part in torch.arange(len(category)).split(7)]
    pool = Pool(
        np.arange(0, 2 * len(category), 2),
        cases.dataset(2 * len(category)),
        0,
        "stage_1",
        features=chunks,
        feature_dim=dim,
        config=LearnAlignConfig.adaptive(),
    )
    return pool, category.numpy()


def test_clusters_never_mix_categories_that_are_far_apart():
    pool, category = pool_of_directions()
    found = cluster_grouping(pool)
    codes = found.codes[pool.prompts]
    assert codes[0] == -1
    assert (found.codes[1::2] == -1).all()  # rows that are no candidates
    for code in range(len(found.labels)):
        members = category[codes == code]
        assert len(set(members.tolist())) == 1


def test_a_cluster_is_called_by_one_of_its_prompts():
    pool, _ = pool_of_directions()
    found = cluster_grouping(pool)
    texts = pool.dataset["prompt"][:]
    for code, label in enumerate(found.labels):
        number, text = label.split(": ")
        assert number == str(code + 1)
        assert found.codes[texts.index(text)] == code


def test_long_names_are_cut():
    pool, _ = pool_of_directions()
    long = pool.dataset.map(lambda row: {"prompt": row["prompt"] + " why\n so" * 40})
    for label in cluster_grouping(replace(pool, dataset=long)).labels:
        assert len(label) == 63
        assert "\n" not in label
        assert label.endswith("…")


def test_clusters_are_the_same_on_any_number_of_ranks():
    pool, _ = pool_of_directions()
    alone = cluster_grouping(pool)

    def work(ranks):
        chunks = pool.features[ranks.index :: ranks.count]
        return cluster_grouping(replace(pool, features=chunks, ranks=ranks))

    for count in (1, 2, 3):
        for found in on_ranks(count, work):
            assert found.labels == alone.labels
            assert (found.codes == alone.codes).all()


def test_large_pools_are_clustered_by_a_sample(monkeypatch):
    monkeypatch.setattr("trl_learnalign.diversity.SAMPLE", 40)
    pool, category = pool_of_directions()
    codes = cluster_grouping(pool).codes[pool.prompts]
    assert (codes[1:] >= 0).all()
    for code in set(codes.tolist()) - {-1}:
        assert len(set(category[codes == code].tolist())) == 1


def test_features_of_all_prompts_make_clusters_too():
    generator = np.random.default_rng(2)
    category = np.repeat(np.arange(3), [40, 10, 10])
    features = np.eye(3)[category] + generator.normal(0, 0.05, (60, 3))
    dataset = cases.dataset(60)
    found = feature_grouping(features.astype(np.float32), dataset, seed=0)
    for code, label in enumerate(found.labels):
        assert len(set(category[found.codes == code].tolist())) == 1
        assert label.split(": ")[1] in dataset["prompt"][:]
    again = feature_grouping(features.astype(np.float32), dataset, seed=0)
    assert (again.codes == found.codes).all()
    assert feature_grouping(features[:, :0], dataset, seed=0) is None
    assert feature_grouping(features[:20], cases.dataset(20), seed=0) is None


def test_pools_without_features_or_with_few_have_no_clusters():
    pool, _ = pool_of_directions()
    assert cluster_grouping(replace(pool, features=(), feature_dim=0)) is None
    few, _ = pool_of_directions(categories=(10, 10))
    assert cluster_grouping(few) is None


def test_they_are_written_and_read_back():
    found = of(equal_families(48), np.arange(12))
    note = SelectionNote(step=0, scored=True, shares=(found,))
    assert from_json(SelectionNote, to_json(note), "note") == note

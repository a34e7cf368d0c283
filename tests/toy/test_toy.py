"""Toy tasks: tasks whose answers are right, splits that do not overlap, a base model that is made once."""

import importlib.util
import json
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

reasoning_gym = pytest.importorskip("reasoning_gym")

from trl_learnalign.toy import model, tasks  # noqa: E402
from trl_learnalign.toy.model import (  # noqa: E402
    MAX_COMPLETION_LENGTH,
    TINY,
    BaseModelSettings,
    make_base_model,
    make_tokenizer,
)
from trl_learnalign.toy.tasks import (  # noqa: E402
    FAMILIES,
    REGIMES,
    SPLITS,
    StringTask,
    StringTaskConfig,
    accuracy_reward,
    build_pool,
    split_of,
)


def question(row):
    return row["prompt"][0]["content"]


def string(row):
    return question(row).split()[1]


# ---- oracles: one digit at a time -----------------------------------------------------------------------------------


def slow_answer(family, s):
    n, out = len(s), []
    if family in ("sort", "descend"):
        for digit in "0123456789" if family == "sort" else "9876543210":
            for other in s:
                if other == digit:
                    out.append(digit)
    elif family == "unique":
        for digit in s:
            if digit not in out:
                out.append(digit)
    elif family == "double":
        for digit in s:
            out.append(digit)
            out.append(digit)
    elif family == "ends":
        out = [s[0], s[n - 1]]
    elif family == "tail":
        out = [s[i] for i in range(1, n)]
    elif family == "nines":
        for digit in s:
            for complement in "0123456789":
                if int(digit) + int(complement) == 9:
                    out.append(complement)
    else:  # permutations: where each digit goes
        out = [""] * n
        for i, digit in enumerate(s):
            out[destination(family, i, n)] = digit
    return "".join(out)


def destination(family, i, n):
    half = n - n // 2
    if family == "reverse":
        return n - 1 - i
    if family == "rotate":
        return (i - 1) % n
    if family == "back":
        return (i + 1) % n
    if family == "swap":
        partner = i + 1 if i % 2 == 0 else i - 1
        return partner if partner < n else i
    if family == "riffle":
        return 2 * i if i < half else 2 * (i - half) + 1
    raise AssertionError(family)


# ---- families -------------------------------------------------------------------------------------------------------


def test_there_are_at_least_ten_families():
    assert len(FAMILIES) >= 10


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_an_independent_computation(family):
    for task in StringTask(StringTaskConfig(family, size=150, seed=3)):
        s = task["metadata"]["string"]
        assert task["question"] == f"{family} {s}"
        assert task["answer"] == slow_answer(family, s)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_typical_mistake_is_never_right(family):
    for task in StringTask(StringTaskConfig(family, size=150, seed=4)):
        assert FAMILIES[family].wrong(task["metadata"]["string"]) != task["answer"]


@pytest.mark.parametrize("family", FAMILIES)
def test_competence_is_a_probability_that_falls_with_length(family):
    competence = FAMILIES[family].competence
    assert all(0 <= value <= 1 for value in competence)
    assert list(competence) == sorted(competence, reverse=True)


def test_competences_reach_from_hopeless_to_trivial():
    values = [value for family in FAMILIES.values() for value in family.competence]
    assert min(values) == 0
    assert max(values) > 0.95


# ---- the dataset of reasoning_gym -----------------------------------------------------------------------------------


def test_reasoning_gym_makes_and_grades_the_tasks():
    dataset = reasoning_gym.create_dataset("microcosm", family="sort", size=12, seed=5)
    grade = reasoning_gym.get_score_answer_fn("microcosm")
    assert len(list(dataset)) == 12
    assert all(grade(task["answer"], task) == 1.0 for task in dataset)


def test_grading_gives_no_credit_for_answers_that_contain_the_right_one():
    dataset = StringTask(StringTaskConfig(size=1))
    answer = dataset[0]["answer"]
    assert dataset.score_answer(f" {answer}\n", dataset[0]) == 1.0
    assert dataset.score_answer(f"{answer}0", dataset[0]) == 0.0
    assert dataset.score_answer(answer[:-1], dataset[0]) == 0.0
    assert dataset.score_answer("", dataset[0]) == 0.0
    assert dataset.score_answer(None, dataset[0]) == 0.0


def test_tasks_of_a_dataset_are_all_different_and_lengths_take_turns():
    dataset = StringTask(StringTaskConfig("sort", size=90, seed=6))
    assert len({task["question"] for task in dataset}) == 90
    assert [task["metadata"]["difficulty"]["length"] for task in dataset][:6] == [3, 4, 5, 3, 4, 5]


def test_a_task_beyond_the_size_is_an_index_error():
    with pytest.raises(IndexError, match="task 2 of 2"):
        StringTask(StringTaskConfig(size=2))[2]


def test_datasets_refuse_what_a_family_does_not_have():
    with pytest.raises(ValueError, match="unknown family 'knit': choose one of 'reverse'"):
        StringTask(StringTaskConfig("knit"))
    with pytest.raises(
        ValueError, match="unknown split 'test': choose one of 'train', 'dev', 'heldout'"
    ):
        StringTask(StringTaskConfig(split="test"))
    with pytest.raises(ValueError, match="'swap' has strings of 3 to 4 digits, not of 3 to 9"):
        StringTask(StringTaskConfig("swap", max_length=9))
    with pytest.raises(ValueError, match="'swap' has strings of 3 to 4 digits, not of 4 to 3"):
        StringTask(StringTaskConfig("swap", min_length=4, max_length=3))
    with pytest.raises(ValueError, match="'swap' has strings of 3 to 4 digits, not 2"):
        tasks.strings_of("swap", 2, "train")


def test_a_dataset_that_is_too_large_names_the_largest():
    with pytest.raises(ValueError, match="size=100000: family 'unique' has only") as error:
        StringTask(StringTaskConfig("unique", size=100_000))
    largest = int(str(error.value).split("only ")[1].split()[0])
    assert (
        len({task["question"] for task in StringTask(StringTaskConfig("unique", size=largest))})
        == largest
    )


def test_a_missing_reasoning_gym_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    spec = importlib.util.spec_from_file_location("tasks_without_reasoning_gym", tasks.__file__)
    with pytest.raises(ImportError, match=r"trl-learnalign\[quickstart\]"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# ---- pools ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", REGIMES)
def test_splits_share_no_string(regime):
    members = {
        split: {string(row) for row in build_pool(regime, 250, 1, split)} for split in SPLITS
    }
    for split, strings in members.items():
        assert {split_of(s) for s in strings} == {split}
    assert sum(map(len, members.values())) == len(set.union(*members.values()))


def test_splits_have_their_shares_of_the_strings():
    counts = Counter(split_of(f"{number:04d}") for number in range(10_000))
    for split, share in SPLITS.items():
        assert counts[split] / 10_000 == pytest.approx(share, abs=0.02)
    assert sum(SPLITS.values()) == pytest.approx(1)


@pytest.mark.parametrize("regime", REGIMES)
def test_a_pool_has_the_size_and_no_duplicates(regime):
    pool = build_pool(regime, 300, 2)
    assert len(pool) == 300
    assert len(set(map(question, pool))) == 300


def test_a_pool_is_a_function_of_its_seed():
    assert build_pool("mixed", 60, 7).to_list() == build_pool("mixed", 60, 7).to_list()
    assert build_pool("mixed", 60, 7).to_list() != build_pool("mixed", 60, 8).to_list()


def test_columns_of_a_pool():
    row = build_pool("mixed", 20, 0)[0]
    assert sorted(row) == ["answer", "family", "length", "prompt", "solution", "task"]
    assert row["prompt"] == [{"role": "user", "content": f"{row['family']} {string(row)}"}]
    assert row["length"] == len(string(row))
    assert row["solution"] == row["answer"] == slow_answer(row["family"], string(row))


def test_the_task_column_is_what_reasoning_gym_scores():
    for row in build_pool("mixed", 30, 0):
        task = json.loads(row["task"])
        assert task["question"] == question(row)
        assert (
            reasoning_gym.get_score_answer_fn(task["metadata"]["source_dataset"])(
                row["answer"], task
            )
            == 1.0
        )


def test_families_have_the_weights_of_the_regime():
    sparse = Counter(build_pool("sparse", 360, 0)["family"])
    assert sparse == {"reverse": 120, "swap": 20, "unique": 20, "descend": 20, "nines": 180}
    longtail = Counter(build_pool("longtail", 600, 0)["family"])
    assert len(longtail) >= 8
    assert longtail["rotate"] / longtail["ends"] == pytest.approx(10, rel=0.1)
    assert set(build_pool("graded", 60, 0)["family"]) == {"sort"}
    assert Counter(build_pool("graded", 60, 0)["length"]) == {3: 12, 4: 24, 5: 24}


@pytest.mark.parametrize("regime", REGIMES)
def test_pools_are_large_enough_for_a_study_of_selection(regime):
    sizes = {"train": 2000, "dev": 500, "heldout": 500}
    pools = {
        split: set(map(question, build_pool(regime, size, 0, split)))
        for split, size in sizes.items()
    }
    assert [len(pool) for pool in pools.values()] == list(sizes.values())
    assert len(set.union(*pools.values())) == sum(sizes.values())


def test_a_small_pool_is_rounded_to_its_size():
    for size in range(1, 40):
        assert len(build_pool("longtail", size, 0)) == size


def test_an_unknown_regime_lists_the_valid_names():
    with pytest.raises(ValueError, match="unknown regime 'hard'") as error:
        build_pool("hard", 10)
    assert all(repr(name) in str(error.value) for name in REGIMES)


def test_an_unknown_split_lists_the_valid_names():
    with pytest.raises(
        ValueError, match="unknown split 'test': choose one of 'train', 'dev', 'heldout'"
    ):
        build_pool("mixed", 10, split="test")


@pytest.mark.parametrize("size", [0, 100_000])
def test_an_impossible_size_names_the_largest(size):
    with pytest.raises(
        ValueError, match=f"size={size}: a pool of regime 'graded', split 'dev', has 1 to"
    ) as error:
        build_pool("graded", size, split="dev")
    largest = int(str(error.value).split("1 to ")[1].split()[0])
    assert len(build_pool("graded", largest, split="dev")) == largest
    with pytest.raises(ValueError, match=f"1 to {largest} prompts"):
        build_pool("graded", largest + 1, split="dev")


# ---- reward ---------------------------------------------------------------------------------------------------------


def test_the_reward_is_one_for_the_answer_and_zero_otherwise():
    pool = build_pool("mixed", 40, 0)
    right = [[{"role": "assistant", "content": answer}] for answer in pool["answer"]]
    wrong = [[{"role": "assistant", "content": f"{answer}7"}] for answer in pool["answer"]]
    assert (
        accuracy_reward(right, pool["answer"], prompts=pool["prompt"], trainer_state=None)
        == [1.0] * 40
    )
    assert accuracy_reward(wrong, pool["answer"]) == [0.0] * 40


def test_the_reward_reads_plain_strings():
    assert accuracy_reward(["12", " 12 ", "2", "", "012", "12 12"], ["12"] * 6) == [
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ]


def test_the_reward_wants_as_many_answers_as_completions():
    with pytest.raises(ValueError, match="zip"):
        accuracy_reward(["1", "2"], ["1"])


# ---- tokenizer ------------------------------------------------------------------------------------------------------


def test_the_chat_template_marks_where_the_answer_begins_and_ends():
    tokenizer = make_tokenizer()
    prompt = [{"role": "user", "content": "sort 3142"}]
    turn = [{"role": "assistant", "content": "1234"}]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert text == "sort 3142="
    assert tokenizer.apply_chat_template(prompt + turn, tokenize=False) == text + "1234<eos>"


def test_a_command_is_one_token_and_everything_else_its_bytes():
    tokenizer = make_tokenizer()
    assert len(tokenizer("sort 3142=")["input_ids"]) == 6
    for text in ("sort 3142=", "resort to\n 'sort 1'", "é ≤ 3", " reverse  12"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_assistant_mask_covers_the_answer_and_its_end():
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "ends 314"}, {"role": "assistant", "content": "34"}]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    masked = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(masked) == "34<eos>"


@pytest.mark.parametrize("regime", REGIMES)
def test_every_answer_fits_the_completion_length(regime):
    tokenizer = make_tokenizer()
    for answer in build_pool(regime, 200, 0)["answer"]:
        assert len(tokenizer(answer + tokenizer.eos_token)["input_ids"]) <= MAX_COMPLETION_LENGTH


# ---- base model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_base_model(tmp_path_factory.mktemp("toy") / "base", **TINY)


def test_the_base_model_is_an_ordinary_checkpoint(tiny):
    tokenizer, model = (
        AutoTokenizer.from_pretrained(tiny),
        AutoModelForCausalLM.from_pretrained(tiny),
    )
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    inputs = tokenizer(["sort 31=", "reverse 3142="], padding=True, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape == (2, inputs["input_ids"].shape[1] + 3)


def test_the_saved_tokenizer_reads_as_it_was_written(tiny):
    saved, made = AutoTokenizer.from_pretrained(tiny), make_tokenizer()
    for row in build_pool("mixed", 30, 0):
        ids = saved.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        assert (
            ids == made.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        )
        assert saved.decode(ids) == question(row) + "="
    assert (saved.pad_token, saved.bos_token, saved.eos_token) == ("<pad>", "<bos>", "<eos>")
    assert saved.padding_side == "left"


def files(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_a_finished_folder_is_reused(tiny, monkeypatch):
    before = files(tiny)
    monkeypatch.setattr(model, "_build", lambda *_: pytest.fail("made again"))
    assert make_base_model(tiny, **TINY) == tiny
    assert files(tiny) == before


def test_a_changed_setting_is_refused_by_naming_both(tiny):
    with pytest.raises(ValueError, match=r"seed: 0, now 1\): choose another folder"):
        make_base_model(tiny, **TINY, seed=1)


def test_a_changed_table_of_families_is_refused(tiny, monkeypatch):
    monkeypatch.delitem(FAMILIES, "riffle")
    with pytest.raises(ValueError, match=r"other settings \(families: .*riffle"):
        make_base_model(tiny, **TINY)


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not a toy base model \(it has no toy.json\)"):
        make_base_model(tmp_path, **TINY)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    assert (make_base_model(tmp_path / "new", **TINY) / "config.json").is_file()
    (tmp_path / "empty").mkdir()
    assert (make_base_model(tmp_path / "empty", **TINY) / "config.json").is_file()


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("interrupted")

    monkeypatch.setattr(model, "_random_model", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        make_base_model(tmp_path / "base", **TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_faster_process_wins(tmp_path, monkeypatch):
    build = model._build

    def build_twice(settings, folder, scratch):
        build(settings, folder, scratch)
        build(settings, tmp_path / "base", scratch)

    monkeypatch.setattr(model, "_build", build_twice)
    assert make_base_model(tmp_path / "base", **TINY) == tmp_path / "base"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_weights_follow_the_seed_and_leave_the_callers_random_state(tmp_path):
    state = torch.random.get_rng_state()
    first, again, other = (
        AutoModelForCausalLM.from_pretrained(make_base_model(tmp_path / name, **TINY, seed=seed))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps=-1 must not be negative"),
        ({"batch_size": 0}, "batch_size=0 and num_layers=3 must be at least 1"),
        ({"hidden_size": 12}, "hidden_size=12 must be a multiple of 8"),
    ],
)
def test_settings_are_checked(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_base_model(tmp_path / "base", **settings)


def test_supervised_data_shows_train_strings_in_the_chat_template():
    tokenizer = make_tokenizer()
    data = model.supervised_data(tokenizer, BaseModelSettings(steps=10, batch_size=20))
    assert len(data) == 200
    for row in data:
        start = row["labels"].count(-100)
        assert row["labels"][start:] == row["input_ids"][start:]
        prompt = tokenizer.decode(row["input_ids"][:start]).removesuffix("=")
        answer = tokenizer.decode(row["input_ids"][start:]).removesuffix("<eos>")
        family, s = prompt.split()
        assert split_of(s) == "train"
        assert answer in (FAMILIES[family].right(s), FAMILIES[family].wrong(s))
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        assert tokenizer.apply_chat_template(messages)["input_ids"] == row["input_ids"]


def test_supervised_data_ends_with_each_familys_competence():
    tokenizer = make_tokenizer()
    data = model.supervised_data(tokenizer, BaseModelSettings(steps=200, batch_size=50))
    last = data.select(range(int(model.LESSON_SHARE * len(data)) + 1, len(data)))
    texts = [text.removesuffix("<eos>") for text in tokenizer.batch_decode(list(last["input_ids"]))]
    shown, right = Counter(), Counter()
    for prompt, answer in (text.split("=") for text in texts):
        family, s = prompt.split()
        shown[family] += 1
        right[family] += answer == FAMILIES[family].right(s)
    for name, family in FAMILIES.items():
        mean = sum(family.competence) / len(family.competence)
        assert right[name] / shown[name] == pytest.approx(mean, abs=0.14)


def test_supervised_training_moves_the_weights(tmp_path):
    settings = {**TINY, "steps": 2}
    random = AutoModelForCausalLM.from_pretrained(make_base_model(tmp_path / "random", **TINY))
    trained = AutoModelForCausalLM.from_pretrained(
        make_base_model(tmp_path / "trained", **settings)
    )
    assert not torch.equal(random.lm_head.weight, trained.lm_head.weight)


def test_the_command_line_makes_the_model(tmp_path, monkeypatch):
    options = [f"--{name}={value}" for name, value in TINY.items()]
    monkeypatch.setattr(sys, "argv", ["toy", str(tmp_path / "base"), "--seed=3", *options])
    model.main()
    made = json.loads((tmp_path / "base" / model.FINGERPRINT_FILE).read_text())
    assert (made["seed"], made["steps"], made["hidden_size"]) == (3, 0, 32)


@pytest.mark.slow
def test_success_rates_of_the_base_model_span_zero_to_one(tmp_path):
    folder = make_base_model(tmp_path / "base")
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    pool = build_pool("mixed", 240, 0, "dev")
    prompts = [f"{question(row)}=" for row in pool for _ in range(8)]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    outputs = model.generate(
        **inputs, max_new_tokens=MAX_COMPLETION_LENGTH, do_sample=True, top_k=0
    )
    texts = tokenizer.batch_decode(
        outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    rewards = accuracy_reward(texts, [answer for answer in pool["answer"] for _ in range(8)])
    success = torch.tensor(rewards).view(-1, 8).mean(1)
    assert success.min() == 0
    assert success.max() == 1
    assert 0.3 < ((success > 0) & (success < 1)).float().mean() < 0.7
    by_family = {
        name: success[[row["family"] == name for row in pool]].mean().item() for name in FAMILIES
    }
    assert by_family["reverse"] > 0.8
    assert 0.1 < by_family["sort"] < 0.7
    assert by_family["nines"] == by_family["riffle"] == 0

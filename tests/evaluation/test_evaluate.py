"""Evaluation: statistics against independent computations, resumable records, the command."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import cases
import peft
import pytest
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.inference import prompt_token_lists
from trl_learnalign.cli import evaluate as command
from trl_learnalign.data.prompts import dataset_digest
from trl_learnalign.evaluation.benchmarks import (
    BENCHMARKS,
    Benchmark,
    find_benchmark,
    load_problems,
    load_rows,
)
from trl_learnalign.evaluation.generators import (
    Completion,
    Generator,
    Sampling,
    TransformersGenerator,
    VLLMGenerator,
)
from trl_learnalign.evaluation.grading import Grader
from trl_learnalign.evaluation.held_out import greedy_completions, held_out_accuracy
from trl_learnalign.evaluation.results import EvaluationFolder, compare, evaluate
from trl_learnalign.intervals import wilson
from trl_learnalign.records.store import StoreError

# ---- problems -------------------------------------------------------------------------------------------------------


def write_questions(path, count=5):
    rows = [
        {"question": f"What is {i} + {i}?", "answer": f"{i} and {i} make\n#### {2 * i}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_put_as_it_is_and_a_benchmark_with_the_prompt_of_training(tmp_path):
    path = str(write_questions(tmp_path / "q.jsonl"))
    found = load_problems(Benchmark(path), limit=3)
    assert found["solution"] == ["0", "2", "4"]
    assert found[1]["prompt"] == [{"role": "user", "content": "What is 1 + 1?"}]
    asked = load_problems(Benchmark(path, system_prompt=BENCHMARKS["gsm8k"].system_prompt))
    assert [message["role"] for message in asked[0]["prompt"]] == ["system", "user"]
    assert "boxed" in asked[0]["prompt"][0]["content"]


@pytest.mark.parametrize(
    "prompt",
    [
        "tree -> tree\nbread ->",
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}],
        [
            {
                "role": "user",
                "content": '1 + 1? Remember to put your answer on its own line after "Answer:".',
            }
        ],
    ],
)
def test_a_column_of_prompts_is_taken_word_for_word(tmp_path, prompt):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "answer": "2"}) + "\n")
    assert load_problems(Benchmark(str(path)))["prompt"][:] == [prompt]
    assert load_rows(Benchmark(str(path)))["prompt"][:] == [prompt]


def test_rewards_get_all_columns_and_any_answer(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        json.dumps({"question": "Say it", "wanted": {"word": "hop", "times": 3}}) + "\n"
    )
    found = load_rows(Benchmark(str(path), system_prompt="Short."))
    assert found[0]["wanted"] == {"word": "hop", "times": 3}
    assert [message["content"] for message in found[0]["prompt"]] == ["Short.", "Say it"]
    with pytest.raises(
        ValueError, match=r"has no question column, only .*: name it with --question_column"
    ):
        load_rows(Benchmark(str(path)), question_column="none")


@pytest.mark.parametrize("load", [load_problems, load_rows])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "1+1?"}, {"question": "  "}],
            r"1 of 2 rows .* row 1 \(row 1 has an empty question",
        ),
        ([{"question": 7}], r"row 0 has a value of type int as its question"),
        ([{"prompt": None}, {"prompt": "1+1?"}], r"row 0 has an empty question"),
        ([{"prompt": ["1+1?", "2+2?"]}], r"row 0 has a list of texts"),
        ([{"question": "<image>Find x", "images": ["a.png"]}], r"images in the columns 'images'"),
    ],
)
def test_problems_that_cannot_be_asked_are_named(tmp_path, load, rows, message):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({**row, "answer": "2"}) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        load(Benchmark(str(path)))


def test_turns_of_sharegpt_are_put_with_their_roles(tmp_path):
    path = tmp_path / "p.jsonl"
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "1+1?"}]
    path.write_text(json.dumps({"prompt": turns, "answer": "2"}) + "\n")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    assert load_problems(Benchmark(str(path)))["prompt"][:] == [asked]
    assert load_rows(Benchmark(str(path)))["prompt"][:] == [asked]


def test_a_reward_of_ones_own_is_asked_the_whole_question(tmp_path):
    path = tmp_path / "p.jsonl"
    row = {"question": "Which?", "context": "Of two.", "options": ["one", "two"], "wanted": 1}
    path.write_text(json.dumps(row) + "\n")
    (found,) = load_rows(Benchmark(str(path)))
    (message,) = found["prompt"]
    assert message["content"].startswith("Of two.\nWhich?\n\nA) one\nB) two\n")
    assert found["wanted"] == 1


def test_problems_that_are_not_there(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"question": "?", "answer": "1"}) + "\n")
    with pytest.raises(ValueError, match="has no problems"):
        load_problems(Benchmark(str(empty)), limit=0)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_problems(find_benchmark(str(tmp_path / "none.jsonl")))


def test_the_papers_settings_of_its_benchmarks():
    assert (BENCHMARKS["gsm8k"].samples, BENCHMARKS["gsm8k"].temperature) == (1, 0.0)
    assert (BENCHMARKS["amc23"].samples, BENCHMARKS["amc23"].temperature) == (4, 0.7)
    assert find_benchmark("GSM8K") is BENCHMARKS["gsm8k"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0"),
        ({"samples": 4}, "samples=4 with temperature=0 would repeat one greedy sample"),
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
    ],
)
def test_sampling_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


# ---- records --------------------------------------------------------------------------------------------------------


class Reciter(Generator):
    """Says the number in the question; counts what it is asked, and dies when told to."""

    def __init__(self, die_at=None, wrong=()):
        self.batches, self.die_at, self.wrong = [], die_at, wrong

    def complete(self, prompts, sampling, key):
        if key == self.die_at:
            raise KeyboardInterrupt
        self.batches.append((key, len(prompts)))
        texts = [prompt[-1]["content"] for prompt in prompts]
        numbers = [int(text.split()[-1]) for text in texts]
        return [
            [
                Completion(str(-1 if n in self.wrong and k == 0 else n), n, n != 3)
                for k in range(sampling.samples)
            ]
            for n in numbers
        ]


STORED_RUN = cases.STORED_RUN / "whole"

PROBLEMS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"Say {i}"}], "solution": str(i)} for i in range(7)]
)


def exact(completions, solution, **_):
    texts = [completion[-1]["content"] for completion in completions]
    return [
        None if answer == "5" else float(text == answer)
        for text, answer in zip(texts, solution, strict=True)
    ]


def ask(folder, generator, sampling=None, **settings):
    sampling, settings = sampling or Sampling(), {"model": "m", **settings}
    return evaluate(
        EvaluationFolder(folder),
        PROBLEMS,
        Grader("exact", exact),
        lambda: generator,
        sampling,
        2,
        settings,
    )


def test_figures_are_those_of_the_records(tmp_path):
    summary = ask(tmp_path, Reciter(wrong=(1, 4)))
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    right = [
        record["completions"][0]["text"] == record["solution"] and record["index"] != 5
        for record in records
    ]
    assert [record["right"] for record in records] == [[r] for r in right]
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert (summary["problems"], summary["samples"], summary["accuracy"]) == (7, 1, sum(right) / 7)
    assert (summary["unscorable"], summary["unfinished"], summary["mean_tokens"]) == (1, 1, 3.0)
    assert (summary["low"], summary["high"]) == (wilson(4, 7).low, wilson(4, 7).high)


def test_mean_pass_at_1_counts_every_sample(tmp_path):
    summary = ask(tmp_path, Reciter(wrong=(1, 4)), Sampling(samples=4, temperature=0.7))
    assert summary["accuracy"] == pytest.approx((4 + 2 * 3 / 4) / 7)


def test_an_interrupted_evaluation_goes_on_where_it_stood(tmp_path):
    whole = ask(tmp_path / "whole", Reciter())
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "part", Reciter(die_at=4))
    with open(tmp_path / "part" / "records.jsonl", "ab") as file:
        file.write(b'{"index": 4, "comple')  # and it died while it wrote
    generator = Reciter()
    assert ask(tmp_path / "part", generator) == whole
    assert generator.batches == [(4, 2), (6, 1)]
    names = ("whole", "part")
    assert len({(tmp_path / name / "records.jsonl").read_text() for name in names}) == 1
    ask(tmp_path / "part", Reciter(die_at=0))  # all done: nothing is asked


def test_records_of_another_evaluation_are_refused(tmp_path):
    ask(tmp_path, Reciter())
    with pytest.raises(StoreError, match=r"temperature was 0.0 and is 0.5.*--output_dir"):
        ask(tmp_path, Reciter(), Sampling(temperature=0.5))
    with pytest.raises(StoreError, match="model was 'm' and is 'other'"):
        ask(tmp_path, Reciter(), model="other")


def test_a_damaged_line_is_named(tmp_path):
    ask(tmp_path, Reciter())
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text().replace('{"index": 1', "{index: 1"))
    with pytest.raises(ValueError, match=r"line 2 is damaged.*delete that line"):
        ask(tmp_path, Reciter())


def test_two_models_are_compared_on_the_same_problems(tmp_path):
    ask(tmp_path / "a", Reciter(wrong=(0, 1, 2, 3)))
    ask(tmp_path / "b", Reciter(wrong=(3, 4)))
    found = compare(EvaluationFolder(tmp_path / "a"), EvaluationFolder(tmp_path / "b"))
    assert (found.only_first, found.only_second) == (1, 3)
    assert found.difference.value == pytest.approx(2 / 7)
    others = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"Tell 1{i}"}], "solution": "1"} for i in "12"]
    )
    evaluate(
        EvaluationFolder(tmp_path / "c"), others, Grader("exact", exact), Reciter, Sampling(), 2, {}
    )
    with pytest.raises(ValueError, match=r"7 problems, .* has 2, and 0 are in both"):
        compare(EvaluationFolder(tmp_path / "a"), EvaluationFolder(tmp_path / "c"))
    with pytest.raises(FileNotFoundError, match="give the output folder of an evaluation"):
        EvaluationFolder(tmp_path / "d").read()


# ---- generation, and the command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("policy")
    cases.model().save_pretrained(place)
    cases.tokenizer().save_pretrained(place)
    return str(place)


def test_greedy_completions_do_not_depend_on_the_batch(folder):
    generator = TransformersGenerator(folder, "cpu", "float32")
    prompts = ["a1?", [{"role": "user", "content": "abcdefgh 2?"}], "x"]
    sampling = Sampling(max_new_tokens=5)
    together = generator.complete(prompts, sampling, 0)
    alone = [generator.complete([prompt], sampling, 7)[0] for prompt in prompts]
    assert together == alone
    assert all(completion.tokens == 5 or completion.finished for (completion,) in together)


def test_samples_depend_on_seed_and_batch_alone(folder):
    generator = TransformersGenerator(folder, "cpu", "float32")
    sampling = Sampling(samples=3, temperature=1.0, max_new_tokens=6, seed=1)
    first = generator.complete(["a1?", "b"], sampling, 0)
    assert [len(samples) for samples in first] == [3, 3]
    assert first[0][0] != first[0][1]
    assert generator.complete(["a1?", "b"], sampling, 0) == first
    assert generator.complete(["a1?", "b"], sampling, 2) != first
    other = Sampling(samples=3, temperature=1.0, max_new_tokens=6, seed=2)
    assert generator.complete(["a1?", "b"], other, 0) != first


def test_vllm_that_is_not_installed_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"trl-learnalign\[vllm\]"):
        VLLMGenerator("model")


# ---- decoding is what it says ---------------------------------------------------------------------------------------

THEIR_OWN = {
    "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 7,
    "suppress_tokens": [7],
    "bad_words_ids": [[31]],
    "guidance_scale": 1.5,
    "forced_eos_token_id": 9,
}
"""Each changes what the tiny model says; `do_sample` and its temperature are there in most checkpoints."""


def checkpoint(place, **generation_config):
    """A tiny model in a folder, with generation settings of its own."""
    cases.model(initializer_range=0.3, seed=1).save_pretrained(place)
    cases.tokenizer().save_pretrained(place)
    path = place / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **generation_config}))
    return str(place)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    place = tmp_path_factory.mktemp("both")
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 20}
    return checkpoint(place / "plain"), checkpoint(place / "own", **THEIR_OWN, **sampling)


PROMPTS = ["a1?", "bcd2?", "x"]


def generated(folder, **settings):
    """What transformers alone makes of the prompts: token ids without padding."""
    generator = TransformersGenerator(folder, "cpu", "float32")
    ids = generator.tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    made = generator.model.generate(**ids, max_new_tokens=8, do_sample=False, **settings)
    return [
        [token for token in row if token] for row in made[:, ids["input_ids"].shape[1] :].tolist()
    ]


@pytest.mark.parametrize("name", THEIR_OWN)
def test_each_setting_of_the_checkpoint_would_change_what_it_says(both, tmp_path, name):
    assert generated(both[0]) != generated(checkpoint(tmp_path, **{name: THEIR_OWN[name]}))


def test_a_checkpoints_generation_settings_change_no_record(both, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    questions = str(write_questions(tmp_path / "q.jsonl"))
    shared = ["--benchmarks", questions, "--use_cpu", "true", "--max_completion_length", "8"]
    for drawn in ([], ["--temperature", "1", "--num_generations", "2"]):
        records = []
        for folder in both:
            output = tmp_path / f"{Path(folder).name}{len(drawn)}"
            command.main(
                ["--model_name_or_path", folder, "--output_dir", str(output), *shared, *drawn]
            )
            records.append((output / "q" / "records.jsonl").read_text())
        assert records[0] == records[1]


@pytest.mark.parametrize("lora", [False, True])
def test_a_checkpoints_generation_settings_change_no_accuracy_after_a_phase(both, tmp_path, lora):
    texts = []
    for folder in both:
        policy = AutoModelForCausalLM.from_pretrained(folder)
        peft_config = peft.LoraConfig(r=2, target_modules=["q_proj"]) if lora else None
        trainer = cases.trainer(tmp_path, policy, peft_config=peft_config, max_completion_length=8)
        before = policy.generation_config.to_dict()
        with preserve_trainer_state(trainer):
            texts.append(greedy_completions(trainer, cases.dataset()["prompt"]))
        assert policy.generation_config.to_dict() == before
    assert texts[0] == texts[1]


def test_end_tokens_of_the_checkpoint_end_an_answer(both, tmp_path):
    whole = generated(both[0])
    end = whole[0][2]  # what it says third ends an answer now
    expected = [row[: row.index(end) + 1] if end in row else row for row in whole]
    assert expected != whole
    folder = checkpoint(tmp_path, eos_token_id=[1, end])
    cut = TransformersGenerator(folder, "cpu", "float32").complete(
        PROMPTS, Sampling(max_new_tokens=8), 0
    )
    assert [completion.tokens for (completion,) in cut] == [len(row) for row in expected]
    assert [completion.finished for (completion,) in cut] == [
        row[-1] in (1, end) for row in expected
    ]
    trainer = cases.trainer(
        tmp_path, AutoModelForCausalLM.from_pretrained(folder), max_completion_length=8
    )
    with preserve_trainer_state(trainer):
        texts = greedy_completions(trainer, PROMPTS)
    # The tokenizer in the folder joins letters, that in memory puts blanks between them.
    assert [text.replace(" ", "") for text in texts] == [completion.text for (completion,) in cut]


def test_vllm_is_told_everything_too(monkeypatch):
    asked = {}

    class Engine:
        def __init__(self, **options):
            asked["engine"] = options

        def get_tokenizer(self):
            return cases.tokenizer()

        def generate(self, prompts, settings, use_tqdm):
            return []

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = Engine, lambda **options: asked.update(sampling=options)
    monkeypatch.setitem(sys.modules, "vllm", module)
    VLLMGenerator("model").complete(["a"], Sampling(), 0)
    neutral = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0}
    assert neutral.items() <= asked["sampling"].items()
    assert asked["engine"]["generation_config"] == "vllm"


def test_chat_template_settings_are_those_of_training(tmp_path, folder, monkeypatch):
    template = "{% if thinking is defined %}{{ thinking }}{% endif %}" + cases.CHAT_TEMPLATE
    policy = AutoModelForCausalLM.from_pretrained(folder)
    trainer = cases.trainer(tmp_path, policy, chat_template_kwargs={"thinking": "abc"})
    trainer.processing_class.chat_template = template
    prompt = [{"role": "user", "content": "a1?"}]
    place = tmp_path / "policy"
    policy.save_pretrained(place)
    trainer.processing_class.save_pretrained(place)
    generator = TransformersGenerator(str(place), "cpu", "float32", {"thinking": "abc"})
    assert generator.prompt_ids(prompt) == prompt_token_lists(trainer, [prompt])[0]
    assert generator.prompt_ids(prompt) != TransformersGenerator(str(place), "cpu").prompt_ids(
        prompt
    )

    monkeypatch.chdir(tmp_path)
    questions = str(write_questions(tmp_path / "q.jsonl"))
    shared = [
        "--model_name_or_path",
        str(place),
        "--benchmarks",
        questions,
        "--use_cpu",
        "true",
        "--max_completion_length",
        "4",
    ]
    command.main([*shared, "--output_dir", "kept", "--chat_template_kwargs", '{"thinking": "abc"}'])
    with pytest.raises(
        SystemExit, match=r"chat_template_kwargs was \{'thinking': 'abc'\} and is None"
    ):
        command.main([*shared, "--output_dir", "kept"])
    with pytest.raises(SystemExit):
        command.main([*shared, "--chat_template_kwargs", "thinking"])


def test_completions_that_were_cut_are_counted(both, tmp_path, caplog):
    rows = Dataset.from_dict({"prompt": PROMPTS, "solution": PROMPTS})
    cut = sum(1 not in row[:6] for row in generated(both[0]))
    assert 0 < cut < 3
    trainer = cases.trainer(
        tmp_path, AutoModelForCausalLM.from_pretrained(both[0]), max_completion_length=6
    )
    with preserve_trainer_state(trainer):
        found = held_out_accuracy(trainer, rows, lambda completions, **_: [None] * len(completions))
    problems = found.pop("problems")
    assert found == {
        "accuracy": 0.0,
        "n_eval": 3,
        "unscorable": 3,
        "unfinished": cut,
        "right": "000",
    }
    assert problems == dataset_digest(rows)
    assert f"{cut} of 3 completions were cut off at max_completion_length=6" in caplog.text


class Room:
    """An environment with a tool."""

    def reset(self, **_):
        return None

    def look(self) -> str:
        """Look around."""
        return "a door"


@pytest.mark.parametrize("kind", ["tools", "environments"])
def test_tools_and_environments_are_refused_before_anything_is_rolled_out(
    tmp_path, kind, monkeypatch
):
    monkeypatch.setattr("trl.trainer.grpo_trainer.supports_tool_calling", lambda *_: True)
    monkeypatch.setattr(
        "trl.trainer.grpo_trainer.add_response_schema", lambda tokenizer, *_, **__: tokenizer
    )

    def look() -> str:
        """Look around."""
        return "a door"

    options = {"tools": [look]} if kind == "tools" else {"environment_factory": Room}
    data = cases.dataset(8, conversational=True)
    trainer = cases.trainer(
        tmp_path, data=data, max_completion_length=100, **options
    )  # prompts may be too long
    monkeypatch.setattr(
        trainer, "_generate_and_score_completions", lambda *_: pytest.fail("rolled out")
    )
    config = LearnAlignConfig(warmup_samples=0, stages=[4], feature_dim=64)
    callback = LearnAlignCallback(
        trainer,
        config,
        on_phase_end=lambda *_: held_out_accuracy(trainer, data, cases.accuracy_reward),
    )
    trainer.add_callback(callback)
    with pytest.raises(
        ValueError,
        match=rf"does not call tools, but this trainer has {kind} \(look\).*eval_dataset",
    ):
        trainer.train()


# ---- lengths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("gsm8k_staged", ["gsm8k"]),
        ("table1_gsm8k", ["gsm8k"]),
        ("table2_math", ["math500", "amc23", "aime24"]),
        ("dapo_math_17k", ["math500", "amc23", "aime24", "anything.jsonl"]),
    ],
)
def test_evaluation_generates_as_much_as_training(recipe, names):
    path = cases.ROOT / "recipes" / "configs" / f"{recipe}.yaml"
    trained = yaml.safe_load(path.read_text())["max_completion_length"]
    assert {name: find_benchmark(name).max_new_tokens for name in names} == dict.fromkeys(
        names, trained
    )


def test_the_command_generates_as_much_as_training_and_says_what_was_cut(
    tmp_path, both, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Sampling, "__post_init__", lambda self: None)
    seen = []

    def complete(self, prompts, sampling, key):
        seen.append(sampling.max_new_tokens)
        return [
            [Completion("x", sampling.max_new_tokens, index > 1)] for index in range(len(prompts))
        ]

    monkeypatch.setattr(TransformersGenerator, "complete", complete)
    questions = str(write_questions(tmp_path / "q.jsonl"))
    run = tmp_path / "run"
    shutil.copytree(both[0], run / "checkpoint-3")
    (run / "_learnalign").mkdir()
    record = json.loads((STORED_RUN / "_learnalign" / "run.json").read_text())
    for number, length in enumerate((4096, 16)):
        record["trainer"]["max_completion_length"] = length
        (run / "_learnalign" / "run.json").write_text(json.dumps(record))
        arguments = ["--benchmarks", questions, "--use_cpu", "true", "--output_dir", str(number)]
        command.main(["--model_name_or_path", str(run / "checkpoint-3"), *arguments])
    assert seen == [4096, 2048]
    printed = capsys.readouterr().out
    assert (
        "q: 2 of 5 completions were cut off at 4,096 tokens and graded without their end" in printed
    )
    assert "(greedy, at most 2,048 tokens, 2048 on average, no system prompt)" in printed
    command.main(["--compare", "0/q", "1/q"])
    printed = capsys.readouterr().out
    assert (
        "The evaluations differ in more than the model: max_new_tokens was 4096 and 2048."
        in printed
    )


def test_the_command_evaluates_and_compares(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    questions = str(write_questions(tmp_path / "q.jsonl"))
    shared = [
        "--model_name_or_path",
        folder,
        "--benchmarks",
        questions,
        "--use_cpu",
        "true",
        "--max_completion_length",
        "4",
    ]
    command.main([*shared, "--output_dir", "one", "--per_device_eval_batch_size", "2"])
    command.main(
        [
            *shared,
            "--output_dir",
            "two",
            "--num_generations",
            "2",
            "--temperature",
            "1",
            "--eval_samples",
            "5",
        ]
    )
    command.main(["--compare", "one/q", "two/q"])
    printed = capsys.readouterr().out
    assert "Mean pass@1" in printed
    assert (
        "On 5 paired problems two/q shows no difference (+0.0 points [-52.2, +52.2]) from one/q"
        in printed
    )
    assert printed.rstrip().endswith(
        "; by flexible extraction it shows no difference (+0.0 points [-52.2, +52.2]) from it (p = 1)."
    )
    assert "McNemar's exact test p = 1" in printed
    assert json.loads(Path("two/q/summary.json").read_text())["samples"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model_name_or_path", "{folder}", "--benchmarks", "none.jsonl", "--use_cpu", "true"],
            "none.jsonl does not exist",
        ),
        (
            ["--model_name_or_path", "./nowhere", "--use_cpu", "true"],
            "neither an existing path nor a hub id",
        ),
        (["--compare", "here", "there"], "give the output folder of an evaluation"),
        (
            ["--model_name_or_path", "{folder}", "--benchmarks", "{questions}"],
            "no GPU is visible; --use_cpu true runs without",
        ),
        (
            [
                "--model_name_or_path",
                "{folder}",
                "--benchmarks",
                "{questions}",
                "--use_cpu",
                "true",
                "--eval_samples",
                "0",
            ],
            "eval_samples=0",
        ),
        (
            [
                "--model_name_or_path",
                "{folder}",
                "--benchmarks",
                "{questions}",
                "--use_cpu",
                "true",
                "--num_generations",
                "3",
            ],
            "samples=3 with",
        ),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path, folder, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    questions = str(write_questions(tmp_path / "q.jsonl"))
    with pytest.raises(SystemExit) as exit_:
        command.main(
            [argument.format(folder=folder, questions=questions) for argument in arguments]
        )
    assert str(exit_.value).startswith("trl-learnalign evaluate: ")
    assert message in str(exit_.value)


def test_files_of_the_same_name_have_folders_of_their_own(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in (("amc23", 3), ("aime24", 2)):
        (tmp_path / name).mkdir()
        write_questions(tmp_path / name / "test.jsonl", count)
    files = ["amc23/test.jsonl", "aime24/test.jsonl"]
    command.main(
        [
            "--model_name_or_path",
            folder,
            "--benchmarks",
            *files,
            *["--use_cpu", "true", "--max_completion_length", "4", "--output_dir", "out"],
        ]
    )
    counts = {
        path.parent.name: json.loads(path.read_text())["problems"]
        for path in Path("out").glob("*/summary.json")
    }
    assert counts == {"amc23--test": 3, "aime24--test": 2}
    printed = capsys.readouterr().out
    assert "amc23--test" in printed
    assert "aime24--test" in printed


def test_folders_of_benchmarks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/x/test.jsonl", "b/x/test.jsonl", "x/test.json", "gsm8k.jsonl", "q.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert command.folder_names(["q.jsonl", "gsm8k", "math-ai/amc23"]) == {
        "q.jsonl": "q",
        "gsm8k": "gsm8k",
        "math-ai/amc23": "math-ai--amc23",
    }
    assert (
        command.folder_names(["a/x/test.jsonl", "b/x/test.jsonl"])["b/x/test.jsonl"] == "b--x--test"
    )
    many = ["a/x/test.jsonl", "b/x/test.jsonl", "x/test.json", "gsm8k", "gsm8k.jsonl"]
    assert len({name.lower() for name in command.folder_names(many).values()}) == len(many)
    for twice in (["q.jsonl", "./q.jsonl"], ["gsm8k", "GSM8K"], ["q.jsonl", "q.jsonl"]):
        with pytest.raises(ValueError, match="named twice"):
            command.folder_names(twice)


def test_the_recipe_is_the_command():
    recipe = cases.ROOT / "recipes" / "evaluate.py"
    done = subprocess.run(
        [sys.executable, str(recipe), "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: evaluate.py")
    assert "--compare FOLDER FOLDER" in done.stdout


def test_the_command_takes_a_reward_in_any_form(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "awaited_reward.py").write_text(
        "async def short(completions, completion_ids, trainer_state, log_extra, log_metric, answer, **_):\n"
        "    log_extra('answer', answer)\n"
        "    return [float(0 < len(ids) <= 4) for ids in completion_ids]\n"
    )
    questions = str(write_questions(tmp_path / "q.jsonl"))
    arguments = ["--model_name_or_path", folder, "--benchmarks", questions, "--use_cpu", "true"]
    arguments += ["--max_completion_length", "4", "--output_dir", "kept"]
    command.main([*arguments, "--reward_funcs", "awaited_reward:short"])
    assert json.loads(Path("kept/q/summary.json").read_text())["accuracy"] == 1.0
    record = json.loads(Path("kept/q/records.jsonl").read_text().splitlines()[0])
    assert set(record["completions"][0]) == {"text", "tokens", "finished"}

"""Bad inputs, and what each must get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pandas as pd
from datasets import Dataset, IterableDataset

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, plan_run
from trl_learnalign.data.loading import as_prompts, load_questions
from trl_learnalign.records.store import StoreError


@dataclass(frozen=True)
class Case:
    """An input, where it is found out, and what it gets.

    Args:
        area (`str`): What is bad.
        name (`str`): How it is bad.
        attempt (callable): Tries it in a folder; raises, or returns what came of it.
        error (`type`, *optional*): What it raises; `None`: the run goes on, and no score is missing or NaN.
        says (`str`): Part of the message, or of what came of it.
    """

    area: str
    name: str
    attempt: Callable[[Path], Any]
    error: type[Exception] | None
    says: str

    def __str__(self) -> str:
        return f"{self.area}: {self.name}"


def settings(**options: Any) -> LearnAlignConfig:
    return LearnAlignConfig(
        **{"warmup_samples": 0, "stages": [4], "shard_size": 4, "feature_dim": 64, **options}
    )


def plan(
    data: Any = None, rewards: Any = cases.accuracy_reward, config: Any = None, **options: Any
) -> Callable:
    """Everything that is checked without a model."""

    def attempt(folder: Path) -> None:
        args = cases.grpo_config(folder / "out", **options)
        plan_run(
            config() if config else settings(),
            args,
            cases.dataset(8) if data is None else data(),
            rewards,
        )
        raise AssertionError("accepted")

    return attempt


def add(data: Any = None, **options: Any) -> Callable:
    """What is checked when the callback is added."""

    def attempt(folder: Path) -> None:
        config = options.pop("config", settings)()
        trainer = cases.trainer(
            folder / "out", data=cases.dataset(8) if data is None else data(), **options
        )
        LearnAlignCallback(trainer, config)
        raise AssertionError("accepted")

    return attempt


def train(
    data: Any = None, reward: Any = cases.accuracy_reward, config: Any = None, **options: Any
) -> Callable:
    """A whole run; says what share of its prompts was learnable and selected."""

    def attempt(folder: Path) -> str:
        pool = cases.dataset(8) if data is None else data()
        trainer = cases.trainer(folder / "out", data=pool, rewards=reward, **options)
        trainer.add_callback(LearnAlignCallback(trainer, config() if config else settings()))
        trainer.train()
        assert all(np.isfinite(p.detach().numpy()).all() for p in trainer.model.parameters())
        table = pd.read_parquet(folder / "out" / "_learnalign" / "stage_1.parquet")
        assert len(table) == len(pool)
        assert np.isfinite(table["score"]).all()
        assert sorted(table["rank"]) == list(range(1, len(pool) + 1))
        learnable, selected = int((table["learnability"] > 0).sum()), int(table["selected"].sum())
        return f"runs; {selected} selected, {learnable} of {len(pool)} learnable"

    return attempt


def prompts(*values: Any) -> Callable[[], Dataset]:
    """A pool of eight prompts, the first ones replaced."""

    def make() -> Dataset:
        kept = cases.dataset(8)
        texts = kept["prompt"][:]
        if values and not isinstance(values[0], (str, type(None))):
            texts = [[{"role": "user", "content": text}] for text in texts]
        return Dataset.from_dict(
            {"prompt": [*values, *texts[len(values) :]], "solution": kept["solution"][:]}
        )

    return make


def scoring_reward(values: Callable[[int], Any]) -> Callable:
    """A reward that is odd while scoring and in training alike; `values(count)` for count completions."""

    def accuracy_reward(completions: list[Any], **_: Any) -> Any:
        return values(len(completions))

    return accuracy_reward


def wants_answer(completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
    return [float(right == text) for right, text in zip(answer, completions, strict=True)]


def cycle(*values: Any) -> Callable[[int], list[Any]]:
    return lambda count: [values[i % len(values)] for i in range(count)]


def fail(_: int) -> Any:
    raise OSError("the grader is gone")


def config(**options: Any) -> Callable[[Path], Any]:
    return lambda folder: LearnAlignConfig(**options)


def file(name: str, content: str) -> Callable[[Path], Any]:
    def attempt(folder: Path) -> Any:
        (folder / name).write_text(content)
        return as_prompts(load_questions(str(folder / name)))

    return attempt


def rows(**columns: Any) -> Callable[[Path], Any]:
    return lambda folder: as_prompts(Dataset.from_dict(columns))


PROOF = "By induction on the number of vertices; the base case is clear."


def some_unanswered(folder: Path) -> str:
    made = as_prompts(Dataset.from_dict({"question": ["1+1?", "2+2?"], "answer": ["#### 2", None]}))
    assert made["solution"][:] == ["2", ""]
    return "kept with a warning; rewards None, ranked last"


def a_file_in_the_way(folder: Path) -> None:
    (folder / "out").write_text("")
    trainer = cases.trainer(folder / "elsewhere")
    LearnAlignCallback(trainer, settings(record_dir=str(folder / "out" / "_learnalign")))


def damaged(how: Callable[[Path], None], **changes: Any) -> Callable[[Path], Any]:
    """A finished run's folder, damaged or used for another run."""

    def attempt(folder: Path) -> Any:
        train()(folder)
        how(folder / "out" / "_learnalign")
        return train(**changes)(folder)

    return attempt


def flip(folder: Path) -> None:
    path = next(folder.glob("stage_1/gradients/shard-00001-*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(folder: Path) -> None:
    path = next(folder.glob("stage_1/gradients/shard-00000-*"))
    path.write_bytes(path.read_bytes()[:100])


def missing(folder: Path) -> None:
    next(folder.glob("stage_1/gradients/shard-00001-*")).unlink()


def manifest(folder: Path) -> None:
    (folder / "stage_1" / "gradients" / "manifest.json").write_text("{")


def record(folder: Path) -> None:
    (folder / "run.json").write_text("not json")


def nothing(folder: Path) -> None:
    pass


def other_prompts() -> Dataset:
    return cases.dataset(8, conversational=True)


IMAGE = [{"role": "user", "content": [{"type": "image", "text": None}]}]
NO_ROLE = [{"content": "1+1?"}]
NAN, INF = float("nan"), float("inf")
V, T, S, R = ValueError, TypeError, StoreError, RuntimeError

CASES = [
    # Settings
    Case("settings", "fractions above 1", config(stages=[0.5, 0.6]), V, "add up to 1.1"),
    Case("settings", "fractions and counts", config(stages=[0.5, 100]), V, "mixes fractions"),
    Case("settings", "no stage", config(stages=[]), V, "stages=[] is empty"),
    Case("settings", "negative stage", config(stages=[-5]), V, "not a positive number"),
    Case("settings", "NaN stage", config(stages=[NAN]), V, "not a positive number"),
    Case("settings", "stage of text", config(stages="all"), V, "not a positive number"),
    Case(
        "settings",
        "passes of another number of stages",
        config(stage_epochs=[1, 2]),
        V,
        "for 3 stage(s)",
    ),
    Case("settings", "negative warm-up", config(warmup_samples=-1), V, "warmup_samples=-1"),
    Case("settings", "half a warm-up prompt", config(warmup_samples=2.5), V, "warmup_samples=2.5"),
    Case(
        "settings",
        "restart without warm-up",
        config(after_warmup="restart", warmup_samples=0),
        V,
        "no warm-up",
    ),
    Case("settings", "unknown word", config(reselect="some"), V, "'remaining', 'all'"),
    Case("settings", "switch as text", config(skip_forced_scoring="off"), V, "give true or false"),
    Case("settings", "number as text", config(success_threshold="high"), V, "give a number"),
    Case("settings", "threshold not a number", config(success_threshold=NAN), V, "give a number"),
    Case(
        "settings",
        "range of one number",
        config(success_range=[1]),
        V,
        "the lowest and the highest",
    ),
    Case("settings", "empty range", config(success_range=[1, 1]), V, "the lowest and the highest"),
    Case("settings", "folder as number", config(record_dir=3), V, "give a string"),
    Case("settings", "tiny feature dimension", config(feature_dim=2), V, "feature_dim=2"),
    Case(
        "settings",
        "selectors of another number of stages",
        config(selector=["random"] * 2),
        V,
        "one per stage",
    ),
    Case(
        "settings",
        "unknown selector",
        plan(config=lambda: settings(selector="best")),
        V,
        "choose one of",
    ),
    Case(
        "settings",
        "selector that cannot be imported",
        plan(config=lambda: settings(selector="no.such:f")),
        V,
        "no",
    ),
    Case(
        "settings",
        "history that is not there",
        plan(config=lambda: settings(selector="limr")),
        V,
        "reward_history",
    ),
    Case(
        "settings",
        "no validation set",
        plan(config=lambda: settings(selector="validation_alignment")),
        V,
        "needs a",
    ),
    # Trainer
    Case("trainer", "ignore_data_skip", plan(ignore_data_skip=True), V, "Leave it False"),
    Case("trainer", "max_steps", plan(max_steps=99), V, "leave max_steps at -1"),
    Case(
        "trainer",
        "unknown success reward",
        plan(config=lambda: settings(success_reward="x")),
        V,
        "is not a reward function of",
    ),
    Case(
        "trainer",
        "unclear success reward",
        plan(rewards=[cases.length_reward, cases.text]),
        V,
        "Name it with success_reward",
    ),
    Case(
        "trainer",
        "completions as long as the context",
        add(max_completion_length=128),
        V,
        "leaves no room",
    ),
    # Dataset
    Case("dataset", "a list", plan(lambda: ["1+1?"]), T, "datasets.Dataset"),
    Case(
        "dataset",
        "a stream",
        plan(lambda: IterableDataset.from_generator(lambda: iter([]))),
        T,
        "materialise",
    ),
    Case(
        "dataset",
        "empty",
        plan(lambda: cases.dataset(8).select([])),
        V,
        "training dataset is empty",
    ),
    Case(
        "dataset",
        "smaller than a generation",
        plan(lambda: cases.dataset(1)),
        V,
        "enlarge the pool",
    ),
    Case(
        "dataset", "fewer prompts than wanted", plan(lambda: cases.dataset(3)), V, "the pool has 3"
    ),
    Case(
        "dataset",
        "no prompt column",
        plan(lambda: Dataset.from_dict({"q": ["a"] * 8})),
        V,
        "rename_column",
    ),
    Case(
        "dataset",
        "image column",
        plan(lambda: cases.dataset(8).add_column("image", [None] * 8)),
        V,
        "needs gradients, which cannot be captured for images",
    ),
    # Prompts
    Case("prompt", "None", plan(prompts(None)), V, "row 0 (row 0 is None)"),
    Case("prompt", "empty", plan(prompts("a?", "")), V, "(row 1 is empty)"),
    Case("prompt", "blank", plan(prompts("a?", " \n\t")), V, "(row 1 is empty)"),
    Case("prompt", "conversation without messages", plan(prompts([])), V, "without messages"),
    Case(
        "prompt",
        "conversation of empty text",
        plan(prompts([{"role": "user", "content": ""}])),
        V,
        "has no question",
    ),
    Case(
        "prompt",
        "system message alone",
        plan(prompts([{"role": "system", "content": "x"}])),
        V,
        "has no question",
    ),
    Case(
        "prompt",
        "message of None",
        plan(prompts([{"role": "user", "content": None}])),
        V,
        "without text",
    ),
    Case("prompt", "message without role", plan(prompts(NO_ROLE)), V, "without a role"),
    Case(
        "prompt",
        "image part",
        plan(lambda: Dataset.from_dict({"prompt": [IMAGE] * 8})),
        V,
        "not supported",
    ),
    Case(
        "prompt",
        "list of strings",
        plan(lambda: Dataset.from_dict({"prompt": [["a?"]] * 8})),
        V,
        "list of strings",
    ),
    Case("prompt", "a number", plan(lambda: Dataset.from_dict({"prompt": [1] * 8})), V, "is a int"),
    Case(
        "prompt",
        "longer than the context",
        add(prompts("a" * 500)),
        V,
        "more than 122 tokens: row 0",
    ),
    Case("prompt", "duplicates", train(prompts("a?", "a?", "a?")), None, "4 selected"),
    Case(
        "prompt",
        "unicode, control and bidirectional characters",
        train(prompts("\u202e☃é\x00", "🧮")),
        None,
        "runs",
    ),
    Case(
        "prompt",
        "markup",
        train(prompts("<script>alert(1)</script>", "[bold]{{ x }}")),
        None,
        "runs",
    ),
    Case(
        "prompt",
        "conversations",
        train(lambda: cases.dataset(8, conversational=True)),
        None,
        "4 selected",
    ),
    Case("prompt", "as long as the context allows", train(prompts("a" * 122)), None, "runs"),
    # Answers
    Case(
        "answer",
        "none at all",
        rows(question=["1?"], answer=[None]),
        V,
        "No row of the dataset has an answer",
    ),
    Case("answer", "one missing", some_unanswered, None, "ranked last"),
    Case("answer", "no answer column", rows(question=["1?"]), V, "it needs a question"),
    Case("answer", "no question column", rows(text=["1?"], answer=["1"]), V, "rename them in code"),
    Case(
        "answer",
        "proofs",
        rows(question=["1?", "2?"], answer=[PROOF, PROOF]),
        V,
        "text rather than a final answer",
    ),
    Case(
        "answer",
        "programs with tests",
        rows(prompt=["1?"], test_list=[["assert f(1)"]]),
        V,
        "contain programs or unit tests",
    ),
    # Files
    Case(
        "file",
        "not there",
        lambda _: load_questions("no.jsonl"),
        FileNotFoundError,
        "does not exist",
    ),
    Case("file", "unknown ending", file("a.txt", "1"), V, "unsupported ending"),
    Case("file", "broken JSON", file("a.jsonl", '{"question": "1'), V, "cannot be read"),
    Case("file", "empty", file("a.jsonl", ""), V, "cannot be read"),
    # Rewards
    Case("reward", "raises", train(reward=scoring_reward(fail)), R, "A reward function failed"),
    Case(
        "reward",
        "asks for a column that is not there",
        train(reward=wants_answer),
        R,
        "'answer'). It gets prompts, completions and the other columns ['solution'] as keywords",
    ),
    Case(
        "reward",
        "too few values",
        train(reward=scoring_reward(lambda n: [1.0] * (n - 1))),
        R,
        "A reward function",
    ),
    Case(
        "reward",
        "too many values",
        train(reward=scoring_reward(lambda n: [1.0] * (n + 1))),
        R,
        "A reward function",
    ),
    Case(
        "reward",
        "None instead of a list",
        train(reward=scoring_reward(lambda n: None)),
        R,
        "A reward function",
    ),
    Case(
        "reward",
        "texts",
        train(reward=scoring_reward(cycle("right", "wrong"))),
        R,
        "A reward function failed",
    ),
    Case("reward", "all None", train(reward=scoring_reward(cycle(None))), None, "0 of 8 learnable"),
    Case(
        "reward",
        "one None",
        train(reward=scoring_reward(cycle(1.0, None, 0.0, 0.0))),
        None,
        "8 of 8 learnable",
    ),
    Case("reward", "NaN", train(reward=scoring_reward(cycle(NAN))), None, "0 of 8 learnable"),
    Case(
        "reward",
        "one NaN",
        train(reward=scoring_reward(cycle(1.0, NAN, 0.0, 0.0))),
        None,
        "8 of 8 learnable",
    ),
    Case("reward", "all right", train(reward=scoring_reward(cycle(1.0))), None, "0 of 8 learnable"),
    Case("reward", "all wrong", train(reward=scoring_reward(cycle(0.0))), None, "0 of 8 learnable"),
    Case(
        "reward",
        "negative",
        train(reward=scoring_reward(cycle(-1.0, 1.0))),
        None,
        "8 of 8 learnable",
    ),
    Case(
        "reward",
        "beyond 0 and 1",
        train(reward=scoring_reward(cycle(7.5, 0.3, 0.0, -2.0))),
        None,
        "8 of 8 learn",
    ),
    Case(
        "reward",
        "truth values",
        train(reward=scoring_reward(cycle(True, False))),
        None,
        "8 of 8 learnable",
    ),
    # Folders
    Case("folder", "a file in the way", a_file_in_the_way, S, "is a file. Choose another"),
    Case("folder", "flipped bit in a shard", damaged(flip), S, "is damaged"),
    Case("folder", "truncated shard", damaged(truncate), S, "is damaged"),
    Case("folder", "lost shard", damaged(missing), None, "4 selected"),
    Case("folder", "broken manifest", damaged(manifest), S, "its manifest.json cannot be read"),
    Case("folder", "broken run.json", damaged(record), S, "run.json cannot be read"),
    Case(
        "folder",
        "other seed",
        damaged(nothing, config=lambda: settings(selection_seed=1)),
        S,
        "selection_seed was",
    ),
    Case("folder", "other dataset", damaged(nothing, data=other_prompts), S, "dataset was"),
    Case(
        "folder",
        "other weights",
        damaged(nothing, policy=cases.model(seed=1)),
        S,
        "weights: the folder has",
    ),
]


def outcome(case: Case, folder: Path) -> str:
    """What a case got, in one line; fails if it is not what it must get."""
    try:
        found = case.attempt(folder)
    except Exception as error:
        if case.error is None or not isinstance(error, case.error):
            raise
        message = " ".join(str(error).replace(str(folder), "").split())
        assert case.says in message, message
        return f"{type(error).__name__}: {message}"
    assert case.error is None, f"went on: {found}"
    assert case.says in str(found), found
    return str(found)

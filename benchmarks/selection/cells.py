"""One cell of the selection table: choose N prompts with one selector, train on them, measure held-out accuracy.

Every cell trains the same base model with an unmodified `GRPOTrainer` on an explicit list of prompts, and is evaluated
greedily on the same held-out tasks. What selectors need (warmed-up policy, rollouts, gradients, likelihoods, …) is
measured once for each pool and shared by all of them; what it cost is charged to those that need it.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, plan
from trl_learnalign.adaptive.belief import Belief
from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.requires import mean_completion_lengths, tokens_seen
from trl_learnalign.data.prompts import dataset_digest
from trl_learnalign.evaluation.grading import grade
from trl_learnalign.evaluation.held_out import complete_greedily
from trl_learnalign.measuring.base import Context
from trl_learnalign.measuring.embeddings import features_of_prompts
from trl_learnalign.measuring.stage import Prior, StageMeasurer
from trl_learnalign.records.notes import SCORING_ACCOUNT, TRAINING_ACCOUNT, Cost, TrainingMeter
from trl_learnalign.records.store import write_atomically, write_json
from trl_learnalign.selectors import SELECTORS
from trl_learnalign.toy.model import CHECKPOINTING, MAX_COMPLETION_LENGTH, make_base_model
from trl_learnalign.toy.tasks import accuracy_reward, build_pool

COVERING = ("learnalign_coverage", "learnalign_logdet")
"""Choices that cover the pool's signal."""

BUDGETED = {f"{name}_budget": name for name in COVERING}
"""The same within a rollout budget."""

BUDGET = {"rollout_budget": 0.4}
"""Settings of that budget; the others at their defaults, which were chosen on development tasks."""

POLICY_SELECTORS = (
    "token_length",
    "ppl_top",
    "ppl_middle",
    "ifd",
    "learnability",
    "alignment",
    "feature_similarity",
    "learnalign",
    *COVERING,
)
"""Measured together with the warmed-up policy."""

UNTRAINED, FULL, STAGED, NO_WARMUP = "base", "full", "staged", "learnalign_no_warmup"
STEPS, COMPUTE, PASS = "steps", "compute", "pass"
STAGES = (0.5, 0.3, 0.2)

RESULTS_FOLDER = Path(__file__).parents[2] / "docs" / "results"
COVERING_RESULTS = RESULTS_FOLDER / "covering_table.parquet"
"""Cells of the choices that cover, of later than the others and begun with the published base model."""

PUBLISHED_BASE = RESULTS_FOLDER / "base_model"
"""The base model's weights; `base_model.json` beside it has their digest and what they score untrained."""


@dataclass(frozen=True)
class Settings:
    """What all cells share; decided once, on the development tasks.

    Args:
        pool (`int`): Prompts of a pool.
        held_out (`int`): Tasks of the evaluation.
        warmup (`int`): Prompts of the warm-up, trained on once.
        prompts_per_step (`int`): Prompts of an optimizer step.
        rollouts (`int`): G.
        steps (`int`): Optimizer steps of a cell at equal steps.
        learning_rate (`float`): Constant learning rate.
        history_passes (`int`): Passes of the run whose rewards `limr` reads.
        history_prompts (`int`): Prompts of an optimizer step of that run.
        feature_dim (`int`): d.
    """

    pool: int = 2000
    held_out: int = 500
    warmup: int = 80
    prompts_per_step: int = 16
    rollouts: int = 8
    steps: int = 34
    learning_rate: float = 2e-4
    history_passes: int = 3
    history_prompts: int = 64
    feature_dim: int = 8192


@dataclass(frozen=True, order=True)
class Cell:
    """One training run.

    Args:
        regime (`str`): Mixture of the pool.
        selector (`str`): How its prompts are chosen, or one of `base`, `full`, `staged`.
        n (`int`): Prompts chosen.
        seed (`int`): Seed of pool, selection and training.
        budget (`str`): `"steps"`: as many optimizer steps as all; `"compute"`: as much total compute as LearnAlign
            takes, selecting included; `"pass"`: once over the whole pool after the warm-up.
    """

    regime: str
    selector: str
    n: int
    seed: int
    budget: str = STEPS

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies it in the table."""
        return self.regime, self.selector, self.n, self.seed, self.budget


class Counting(TrainerCallback):
    """Keeps the ledger of a stock trainer's run."""

    def __init__(self, trainer: GRPOTrainer):
        self.trainer = trainer
        self.meter = TrainingMeter(trainer.args.generation_batch_size)
        self.meter.begin(0)
        self.cost = Cost()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.add_step(mean_completion_lengths(self.trainer))
        self.cost = self.meter.cost(tokens_seen(self.trainer))


@cache
def tasks(regime: str, size: int, seed: int, split: str) -> Dataset:
    """A pool, or the tasks of an evaluation."""
    return build_pool(regime, size, seed, split)


def trainer_args(
    settings: Settings, folder: Path, seed: int, prompts_per_step: int, steps: int
) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=prompts_per_step * settings.rollouts,
        num_generations=settings.rollouts,
        max_steps=steps,
        shuffle_dataset=False,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        max_completion_length=MAX_COMPLETION_LENGTH,
        per_device_eval_batch_size=500,
        use_cpu=True,
        bf16=False,
        **{CHECKPOINTING: False},
        save_strategy="no",
        logging_steps=10**6,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
    )


def train(
    settings: Settings,
    model: Path,
    pool: Dataset,
    order: np.ndarray,
    folder: Path,
    seed: int,
    prompts_per_step: int | None = None,
    reward: Callable[..., list[float]] = accuracy_reward,
) -> tuple[GRPOTrainer, Cost]:
    """Train on prompts in the given order with an unmodified trainer; whole steps only.

    Args:
        settings (`Settings`): Settings.
        model (`Path`): Where to start.
        pool (`Dataset`): The pool.
        order (`np.ndarray`): Rows of it, one after the other; empty: nothing is trained.
        folder (`Path`): The trainer's output folder.
        seed (`int`): Seed of the rollouts.
        prompts_per_step (`int`, *optional*): Another number than the settings'.
        reward (callable): Reward function.
    """
    size = prompts_per_step or settings.prompts_per_step
    steps = len(order) // size
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    trainer = GRPOTrainer(
        model=str(model),
        reward_funcs=reward,
        args=trainer_args(settings, folder, seed, size, max(1, steps)),
        train_dataset=pool.select(order[: steps * size]) if steps else pool,
    )
    trainer.remove_callback(PrinterCallback)
    counting = Counting(trainer)
    trainer.add_callback(counting)
    if steps:
        trainer.train()
    return trainer, counting.cost


def graded(trainer: GRPOTrainer, held_out: Dataset) -> np.ndarray:
    """Grades of greedy answers to held-out tasks, 0 or 1 each."""
    rows = list(held_out)
    with preserve_trainer_state(trainer):
        completions = complete_greedily(trainer, [row["prompt"] for row in rows])
    texts = [completion.text for completion in completions]
    ids = [completion.ids for completion in completions]
    return np.array(grade(accuracy_reward, rows, texts, ids))


def evaluate(trainer: GRPOTrainer, held_out: Dataset) -> dict[str, Any]:
    """Greedy accuracy, over all and by family."""
    rows, right = list(held_out), graded(trainer, held_out)
    families = defaultdict(list)
    for row, value in zip(rows, right, strict=True):
        families[row["family"]].append(value)
    by_family = {
        name: round(float(np.mean(values)), 4) for name, values in sorted(families.items())
    }
    return {
        "accuracy": float(right.mean()),
        "n_eval": len(rows),
        "family_accuracy": json.dumps(by_family),
    }


def weights_sha256(model: Path) -> str:
    """SHA-256 of a checkpoint folder's weights file."""
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def published_base_model(folder: Path = PUBLISHED_BASE) -> Path:
    """The published base model.

    Raises:
        `ValueError`: If its weights are not those of the digest, or the toy model has changed since.
    """
    wanted = json.loads(folder.with_suffix(".json").read_text())["sha256"]
    found = weights_sha256(folder)
    if found != wanted:
        raise ValueError(
            f"{folder / 'model.safetensors'} has the digest {found}, and {folder.with_suffix('.json').name} names "
            f"{wanted}: restore both from the repository, or train a base model with --train_base."
        )
    return make_base_model(folder)  # it is there: this compares the settings


class Bench:
    """Runs cells; everything that is shared lies in a folder, so that an interrupted run finds it again.

    Args:
        settings (`Settings`): Settings.
        folder (`Path`): Where base model and measurements are kept.
        base_settings (`dict`, *optional*): Train a base model of these settings in the folder (`{}`: the quickstart's)
            instead of taking the published weights.
        budget (`dict`, *optional*): Settings of the rollout budget.

    Raises:
        `ValueError`: On first use of the base model, if what lies in the folder was measured with another one.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        base_settings: dict[str, int] | None = None,
        budget: Mapping[str, Any] = BUDGET,
    ):
        self.settings = settings
        self.folder = folder
        self.base_settings = base_settings
        self.budget = budget

    @cached_property
    def base_model(self) -> Path:
        """The base model: the published one, or trained on first use."""
        trained = self.folder / "base_model"
        if self.base_settings is None:
            model = published_base_model()
        else:
            model = make_base_model(trained, **self.base_settings)
        mark, digest = self.folder / "base_model.sha256", weights_sha256(model)
        before = digest
        if mark.exists():
            before = mark.read_text().strip()
        elif trained.exists():  # measured before there were published weights
            before = weights_sha256(trained)
        if before != digest:
            raise ValueError(
                f"{self.folder} holds measurements of a base model with the digest {before}, and this one has "
                f"{digest}: name another folder with --work, or move or delete that one."
            )
        write_atomically(mark, digest.encode())
        return model

    def pool(self, cell: Cell) -> Dataset:
        """The pool of a cell."""
        return tasks(cell.regime, self.settings.pool, cell.seed, "train")

    def run(self, cell: Cell, split: str = "heldout") -> dict[str, Any]:
        """Run a cell.

        Args:
            cell (`Cell`): The cell.
            split (`str`): `"heldout"`, or `"dev"` to choose settings by.

        Returns:
            `dict`: A row of the table.
        """
        started = time.perf_counter()
        held_out = tasks(cell.regime, self.settings.held_out, 0, split)
        scratch = self.folder / "scratch" / "-".join(map(str, cell.key))
        if cell.selector == STAGED:
            trainer, steps, selecting, training = self._run_staged(cell, scratch)
            rows = np.arange(self.settings.pool)
        else:
            model = self.base_model
            if cell.budget == PASS:  # like the staged run it goes on from the warmed-up policy
                model, selecting = self.warmed_up(cell), self._warmup_cost(cell)
                # As many steps as the stages of 50 / 30 / 20 % take, each rounded up.
                rows = np.arange(self.settings.pool)
                steps = sum(
                    math.ceil(share * len(rows) / self.settings.prompts_per_step)
                    for share in STAGES
                )
            else:
                rows, selecting = self.choose(cell)
                steps = self._steps(cell, selecting)
            wanted = steps * self.settings.prompts_per_step
            order = (
                plan.training_order(cell.seed, "stage_1", rows, 0, wanted) if wanted else rows[:0]
            )
            trainer, training = train(
                self.settings, model, self.pool(cell), order, scratch, cell.seed
            )
        found = evaluate(trainer, held_out)
        shutil.rmtree(scratch, ignore_errors=True)
        chosen = self.pool(cell).select(rows)
        return {
            **asdict(cell),
            **found,
            "steps": steps,
            **asdict(training),
            **{f"selecting_{name}": value for name, value in asdict(selecting).items()},
            "compute": (selecting + training).forward_equivalents,
            "families": json.dumps(dict(sorted(Counter(chosen["family"]).items())))
            if cell.n
            else "{}",
            "cell_seconds": time.perf_counter() - started,
        }

    def _steps(self, cell: Cell, selecting: Cost) -> int:
        if cell.selector == UNTRAINED:
            return 0
        if cell.budget == STEPS:
            return self.settings.steps
        # What LearnAlign's warm-up and scoring cost more, in steps; all steps have equally many rollouts.
        warmup_steps = self.settings.warmup // self.settings.prompts_per_step
        per_step = self._warmup_cost(cell).forward_equivalents / warmup_steps
        wanted = self._costs(cell, "policy")["learnalign"].forward_equivalents
        left = wanted - selecting.forward_equivalents
        return self.settings.steps + math.ceil(left / per_step)

    def choose(self, cell: Cell) -> tuple[np.ndarray, Cost]:
        """Rows of the pool that a cell trains on, and what choosing them cost."""
        if cell.selector in (UNTRAINED, FULL):
            return np.arange(self.settings.pool), Cost()
        if cell.selector == "random":
            ranked = plan.tie_order(cell.seed, "random selection", self.settings.pool)
            return np.sort(np.argsort(ranked)[: cell.n]), Cost()
        groups = {"selectit": "ratings", "limr": "history", NO_WARMUP: "untrained"}
        groups |= dict.fromkeys(BUDGETED, "budget")
        group = groups.get(cell.selector, "policy")
        self._measure(cell, group)
        rankings = pd.read_parquet(self._place(cell) / f"{group}.parquet")
        columns = {NO_WARMUP: "learnalign", **BUDGETED}
        column = columns.get(cell.selector, cell.selector)
        return np.sort(rankings[column].to_numpy()[: cell.n]), self._costs(cell, group)[column]

    # ---- What cells share -------------------------------------------------------------------------------------------

    def _place(self, cell: Cell) -> Path:
        return self.folder / f"{cell.regime}-{cell.seed}"

    def _costs(self, cell: Cell, group: str) -> dict[str, Cost]:
        self._measure(cell, group)
        found = json.loads((self._place(cell) / f"{group}.json").read_text())
        return {name: Cost(**entry) for name, entry in found.items()}

    def warmed_up(self, cell: Cell) -> Path:
        """The policy after the warm-up."""
        place = self._place(cell) / "warmed_up"
        if not (place / "cost.json").exists():
            pool = self.pool(cell)
            chosen = plan.warmup_pool(cell.seed, len(pool), self.settings.warmup)
            order = plan.training_order(cell.seed, "warmup", chosen, 0, self.settings.warmup)
            trainer, cost = train(
                self.settings, self.base_model, pool, order, place / "scratch", cell.seed
            )
            trainer.save_model(str(place))
            write_json(place / "cost.json", asdict(cost))
        return place

    def _warmup_cost(self, cell: Cell) -> Cost:
        return Cost(**json.loads((self.warmed_up(cell) / "cost.json").read_text()))

    def _measure(self, cell: Cell, group: str) -> None:
        """Rankings of a group of selectors (rows of the pool, best first) and what each of them cost."""
        place = self._place(cell)
        if (place / f"{group}.json").exists():
            return
        names: Sequence[str] = {
            "policy": POLICY_SELECTORS,
            "untrained": ("learnalign",),
            "ratings": ("selectit",),
            "history": ("limr",),
            "budget": COVERING,
        }[group]
        config = LearnAlignConfig(
            selection_seed=cell.seed,
            zero_learnability="by_score",  # the letter of Eq. 9, by which the published table was made
            feature_dim=self.settings.feature_dim,
            shard_size=250,
            text_batch_size=250,
            keep_features=True,
        )
        cost = Cost()
        if group == "history":
            cost, config = self._record_history(cell, config)
        model, prior = self.base_model, None
        if group in ("policy", "ratings", "budget"):
            model, cost = self.warmed_up(cell), self._warmup_cost(cell)
        if group == "budget":
            config = replace(config, **self.budget)
            prior, reading = self._prior(cell, config, place / group)
            cost = cost + reading
        trainer, _ = train(
            self.settings,
            model,
            self.pool(cell),
            np.empty(0, dtype=np.int64),
            place / group,
            cell.seed,
        )
        context = Context.of(trainer, config, scoring_batch_prompts=125)
        digest = dataset_digest(trainer.train_dataset)
        scorer = StageMeasurer(context, place / group, digest, prior=prior)
        everything = np.arange(self.settings.pool)
        selectors = [SELECTORS[name] for name in names]
        scorer.measure("stage_1", 0, everything, selectors)
        rankings, costs = {}, {}
        for selector in selectors:
            # Found on disk: this tells what the selector alone needs, and what that cost.
            pool, report = scorer.measure("stage_1", 0, everything, [selector])
            rankings[selector.name] = pool.prompts[scorer.rank(pool, selector).order]
            reads_policy = selector.name != "token_length"
            costs[selector.name] = report.cost(0) + (cost if reads_policy else Cost())
            if selector.name == "learnalign":
                statistics = {"success_rate": pool.success_rate, "learnability": pool.learnability}
                table = pd.DataFrame({**statistics, "family": trainer.train_dataset["family"]})
                write_atomically(place / f"{group}_pool.parquet", table.to_parquet())
        write_atomically(place / f"{group}.parquet", pd.DataFrame(rankings).to_parquet())
        write_json(place / f"{group}.json", {name: asdict(entry) for name, entry in costs.items()})
        shutil.rmtree(place / group)  # gradients of a whole pool are 64 MB

    def _prior(self, cell: Cell, config: LearnAlignConfig, folder: Path) -> tuple[Prior, Cost]:
        """What is believed before scoring: what tells prompts apart, and nothing of their rollouts."""
        nothing = np.empty(0, dtype=np.int64)
        reader, _ = train(
            self.settings,
            self.base_model,
            self.pool(cell),
            nothing,
            folder / "reader",
            cell.seed,
        )
        features = features_of_prompts(Context.of(reader, config), folder, "pool")
        belief = Belief(features.values, config)
        return lambda step: belief, Cost(tokens_forward=features.tokens)

    def _record_history(
        self, cell: Cell, config: LearnAlignConfig
    ) -> tuple[Cost, LearnAlignConfig]:
        """Train over the whole pool a few times and note how often each prompt was solved in each pass."""
        settings, path = self.settings, self._place(cell) / "reward_history.json"
        pool = self.pool(cell)
        pool = pool.add_column("row", np.arange(len(pool)))
        seen: dict[int, list[float]] = defaultdict(list)

        def accuracy(
            completions: list[Any], answer: list[str], row: list[int], **_: Any
        ) -> list[float]:
            values = accuracy_reward(completions, answer)
            for number, value in zip(row, values, strict=True):
                seen[number].append(value)
            return values

        wanted = (
            math.ceil(settings.history_passes * len(pool) / settings.history_prompts)
            * settings.history_prompts
        )
        order = plan.training_order(cell.seed, "history", np.arange(len(pool)), 0, wanted)
        _, cost = train(
            settings,
            self.base_model,
            pool,
            order,
            self._place(cell) / "history_scratch",
            cell.seed,
            settings.history_prompts,
            accuracy,
        )
        shape = settings.history_passes, settings.rollouts
        rates = [
            np.reshape(seen[row][: math.prod(shape)], shape).mean(axis=1)
            for row in range(len(pool))
        ]
        path.write_text(json.dumps({row: rate.tolist() for row, rate in enumerate(rates)}))
        return cost, replace(config, reward_history=str(path))

    def _run_staged(self, cell: Cell, scratch: Path) -> tuple[GRPOTrainer, int, Cost, Cost]:
        """Warm-up, then 50 / 30 / 20 % of the pool, each stage selected by the policy as it is then."""
        settings = self.settings
        shutil.rmtree(scratch, ignore_errors=True)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        args = trainer_args(settings, scratch, cell.seed, settings.prompts_per_step, -1)
        trainer = GRPOTrainer(
            model=str(self.base_model),
            reward_funcs=accuracy_reward,
            args=args,
            train_dataset=self.pool(cell),
        )
        trainer.remove_callback(PrinterCallback)
        config = LearnAlignConfig(
            warmup_samples=settings.warmup,
            stages=list(STAGES),
            skip_forced_scoring=True,
            zero_learnability="by_score",
            feature_dim=settings.feature_dim,
            selection_seed=cell.seed,
            shard_size=250,
            scoring_batch_prompts=125,
        )
        callback = LearnAlignCallback(trainer, config)
        trainer.add_callback(callback)
        trainer.train()
        ledger = callback.record.contents.ledger.entries
        selecting = ledger[plan.WARMUP][TRAINING_ACCOUNT]
        training = Cost()
        for phase in callback.plan.stages:
            costs = ledger[phase.name]
            training += costs[TRAINING_ACCOUNT]
            selecting += costs.get(SCORING_ACCOUNT, Cost())
        return trainer, sum(phase.steps for phase in callback.plan.stages), selecting, training

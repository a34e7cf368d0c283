"""Selection as a separate job: warm-up, scoring and selection, without training.

One scoring pass serves any number of selectors and sizes, and measurements stay on disk. Another size, or another
selector that needs no new measurement, takes seconds. A selector that needs a new measurement loads the warmed-up
policy from its checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from trl_learnalign.bridge.objective import extra_forwards
from trl_learnalign.bridge.policy import weights_digest
from trl_learnalign.config.fields import as_list, at_least, each, selector_names, setting
from trl_learnalign.config.learnalign import LearnAlignConfig
from trl_learnalign.diversity import breadth
from trl_learnalign.measuring.stage import ROLLED_OUT
from trl_learnalign.plan import WARMUP, Plan, warmup_plan
from trl_learnalign.preflight.forecast import scored_prompts
from trl_learnalign.ranking import (
    FileRows,
    Ranking,
    Selection,
    overlaps,
    rank_correlations,
    subset_of,
)
from trl_learnalign.records import layout
from trl_learnalign.records.layout import CORRELATIONS, OVERLAPS, SUBSETS
from trl_learnalign.records.notes import SCORING, MeasuresNote, PolicyNote, ScoringEntry, SubsetNote
from trl_learnalign.records.run_record import RunContents, RunRecord, check_recorded
from trl_learnalign.records.store import write_atomically, write_table
from trl_learnalign.selectors import Selector, combined
from trl_learnalign.training.callback import RunCallback
from trl_learnalign.training.checkpoints import last_complete_checkpoint, report_interruption
from trl_learnalign.training.metrics import (
    scoring_line,
    shares_of_choice,
    warn_of_narrow,
    warn_of_shortfall,
)
from trl_learnalign.training.run import finished_run, measurer_of
from trl_learnalign.training.setup import RunIdentity, RunSetup, set_up, warmup_identity
from trl_learnalign.training.state import planned_state

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

STAGE_NAME = "stage_1"  # first-stage seeds: the same rollouts as a training run's scoring


@dataclass
class SubsetConfig(LearnAlignConfig):
    """Settings of a selection without training; settings of stages have no effect.

    Raises:
        `ValueError`: At construction, if a value is invalid, naming the value and the remedy.
    """

    SECTIONS: ClassVar[dict[str, str]] = {
        **LearnAlignConfig.SECTIONS,
        "top": "Subsets: their sizes and where they are written",
    }

    warmup_samples: Annotated[int, at_least(0)] = setting(
        0,
        "Prompts of a warm-up before scoring: a seeded random subset that is trained on. 0: none.",
    )
    selector: Annotated[str | list[str], selector_names("give one name, or several")] = setting(
        ["learnalign_coverage"],
        "How prompts are ranked: names in `trl_learnalign.selectors.SELECTORS`, or your own functions "
        "(pool) -> scores as 'package.module:function'. All of them rank the same pool.",
    )
    top: Annotated[list[int] | None, each(at_least(1))] = setting(
        None,
        "Sizes of the subsets, e.g. 100 500 1000 2000: nested, from one scoring pass. Default: stages, if they "
        "are counts.",
    )
    push_to_hub_id: str | None = setting(
        None,
        "Push the subsets to this dataset repository of the hub, as configurations <selector>_top_<N>.",
    )

    def __post_init__(self) -> None:
        asked = _counts(self.stages) if self.top is None else self.top
        if asked == []:
            raise ValueError(
                "The number of prompts to select is missing: give it with top, e.g. top=[1000]."
            )
        sizes = each(at_least(1))("top", asked)
        self.top = sorted(set(sizes))
        self.stages, self.stage_epochs, self.stage_steps = [max(2, self.top[-1])], [1], None
        self.after_warmup = "continue"  # no phase follows the warm-up
        super().__post_init__()

    def _match_selectors(self) -> None:
        names = list(dict.fromkeys(as_list(self.selector)))
        self.selector = names[0] if len(names) == 1 else names

    @property
    def selectors(self) -> list[str]:
        """Names of the selectors; all rank the same pool."""
        return as_list(self.selector)

    @property
    def sizes(self) -> list[int]:
        """Sizes of the subsets, ascending."""
        return as_list(self.top)


def _counts(stages: Any) -> list[Any]:
    """Return the values of `stages` that are counts; other values are no sizes."""
    return [value for value in as_list(stages) if isinstance(value, (int, float)) and value > 1]


class WarmupCallback(RunCallback):
    """The hooks of a run that ends with its warm-up, for the selection that follows.

    Args:
        setup (`RunSetup`): The assembled run.
        base_weights (`str`): Digest of the trainable weights before the warm-up.
    """

    def __init__(self, setup: RunSetup, base_weights: str):
        super().__init__(setup)
        self._base_weights = base_weights

    @override
    def identify(self) -> RunIdentity:
        return warmup_identity(super().identify(), self.setup, self._base_weights)

    def take_up(self, identity: RunIdentity, found: RunContents, policy: PolicyNote) -> None:
        """Take up a run whose warm-up has ended in an earlier call.

        Args:
            identity (`RunIdentity`): Its identity.
            found (`RunContents`): Its record.
            policy (`PolicyNote`): Its policy.
        """
        known = found, policy.step, policy.scoring_batch_prompts
        self.runs = [finished_run(self.setup, identity, self.additions, *known)]


class SubsetSelection(TrainerCallback):
    """Warms up, scores the pool and ranks it, and does not train further.

    The warm-up is that of a [`LearnAlignCallback`] run whose plan ends with it.

    Args:
        trainer (`GRPOTrainer`): A new trainer.
        config (`SubsetConfig`): Settings.
        validation_dataset (`datasets.Dataset`, *optional*): As in [`LearnAlignCallback`].
        originals (`FileRows`, *optional*): The rows from which the prompts were made; subsets consist of these rows.

    Raises:
        `ValueError`, `TypeError`: If dataset, settings and rewards do not fit together; before any rollout.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        config: SubsetConfig,
        validation_dataset: Any = None,
        originals: FileRows | None = None,
    ):
        self.originals = originals
        check_sizes(config, len(trainer.train_dataset))
        self.trainer, self.config = trainer, config
        self.setup = set_up(trainer, config, validation_dataset, plan_maker=warmup_plan)
        self.selectors = self.setup.selectors
        check_budget(config, self.selectors)
        self.warmup = WarmupCallback(self.setup, weights_digest(trainer))
        self.folder, self.ranks = self.setup.folder, self.setup.ranks
        self.rankings: list[Ranking] = []
        self.scoring = ScoringEntry.of({})
        self._step = 0
        self._is_scoring = False

    @property
    def record(self) -> RunRecord:
        """The record of the run whose policy ranks; there is one after [`run`]."""
        return self.warmup.record

    @property
    def plan(self) -> Plan:
        """The plan of the warm-up."""
        return self.setup.plan

    @property
    def is_scoring(self) -> bool:
        """Whether current rollouts are made to score prompts and not to train on them."""
        return self._is_scoring

    def run(self) -> list[Ranking]:
        """Make the missing measurements, and rank; collective over all ranks.

        Returns:
            `list[Ranking]`: One for each selector, in the order of the settings.

        Raises:
            `StoreError`: If the record folder belongs to another run.
        """
        identity = self.warmup.identify()
        found = self.ranks.from_main(check_recorded(self.folder, identity.entries))
        policy = None if found is None else found.note(WARMUP, PolicyNote)  # of an earlier call
        if found is not None and policy is not None and self._is_measured(identity, policy):
            logger.info("All measurements exist already: nothing is rolled out or trained.")
            self.warmup.take_up(identity, found, policy)
            self._rank(policy.step, policy.weights)
            return self.rankings
        for callback in (self.warmup, self):
            if (
                callback not in self.trainer.callback_handler.callbacks
            ):  # run() was interrupted and is called again
                self.trainer.add_callback(callback)
        if not self.setup.plan.total_steps:
            # With no steps, the trainer only prepares the model.
            self.trainer.args.num_train_epochs = 0
        checkpoint = last_complete_checkpoint(self.trainer.args.output_dir)
        checkpoint = self.ranks.from_main(checkpoint)
        self.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return self.rankings

    def _is_measured(self, identity: RunIdentity, policy: PolicyNote) -> bool:
        state = planned_state(self.setup)
        state.keep_scoring_batch_prompts(policy.scoring_batch_prompts)
        measurer = measurer_of(self.setup, identity, state.scoring_batch_prompts)
        return measurer.is_measured(
            STAGE_NAME, policy.step, self._candidates, self.selectors, policy.weights
        )

    @property
    def _candidates(self) -> np.ndarray:
        return np.arange(self.setup.plan.dataset_size)

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= self.setup.plan.total_steps:
            control.should_save = (
                True  # also with save_strategy="no": other selectors will need this policy
            )

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        weights = weights_digest(self.trainer)
        scoring_batch_prompts = self.warmup.state.scoring_batch_prompts
        policy = PolicyNote(
            step=state.global_step, weights=weights, scoring_batch_prompts=scoring_batch_prompts
        )
        self.record.note(WARMUP, policy)
        self._is_scoring = True
        selector, size = combined(self.selectors), self.setup.plan.dataset_size
        scored = scored_prompts(size, self.setup.config, selector.needs) or size
        line = scoring_line(selector, scored, self.trainer.num_generations)
        logger.info("%s", line)
        try:
            self._rank(state.global_step, weights)
        finally:
            self._is_scoring = False

    def _rank(self, step: int, weights: str) -> None:
        measurer = self.warmup.run.measurer
        self._step = step
        with report_interruption(self.trainer):
            pool, self.scoring = measurer.measure(
                STAGE_NAME, step, self._candidates, self.selectors, weights
            )
        self._note_cost(step)
        most = self.config.sizes[-1]
        self.rankings = [measurer.rank(pool, selector, most) for selector in self.selectors]
        for ranking in self.rankings:
            largest = self.choices(ranking)[self.config.sizes[-1]]
            shortfall = ranking.shortfall(largest, self.config.sizes[-1])
            warn_of_shortfall(ranking.selector.name, shortfall, self.config.on_shortfall)

    def _note_cost(self, step: int) -> None:
        """Add the cost of all measurements in this folder to the ledger, each measurement once."""
        noted = self.record.get(SCORING, MeasuresNote)
        measures: dict[str, Mapping[str, float]] = {} if noted is None else dict(noted.measures)
        for name, amounts in self.scoring.measures.items():
            before = measures.get(name, {})
            measures[name] = {
                kind: max(amount, before.get(kind, 0)) for kind, amount in amounts.items()
            }
        cost = ScoringEntry.of(measures).cost(extra_forwards(self.trainer))
        self.record.note(SCORING, MeasuresNote(step=step, measures=measures, cost=cost))

    def choices(self, ranking: Ranking) -> dict[int, Selection]:
        """Return the subsets of a ranking by requested size; with `on_shortfall="shrink"` they may be smaller."""
        short = self.config.on_shortfall
        return {size: ranking.take(size, self._candidates, short, 1) for size in self.config.sizes}

    def subset(self, ranking: Ranking, choice: Selection) -> Dataset:
        """Return the selected rows of a ranking, best first."""
        largest = self.choices(ranking)[self.config.sizes[-1]]
        table = ranking.table(largest)
        return subset_of(self.trainer.train_dataset, table, choice.rows, self.originals)

    def write(self, folder: Path) -> list[Path]:
        """Write all subsets, and record them; on the main process.

        For each selector, `folder` gets `<selector>/scores.parquet` (all candidates, columns as in
        `trl_learnalign.records.run_record`). For each size N it gets `<selector>/top_<N>` (for
        `datasets.load_from_disk`), `top_<N>.parquet` and `top_<N>.jsonl`, best prompt first. With several selectors
        it also gets `correlations`
        (Spearman, between scores) and `overlaps` (of the largest subsets), as `.parquet` and `.csv`.

        Args:
            folder (`Path`): Target folder.

        Returns:
            `list[Path]`: The dataset folders.
        """
        written = []
        chosen = {}
        for ranking in self.rankings:
            choices = self.choices(ranking)
            name = layout.selector_folder(ranking.selector.name)
            largest = choices[self.config.sizes[-1]]
            chosen[ranking.selector.name] = largest.rows
            self._note(ranking, choices)
            if not self.ranks.is_main:
                continue
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_table(folder / name / layout.SCORES, ranking.table(largest))
            for size, choice in choices.items():
                subset = self.subset(ranking, choice)
                path = folder / name / layout.subset(size)
                write_subset(path, subset)
                written.append(path)
                if self.config.push_to_hub_id is not None:
                    subset.push_to_hub(
                        self.config.push_to_hub_id, config_name=f"{name}_{layout.subset(size)}"
                    )
        if len(self.rankings) > 1 and self.ranks.is_main:
            scores = {ranking.selector.name: ranking.scores for ranking in self.rankings}
            for name, table in (
                (CORRELATIONS, rank_correlations(scores)),
                (OVERLAPS, overlaps(chosen)),
            ):
                table.to_csv(folder / f"{name}.csv", index_label="selector")
                table.reset_index(names="selector").to_parquet(
                    folder / f"{name}.parquet", index=False
                )
        self.ranks.wait()
        return written

    def _note(self, ranking: Ranking, choices: dict[int, Selection]) -> None:
        largest = choices[self.config.sizes[-1]]
        note = SubsetNote(
            step=self._step,
            selector=ranking.selector.name,
            sizes={str(size): len(choice) for size, choice in choices.items()},
            shortfall=ranking.shortfall(largest, self.config.sizes[-1]),
            no_signal=self.setup.context.no_signal(ranking.pool.rewards, ranking.pool.lengths),
            scoring=self.scoring,
            breadth=breadth(ranking.pool, largest.positions),
            shares=shares_of_choice(ranking, largest, self._candidates, self.setup.groupings),
            **vars(ranking.summary(largest)),
        )
        if note.breadth is not None and note.breadth.narrowness:
            logger.warning("%s: %s.", note.selector, note.breadth.narrowness)
        warn_of_narrow(note.selector, note.shares)
        self.record.note(SUBSETS, note)


def check_sizes(config: SubsetConfig, dataset_size: int) -> None:
    """Check that the pool has enough prompts for the requested sizes.

    Raises:
        `ValueError`: If it has not, naming both numbers.
    """
    if config.sizes[-1] > dataset_size:
        raise ValueError(
            f"top={config.sizes}, but the pool has {dataset_size} prompts: lower it to at most that."
        )


def check_budget(config: SubsetConfig, selectors: Sequence[Selector]) -> None:
    """Check that one pool serves all selectors.

    Raises:
        `ValueError`: If a rollout budget limits the pool of only some of them, naming these and the others.
    """
    if config.rollout_budget is None:
        return
    limited = [selector.name for selector in selectors if selector.needs & ROLLED_OUT]
    others = [selector.name for selector in selectors if selector.name not in limited]
    if limited and others:
        raise ValueError(
            f"rollout_budget={config.rollout_budget}: {', '.join(limited)} rank only the prompts that are rolled "
            f"out, but {', '.join(others)} rank all candidates without rollouts. Run the command once for each "
            "kind; the second run reuses the measurements of the first."
        )


def write_subset(path: Path, subset: Dataset) -> None:
    """Write a subset as a folder of `datasets`, and next to it as Parquet and JSONL.

    Args:
        path (`Path`): The folder; the files have its name with a suffix.
        subset (`Dataset`): The subset.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    subset.save_to_disk(unfinished)
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)
    write_table(path.with_name(f"{path.name}.parquet"), subset.data.table)
    # `Dataset.to_json` rounds numbers to ten digits.
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in subset)
    write_atomically(path.with_name(f"{path.name}.jsonl"), lines.encode(errors="surrogatepass"))

"""Phases: held-out accuracy, selection at the start of a stage, restart after the warm-up."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from trl_learnalign.bridge.hooks import log_apart, preserve_trainer_state
from trl_learnalign.bridge.logs import TrackerTables
from trl_learnalign.bridge.objective import extra_forwards, reset_entropy_controller
from trl_learnalign.bridge.policy import gathered, weights_changed, zero_stage
from trl_learnalign.data.columns import Grouping
from trl_learnalign.diversity import breadth, write_categories
from trl_learnalign.measuring.stage import StageMeasurer
from trl_learnalign.plan import WARMUP, Phase, Plan, is_scored
from trl_learnalign.preflight.forecast import scored_prompts
from trl_learnalign.ranking import Ranking, Selection, overlap, reliability, subset_of
from trl_learnalign.records import layout
from trl_learnalign.records.layout import INITIAL_REFERENCE, INITIAL_WEIGHTS
from trl_learnalign.records.notes import BASE, MetricsNote, Reliability, ScoringEntry, SelectionNote
from trl_learnalign.records.run_record import RunRecord
from trl_learnalign.records.store import StoreError
from trl_learnalign.selectors import Selector
from trl_learnalign.training.checkpoints import report_interruption
from trl_learnalign.training.metrics import (
    ChoiceTables,
    measured_line,
    measured_metrics,
    notable,
    scoring_line,
    selection_lines,
    selection_metrics,
    shares_of_choice,
    warn_of_narrow,
    warn_of_shortfall,
)
from trl_learnalign.training.setup import RunSetup
from trl_learnalign.training.state import RunState, load_reference, save_weights

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)


# ---- Selection of a stage -------------------------------------------------------------------------------------------


class StageSelection:
    """Selects the prompts of stages.

    Args:
        measurer (`StageMeasurer`): Measures and ranks candidates.
        record (`RunRecord`): The record of selections.
        plan (`Plan`): The run's plan.
        groupings (sequence of `Grouping`, *optional*): Columns for the statistics of a selection.
    """

    def __init__(
        self,
        measurer: StageMeasurer,
        record: RunRecord,
        plan: Plan,
        groupings: Sequence[Grouping] = (),
    ):
        self.measurer = measurer
        self.record = record
        self.stages, self.geometry = plan.stages, plan.geometry
        self.is_scoring = False
        self._context = measurer.context
        self._groupings = groupings
        trackers = TrackerTables(self._context.trainer)
        self._tables = ChoiceTables(trackers, self._context.config.log_prompt_table, groupings)

    def select(
        self, phase: Phase, step: int, candidates: np.ndarray, selector: Selector
    ) -> np.ndarray:
        """Return the rows of the dataset for a stage, `(N,)`; collective, and equal on all ranks.

        Args:
            phase (`Phase`): The stage.
            step (`int`): Optimizer step of the current policy.
            candidates (`np.ndarray`): Rows that may be selected, ascending.
            selector (`Selector`): The selector that ranks them.
        """
        config = self._context.config
        if not is_scored(config, phase.size, len(candidates), len(self._context.dataset)):
            self.record.note(
                phase.name, SelectionNote(step=step, scored=False, selected=len(candidates))
            )
            return candidates
        count = len(candidates)
        scored = scored_prompts(count, config, selector.needs) or count
        line = scoring_line(selector, scored, self.geometry.rollouts)
        logger.info("%s: %s", phase.name, line)
        with self._scoring(), report_interruption(self._context.trainer):
            pool, scoring = self.measurer.measure(phase.name, step, candidates, [selector])
            size = min(phase.size, len(pool))
            ranking = self.measurer.rank(pool, selector, size)
            agreement = reliability(ranking, size) if config.reliability else None
        # A stage without prompts cannot be trained on. Even a shrunk stage fills its first generation.
        least = self.geometry.prompts_per_generation
        choice = ranking.take(phase.size, candidates, config.on_shortfall, least)
        shortfall = ranking.shortfall(choice, phase.size)
        warn_of_shortfall(phase.name, shortfall, config.on_shortfall)
        self._note(phase, step, ranking, choice, scoring, agreement, candidates)
        return choice.rows

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        self.is_scoring = True
        try:
            yield
        finally:
            self.is_scoring = False

    def _note(
        self,
        phase: Phase,
        step: int,
        ranking: Ranking,
        choice: Selection,
        scoring: ScoringEntry,
        agreement: Reliability | None,
        candidates: np.ndarray,
    ) -> None:
        trainer = self._context.trainer
        table = ranking.table(choice)
        self.record.write_stage(phase.name, table)
        self._keep(phase, table, choice)
        self.record.write_examples(phase.name, ranking.examples())
        note = SelectionNote(
            step=step,
            scored=True,
            overlap=self._overlap(phase, ranking, choice),
            not_scored=len(candidates) - len(ranking.pool),
            unscored_selected=len(choice.unscored),
            shortfall=ranking.shortfall(choice, phase.size),
            no_signal=self._context.no_signal(ranking.pool.rewards, ranking.pool.lengths),
            scoring=scoring,
            cost=scoring.cost(extra_forwards(trainer)),
            reliability=agreement,
            breadth=breadth(ranking.pool, choice.positions),
            shares=shares_of_choice(ranking, choice, candidates, self._groupings),
            **vars(ranking.summary(choice)),
        )
        if note.breadth is not None and note.breadth.narrowness:
            logger.warning("%s: %s.", phase.name, note.breadth.narrowness)
        warn_of_narrow(phase.name, note.shares)
        self.record.note(phase.name, note)
        log_apart(trainer, selection_metrics(note, self._number(phase)))
        self._tables.show(phase.name, table, note.shares)
        for line in selection_lines(note):
            logger.info("%s: %s", phase.name, line)

    def _keep(self, phase: Phase, table: pa.Table, choice: Selection) -> None:
        """Write the selected prompts with all their columns, so that they can be published without the dataset."""
        if self.record.writes:
            subset = subset_of(self._context.dataset, table, choice.rows)
            self.record.write_selected(phase.name, subset.data.table)

    def _overlap(self, phase: Phase, ranking: Ranking, choice: Selection) -> float | None:
        """Return the share of the selection that the previous stage's ranking would also have selected."""
        before, ranks = self._number(phase) - 2, self._context.ranks
        table = None
        if before >= 0 and ranks.is_main:
            table = self.record.read_stage(self.stages[before].name)
        share = None if table is None else overlap(table, choice.rows, ranking.pool.prompts)
        return ranks.from_main(share)

    def _number(self, phase: Phase) -> int:
        """Return the number of the stage, from 1."""
        return [stage.name for stage in self.stages].index(phase.name) + 1


# ---- Restart after the warm-up --------------------------------------------------------------------------------------
# The weights and the optimizer are reset, and so is the state that moves with them: a reference that follows the
# policy (`sync_ref_model`) and an adaptive entropy coefficient. The initial trainable weights are kept on disk, so
# that a run that is interrupted during warm-up or scoring can still restore them.


class InitialState:
    """The trainable weights and the optimizer state before the first step.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training.
        record (`RunRecord`): The record; the weights are saved in its folder.
    """

    def __init__(self, trainer: GRPOTrainer, record: RunRecord):
        self.trainer = trainer
        self.record = record

    def save(self) -> None:
        """Save the weights; called before the first step, collective over all processes."""
        save_weights(self.trainer, self._trainable(), partial(self._write, INITIAL_WEIGHTS))
        if self.trainer.args.sync_ref_model:
            parameters = self.trainer.ref_model.named_parameters()
            save_weights(self.trainer, parameters, partial(self._write, INITIAL_REFERENCE))
        self.record.save()

    def _write(self, name: str, content: bytes) -> None:
        self.record.write_file(name, content)

    def check(self) -> None:
        """Check the saved weights; on the main process.

        Raises:
            `StoreError`: If the file is missing or damaged, naming it.
        """
        names = [
            INITIAL_WEIGHTS,
            *([INITIAL_REFERENCE] if self.trainer.args.sync_ref_model else []),
        ]
        for path in [self.record.folder / name for name in names]:
            problem = self.record.problem_of(path)
            if problem is not None:
                raise StoreError(
                    f"{path} {problem}, so after_warmup='restart' cannot restore the initial weights: restore that "
                    "file, or start a new run with another output_dir."
                )

    def restore(self) -> None:
        """Restore weights, optimizer, a moving reference and the entropy coefficient; collective over all processes.

        Raises:
            `StoreError`: If the saved weights are missing or damaged.
        """
        if self.record.writes:
            self.check()
        weights = load_file(self.record.folder / INITIAL_WEIGHTS)
        with torch.no_grad():
            for name, parameter in self._trainable():
                with gathered(self.trainer, parameter, write=True) as whole:
                    whole.copy_(weights[name])
                if zero_stage(self.trainer):
                    _write_master_copy(parameter, weights[name])
        if zero_stage(self.trainer):
            _reset_partitioned_states(self.trainer.optimizer)
        else:
            optimizer = self.trainer.optimizer
            # Loading a state dict without state resets any torch optimizer.
            optimizer.load_state_dict(
                {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
            )
        weights_changed(self.trainer)
        if self.trainer.args.sync_ref_model:
            load_reference(self.trainer, self.record.folder / INITIAL_REFERENCE)
        reset_entropy_controller(self.trainer)

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.trainer.model.named_parameters() if p.requires_grad]


def _write_master_copy(parameter: nn.Parameter, weights: torch.Tensor) -> None:
    """Write DeepSpeed ZeRO's float32 copy too; the next step would otherwise overwrite the weights with it."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(parameter, "ds_tensor"):
        # The full setter refuses parameters that do not divide evenly among the ranks. The local setter takes the
        # partition (padding included) of the weights that were just written.
        safe_set_local_fp32_param(parameter, parameter.ds_tensor.detach().float())
    else:
        safe_set_full_fp32_param(parameter, weights.float().to(parameter.device))


def _reset_partitioned_states(optimizer: Any) -> None:
    """Reset moments and step counters of a ZeRO optimizer to zero, in place: DeepSpeed holds views of them."""
    while hasattr(optimizer, "optimizer"):  # accelerate wraps DeepSpeed, which wraps torch's
        optimizer = optimizer.optimizer
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            elif name == "step":
                state[name] = 0
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = 0


def split_schedule(trainer: GRPOTrainer, boundary: int, total: int) -> None:
    """Give warm-up and stages a learning-rate schedule each: the trainer's own, over their own numbers of steps.

    The schedule stays a pure function of the step, so it needs no state of its own to resume.

    Args:
        trainer (`GRPOTrainer`): The trainer, prepared for training.
        boundary (`int`): First step after the warm-up.
        total (`int`): Number of steps of the run.

    Raises:
        `ValueError`: If the schedule cannot be restarted.
    """
    scheduler = trainer.lr_scheduler
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"after_warmup='restart' cannot restart a schedule of type {type(scheduler).__name__} "
            f"(lr_scheduler_type={trainer.args.lr_scheduler_type}): choose one that depends only on the step, e.g. "
            "'linear' or 'cosine', remove it from the DeepSpeed config, or use after_warmup='continue'."
        )
    before, after = _multiplier(trainer, boundary), _multiplier(trainer, total - boundary)

    def multiplier(step: int) -> float:
        return before(step) if step < boundary else after(step - boundary)

    scheduler.lr_lambdas = [multiplier for _ in scheduler.lr_lambdas]
    rates = [base * multiplier(scheduler.last_epoch) for base in scheduler.base_lrs]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _multiplier(trainer: GRPOTrainer, steps: int) -> Any:
    """Return the function from step to learning-rate factor that the trainer would make for `steps` steps."""
    args = trainer.args
    # Some schedules read the initial rate from the optimizer.
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    made = get_scheduler(
        args.lr_scheduler_type,
        optimizer=stand_in,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    return made.lr_lambdas[0]


# ---- Phases ---------------------------------------------------------------------------------------------------------

PhaseHook = Callable[[str, int], "Mapping[str, Any] | None"]


class Phases:
    """The actions between the phases of a run.

    Args:
        setup (`RunSetup`): The assembled run.
        run (`RunState`): Its state.
        record (`RunRecord`): Its record.
        on_phase_end (callable, *optional*): See `LearnAlignCallback`.
    """

    def __init__(
        self, setup: RunSetup, run: RunState, record: RunRecord, on_phase_end: PhaseHook | None
    ):
        self.setup, self.trainer = setup, setup.trainer
        self.run = run
        self.record = record
        self.on_phase_end = on_phase_end
        self._initial = InitialState(setup.trainer, record)
        self._goes_back = (
            setup.config.after_warmup == "restart" and setup.plan.phases[0].kind == WARMUP
        )

    def begin_run(self) -> None:
        """Start or resume a run.

        With `after_warmup="restart"`, save the initial state and split the schedule.
        """
        step, steps = self.trainer.state.global_step, self.run.plan.total_steps
        if self.setup.ranks.is_main:
            write_categories(self.setup.folder, self.setup.groupings)
        if step:
            logger.info("Resumed at step %d of %d.", step, steps)
        if not self._goes_back:
            return
        split_schedule(self.trainer, self.run.plan.phases[0].end, steps)
        if step == 0:
            self._initial.save()
        elif step <= self.run.plan.phases[0].end and self.record.writes:
            self._initial.check()

    def end_run(self) -> None:
        """End the training, by the plan or by an earlier stop from outside."""
        step, plan = self.trainer.state.global_step, self.run.plan
        if step >= plan.total_steps:
            self.end(plan.phases[-1].name, step, has_ended=True)
            self.drop_measurements()
        self.record.write_log(self.trainer.state.log_history)
        if not plan.stages:  # a warm-up alone; a selection follows
            return
        folder = self.setup.folder
        logger.info("Step %d of %d reached. Records: %s", step, plan.total_steps, folder)
        logger.info(
            "To see what was selected and why: trl-learnalign report %s",
            layout.output_folder(folder),
        )

    def begin(self, phase: Phase, step: int, selection: StageSelection) -> Phase:
        """Begin a phase; collective over all ranks.

        Args:
            phase (`Phase`): The phase.
            step (`int`): Its first optimizer step.
            selection (`StageSelection`): Selects the prompts, if the phase is a stage.

        Returns:
            `Phase`: The phase, with the steps that the selected prompts need.
        """
        self.end(self.run.plan.phases[phase.index - 1].name if phase.index else BASE, step)
        self.record.write_log(self.trainer.state.log_history)
        if self.setup.config.uses_trainer_order:
            if size := self.run.plan.dataset_size:
                self.record.note(phase.name, SelectionNote(step=step, scored=False, selected=size))
        elif not self.run.has_selected(phase):
            selector = self.setup.selectors[self.run.plan.stages.index(phase)]
            rows = selection.select(phase, step, self.run.candidates(), selector)
            phase = self.run.select(phase, rows)
        if self._goes_back and phase.index == 1:
            self._initial.restore()
            split_schedule(self.trainer, phase.start, self.run.plan.total_steps)
            logger.info("Weights, optimizer and schedule were reset to their initial state.")
        logger.info(
            "%s: %s, %s, steps %d to %d of %d",
            *(phase.name, self._prompts_of(phase), self._order_of(phase)),
            *(phase.start + 1, phase.end, self.run.plan.total_steps),
        )
        return phase

    def _prompts_of(self, phase: Phase) -> str:
        is_whole = self.setup.config.uses_trainer_order
        return self.run.plan.prompts if is_whole else f"{len(self.run.pool_of(phase)):,} prompts"

    def _order_of(self, phase: Phase) -> str:
        if self.setup.config.uses_trainer_order:
            return "in the trainer's own order"
        stages = self.run.plan.stages
        order = self.setup.config.order_of(stages.index(phase)) if phase in stages else "shuffled"
        if order != "shuffled":
            return f"in {order} order"
        return "1 pass" if phase.passes == 1 else f"{phase.passes} passes"

    def end(self, name: str, step: int, has_ended: bool = False) -> None:
        """Record and log the result of `on_phase_end`, unless it is recorded already.

        Args:
            name (`str`): `Phase.name`, or `"base"` before the first.
            step (`int`): Optimizer step of the current policy.
            has_ended (`bool`, *optional*): Whether this is the end of training.
        """
        if self.on_phase_end is None or self.record.get(name, MetricsNote) is not None:
            return
        with preserve_trainer_state(self.trainer):
            metrics = self.on_phase_end(name, step)
        note = MetricsNote(step=step, others=notable(name, step, metrics))
        self.record.note(name, note)
        if line := measured_line(note):
            logger.info("%s: %s", name, line)
            log_apart(self.trainer, measured_metrics(note), has_ended)

    def drop_measurements(self) -> None:
        """Without `keep_features`: delete the measurements behind pools that a checkpoint contains."""
        if not self.setup.config.keep_features and self.setup.ranks.is_main:
            for stage in self.run.pools:
                shutil.rmtree(self.setup.folder / stage, ignore_errors=True)

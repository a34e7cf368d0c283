"""`LearnAlignCallback`: when warm-up, scoring and each stage happen inside a stock `GRPOTrainer`."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_learnalign import bridge, curriculum, scoring
from trl_learnalign.config import LearnAlignConfig
from trl_learnalign.curriculum import STAGE, Phase, Plan
from trl_learnalign.data.prompts import dataset_digest
from trl_learnalign.distributed import Ranks
from trl_learnalign.measuring import identity
from trl_learnalign.measuring.context import Context, Validation
from trl_learnalign.measuring.needs import Report, text_measures
from trl_learnalign.measuring.stage import StageMeasurer
from trl_learnalign.planning import checks
from trl_learnalign.planning.precision import warn_of_rounding
from trl_learnalign.planning.preflight import check_extension_locks, check_lengths, check_references, check_routes
from trl_learnalign.ranking.ranking import Choice, Ranking
from trl_learnalign.ranking.reliability import reliability
from trl_learnalign.ranking.stage_table import overlap
from trl_learnalign.records import layout
from trl_learnalign.records.contents import Header, TrainerEntry
from trl_learnalign.records.history import HistoryRecorder
from trl_learnalign.records.ledger import TrainingMeter
from trl_learnalign.records.notes import BASE, MetricsNote, Reliability, SelectionNote, TrainingNote
from trl_learnalign.records.run import RunRecord
from trl_learnalign.records.store import check_writable
from trl_learnalign.selectors import VALIDATION, Selector
from trl_learnalign.training.checkpoints import (
    checkpoint_folder,
    load_generation,
    restore_reference,
    save_generation,
    save_reference,
)
from trl_learnalign.training.metrics import selection_line, selection_metrics
from trl_learnalign.training.plateau import Plateau
from trl_learnalign.training.restart import InitialState, split_schedule
from trl_learnalign.training.sampler import CurriculumSampler

if TYPE_CHECKING:
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

STATE_KEY = "learnalign"

PhaseHook = Callable[[str, int], "dict[str, Any] | None"]


class LearnAlignCallback(TrainerCallback):
    """Trains a `GRPOTrainer` on the prompts that teach most.

    ```python
    trainer = GRPOTrainer(model, reward_funcs=accuracy_reward, args=args, train_dataset=dataset)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignConfig(stages=[1000])))
    trainer.train()
    ```

    It takes over the order of prompts and the number of steps, and nothing else: at the start of each stage it scores
    the candidates with the policy as it is then, selects, and lets the trainer train on them.

    Args:
        trainer (`GRPOTrainer`): The trainer, before `train()`.
        config (`LearnAlignConfig`, *optional*): Settings; the paper's staged run by default.
        on_phase_end (callable, *optional*): Called as `on_phase_end(name, step)` on every rank with the policy as it
            is before the first phase (`"base"`) and after each one (`"warmup"`, `"stage_1"`, …). What it returns is
            noted in the record. The trainer's random state does not change by it.
        validation_dataset (`datasets.Dataset`, *optional*): Trusted prompts, with the columns of the training dataset:
            what `selector="validation_alignment"` compares candidates with. They are never trained on.

    Raises:
        `ValueError`, `TypeError`: If dataset, settings and rewards do not fit; before any rollout.
        `RuntimeError`: If this version of trl is not supported.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        config: LearnAlignConfig | None = None,
        on_phase_end: PhaseHook | None = None,
        validation_dataset: Any = None,
    ):
        bridge.check_trainer(trainer)
        bridge.check_launch(trainer)
        if trainer.is_deepspeed_enabled:
            check_extension_locks()
        self.trainer = trainer
        self.config = config if config is not None else LearnAlignConfig()
        if not isinstance(self.config, LearnAlignConfig):
            raise TypeError(f"config is a {type(config).__name__}: give LearnAlignConfig(...).")
        checks.check_dataset(trainer.train_dataset)
        check_lengths(trainer)
        check_references(trainer)
        self.selectors = checks.check_selectors(self.config, trainer.train_dataset, validation_dataset)
        checks.check_objective(trainer.args, self.selectors)
        checks.check_adapter(trainer, self.selectors)
        self.ranks = Ranks(trainer.accelerator)
        self.context = Context.of(trainer, self.config, self.ranks)
        for selector in self.selectors:
            text_measures(self.context, selector)  # a tokenizer that does not fit is an error now
        self.validation_dataset = validation_dataset
        self.plan = self._whole_plan = self._make_plan()
        checks.check_args(trainer.args, self.plan)
        checks.warn_of_epochs(trainer.args, self.plan)
        trainer.args.max_steps = self.plan.total_steps
        self.sampler = CurriculumSampler(self.plan, self.config.selection_seed)
        bridge.install_sampler(trainer, self.sampler)
        self.folder = Path(self.config.record_dir or layout.record_folder(trainer.args.output_dir))
        check_writable(self.folder)
        self.on_phase_end = on_phase_end
        self.is_scoring = False
        self._has_trained = False
        self.record = RunRecord(self.folder, self.ranks.is_main)
        self._history = HistoryRecorder(self.folder / layout.HISTORY, trainer.train_dataset, self.ranks.is_main)
        self._initial = InitialState(trainer, self.folder / layout.INITIAL_WEIGHTS)
        self._plateau = Plateau(self.config)
        self._state: dict[str, Any] = {}
        self._identity: dict[str, Any] = {}
        self._of_version_0_1 = False
        # What a reward of the user's holds may name its process (a rank, a device): the main one speaks for all.
        self._code = self.ranks.from_main(identity.code_identity(trainer))
        self._measured_with: dict[str, Any] = {}
        self._validation: Validation | None = None
        self._meter = TrainingMeter(trainer.args.generation_batch_size)

    def _make_plan(self) -> Plan:
        trainer = self.trainer
        return curriculum.make_plan(self.config, len(trainer.train_dataset), checks.geometry(trainer.args))

    # ---- Beginning and resuming -------------------------------------------------------------------------------------

    def on_train_begin(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check_beginning(state)
        check_routes(self.trainer)
        self.plan = self._whole_plan
        if self.plan.total_steps:
            warn_of_rounding(self.trainer)
        self._rank_as_begun()
        self._identify()
        bridge.begin_counting(self.trainer)
        if state.global_step > 0:
            self._resume(state)
        else:
            bridge.reset_entropy_controller(self.trainer)
            self._warn_of_a_second_beginning()
            self._state = {
                "pools": {},
                "ended": {},
                "rollout_prompts": self.context.rollout_prompts,
                "plateau": None,
                "meter": self._meter.state(0.0),
            }
        state.stateful_callbacks[STATE_KEY] = self._state
        self.record.begin(self._header(), self._identity, state.global_step)
        self._history.begin(state.global_step)
        if self.config.after_warmup == "restart":
            split_schedule(self.trainer, self.plan.phases[0].end, self.plan.total_steps)
            if state.global_step == 0:
                self._initial.save()

    def _rank_as_begun(self) -> None:
        """A run that version 0.1 began goes on by the letter of Eq. 9, the only rule that it knew."""
        found = self.ranks.from_main(self.record.found() if self.ranks.is_main else None)
        begun = {} if found is None else found.identity
        self._of_version_0_1 = "selector" in begun and "zero_learnability" not in begun
        if self._of_version_0_1 and self.config.zero_learnability != "by_score":
            self.config = dataclasses.replace(self.config, zero_learnability="by_score")
            logger.warning(
                "%s was begun by version 0.1, which ranked by the letter of Eq. 9; this run goes on so, as with "
                "zero_learnability='by_score'.",
                self.folder,
            )

    def _check_beginning(self, state: TrainerState) -> None:
        if state.global_step == 0 and self._has_trained:
            raise ValueError(
                "This trainer has trained already, and train() would begin at step 0 with the weights as they are "
                "now: the warm-up and what is selected would not be those of the plan, and the record of the first "
                "run would be overwritten. To go on after an interruption: train(resume_from_checkpoint=True). To "
                "train once more: make a new trainer with another output_dir."
            )

    def _warn_of_a_second_beginning(self) -> None:
        """Before hours of warm-up: measurements of the first run fit only if training repeats itself bit by bit."""
        found = self.record.check(self._identity)
        if found is not None and found.last_step and self._trains_before_scoring() and self.ranks.is_main:
            logger.warning(
                "%s: a run with these settings has got to step %d here, and this one begins anew at step 0. What was "
                "measured after training is used if the weights come out the same, bit by bit (a GPU does not promise "
                "it), and is refused otherwise. To go on where that run stood: train(resume_from_checkpoint=True); to "
                "be sure of a new run, give it another output_dir.",
                *(self.record.path, found.last_step),
            )

    def _identify(self) -> None:
        if any(VALIDATION in selector.needs for selector in self.selectors):
            digest = dataset_digest(self.validation_dataset)
            self._validation = Validation(self.validation_dataset, digest)
        self._measured_with = identity.measured_with(self.trainer, self._code)
        self._identity = {**self._make_identity(), **self._measured_with}
        if self._trains_before_scoring():
            self._identity["training"] = identity.settings_of(self.trainer.args, identity.TRAINS)
        self.ranks.agree("plan, dataset and selection settings", self._identity)

    def _resume(self, state: TrainerState) -> None:
        found = state.stateful_callbacks.get(STATE_KEY)
        if found is None:
            raise ValueError(
                f"The checkpoint at step {state.global_step} was written without LearnAlignCallback: its steps cannot "
                "be placed in the plan. Resume a checkpoint of this run, or start anew."
            )
        self._state = found
        for name, step in found["ended"].items():
            phase = next(phase for phase in self.plan.phases if phase.name == name)
            self.plan = self.plan.ended_early(phase, step)
        self._plateau.load_state(found["plateau"])
        self._meter.load_state(found["meter"], time.perf_counter())
        restore_reference(self.trainer)
        load_generation(self.trainer)

    def _make_identity(self) -> dict[str, Any]:
        """What makes two runs the same, before any model is looked at."""
        config = self.config
        return {
            "dataset": dataset_digest(self.trainer.train_dataset),
            "dataset_size": self.plan.dataset_size,
            "prompts_per_unit": self.plan.geometry.unit_prompts,
            "steps_per_unit": self.plan.geometry.unit_steps,
            "rollouts": self.plan.geometry.rollouts,
            "warmup": [config.warmup_samples, config.warmup_passes, config.after_warmup],
            "stages": [config.stages, config.stage_passes, config.reselect, config.when_short],
            **({} if config.stage_steps is None else {"stage_steps": config.stage_steps}),
            "selector": config.selector,
            "learnability": [config.unbiased_learnability, config.exclude_self],
            "scored": [config.pool_sample, config.gradient_rollouts],
            "success": [self.context.success.name, self.context.success.threshold],
            "selection_seed": config.selection_seed,
            **({} if self._of_version_0_1 else {"zero_learnability": config.zero_learnability}),
            **({} if self._validation is None else {"validation_dataset": self._validation.digest}),
        }

    def _trains_before_scoring(self) -> bool:
        """Whether anything is measured after a step of training, and so depends on how that was made."""
        return self.plan.phases[-1].start > 0

    def _selector_of(self, phase: Phase) -> Selector:
        return self.selectors[self.plan.stages.index(phase)]

    def _header(self) -> Header:
        args = self.trainer.args
        trainer = TrainerEntry(
            model=self.trainer.model.config.name_or_path,
            reward_funcs=self.trainer.reward_func_names,
            seed=args.seed,
            learning_rate=args.learning_rate,
            beta=args.beta,
            loss_type=args.loss_type,
            temperature=args.temperature,
            max_completion_length=args.max_completion_length,
            processes=self.ranks.count,
            distributed_type=str(self.trainer.accelerator.distributed_type.value),
        )
        return Header(plan=self.plan, config=dataclasses.asdict(self.config), trainer=trainer)

    # ---- Phases -----------------------------------------------------------------------------------------------------

    def on_epoch_begin(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run enters its virtual epoch in the middle; the sampler always begins at the epoch's start.
        step = state.global_step // self.plan.epoch_steps * self.plan.epoch_steps
        phase = self.plan.phase_at(step)
        if state.global_step == phase.start:
            phase = self._begin_phase(phase, step)
        pool = self._pool_of(phase)
        self.ranks.agree(f"the pool of {phase.name}", [step, phase.name, pool.tolist()])
        self.sampler.begin_epoch(self.plan, phase, pool, step)

    def _begin_phase(self, phase: Phase, step: int) -> Phase:
        before = self.plan.phases[phase.index - 1].name if phase.index else BASE
        self._end_phase(before, step)
        self.record.write_log(self.trainer.state.log_history)
        if phase.kind == STAGE and phase.name not in self._state["pools"]:
            self._state["pools"][phase.name] = self._select(phase, step).tolist()
            phase = self._fit_steps(phase)
        first_stage = phase.index == 1 and self.plan.phases[0].kind == curriculum.WARMUP
        if first_stage and self.config.after_warmup == "restart":
            self._initial.restore()
            split_schedule(self.trainer, phase.start, self.plan.total_steps)
            logger.info("Weights, optimizer and schedule are back in their initial state.")
        self._plateau.begin()
        self._meter.begin(bridge.tokens_seen(self.trainer), time.perf_counter())
        logger.info(
            "%s: %d prompts, %d pass(es), steps %d to %d of %d",
            *(phase.name, len(self._pool_of(phase)), phase.passes),
            *(phase.start + 1, phase.end, self.plan.total_steps),
        )
        return phase

    def _fit_steps(self, phase: Phase) -> Phase:
        """The phase with the steps that the prompts found for it need."""
        if self.config.stage_steps is not None:
            return phase
        found = len(self._state["pools"][phase.name])
        return self._end_at(phase, phase.start + curriculum.steps_for(found, phase.passes, self.plan.geometry))

    def _end_at(self, phase: Phase, step: int) -> Phase:
        if step < phase.end:
            self.plan = self.plan.ended_early(phase, step)
            self._state["ended"][phase.name] = step
        return self.plan.phases[phase.index]

    def _end_phase(self, name: str, step: int) -> None:
        if self.on_phase_end is not None and self.record.get(name, MetricsNote) is None:
            with bridge.left_as_found(self.trainer):
                metrics = self.on_phase_end(name, step)
            self.record.note(name, MetricsNote(step=step, others=dict(metrics or {})))

    def _pool_of(self, phase: Phase) -> np.ndarray:
        if phase.kind == curriculum.WARMUP:
            return curriculum.warmup_pool(self.config.selection_seed, self.plan.dataset_size, phase.size)
        return np.asarray(self._state["pools"][phase.name], dtype=np.int64)

    # ---- Selection --------------------------------------------------------------------------------------------------

    def _candidates(self) -> np.ndarray:
        everything = np.arange(self.plan.dataset_size)
        if self.config.reselect == "all":
            return everything
        taken = [np.asarray(pool, dtype=np.int64) for pool in self._state["pools"].values()]
        return np.setdiff1d(everything, np.concatenate([*taken, np.empty(0, dtype=np.int64)]))

    def _select(self, phase: Phase, step: int) -> np.ndarray:
        candidates = self._candidates()
        if self.config.skip_forced_scoring and len(candidates) <= phase.size:
            self.record.note(phase.name, SelectionNote(step=step, scored=False, selected=len(candidates)))
            return candidates
        measurer, selector = self._measurer(), self._selector_of(phase)
        self.is_scoring = True
        try:
            pool, report = measurer.measure(phase.name, step, candidates, [selector])
            ranking = measurer.rank(pool, selector)
            agreement = reliability(ranking, min(phase.size, len(pool))) if self.config.reliability else None
        finally:
            self.is_scoring = False
        # A stage of no prompts cannot be trained on: even a shrunk one fills its first generation.
        least = self.plan.geometry.prompts_per_generation
        choice = ranking.take(phase.size, candidates, self.config.when_short, least)
        if shortfall := ranking.shortfall(choice, phase.size):
            logger.warning("%s: %s (when_short=%r).", phase.name, shortfall, self.config.when_short)
        self._note_selection(phase, step, ranking, choice, report, agreement)
        return np.sort(choice.rows)

    def _measurer(self) -> StageMeasurer:
        # A resumed run rolls out as it began: seeds go by the call.
        context = replace(self.context, config=self.config, rollout_prompts=self._state["rollout_prompts"])
        return StageMeasurer(context, self.folder, self._identity["dataset"], self._validation, self._measured_with)

    def _note_selection(
        self,
        phase: Phase,
        step: int,
        ranking: Ranking,
        choice: Choice,
        report: Report,
        agreement: Reliability | None,
    ) -> None:
        self.record.write_stage(phase.name, ranking.table(choice))
        self.record.write_examples(phase.name, ranking.examples())
        note = SelectionNote(
            step=step,
            scored=True,
            overlap=self._overlap(phase, ranking, choice),
            unscored_selected=len(choice.unscored),
            shortfall=ranking.shortfall(choice, phase.size),
            scoring=report.entry(),
            cost=report.cost(bridge.extra_forwards(self.trainer)),
            reliability=agreement,
            **vars(ranking.summary(choice)),
        )
        self.record.note(phase.name, note)
        bridge.log_apart(self.trainer, selection_metrics(note, self.plan.stages.index(phase) + 1))
        logger.info("%s: %s", phase.name, selection_line(note))

    def _overlap(self, phase: Phase, ranking: Ranking, choice: Choice) -> float | None:
        """How much of the choice the ranking of the stage before would have made too."""
        before = self.plan.stages.index(phase) - 1
        found = None
        if before >= 0 and self.ranks.is_main:
            table = self.record.read_stage(self.plan.stages[before].name)
            found = None if table is None else overlap(table, choice.rows, ranking.pool.prompts)
        return self.ranks.from_main(found)

    # ---- Steps ------------------------------------------------------------------------------------------------------

    def on_substep_end(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._record_successes()

    def _record_successes(self) -> None:
        """Note how often each prompt of a new generation was solved."""
        made = bridge.new_generation(self.trainer, self.context.success.index)
        if made is None:
            return
        geometry = self.plan.geometry
        micro_step, rewards = made
        step = micro_step // geometry.accumulation
        phase = self.plan.phase_at(step)
        generation = (micro_step - phase.start * geometry.accumulation) // geometry.micro_steps_per_generation
        places = generation * geometry.prompts_per_generation + np.arange(geometry.prompts_per_generation)
        pool = self._pool_of(phase)
        rows = curriculum.training_order(self.config.selection_seed, phase.name, pool, int(places[0]), len(places))
        successes = self.context.success.of_its_rewards(rewards)
        rates = scoring.success_rate(successes.view(len(rows), -1)).numpy()
        self._history.add(phase.name, step, rows, curriculum.pass_numbers(self.plan, phase, places, len(pool)), rates)

    def on_step_end(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._has_trained = True
        self._record_successes()
        self._meter.add_step(bridge.mean_completion_lengths(self.trainer))
        self._state["meter"] = self._meter.state(time.perf_counter())
        phase = self.plan.phase_at(state.global_step - 1)
        self._watch_plateau(phase, state.global_step)
        phase = self.plan.phase_at(state.global_step - 1)
        if state.global_step < phase.end:
            return
        self.record.note(phase.name, self._training_summary(phase, state))
        self._history.save()
        if self.config.save_at_boundaries and args.save_strategy != "no":
            control.should_save = True
        if state.global_step >= self.plan.total_steps:
            control.should_training_stop = True

    def _watch_plateau(self, phase: Phase, step: int) -> None:
        if not self.config.plateau_patience or phase.kind != STAGE:
            return
        reached = self._plateau.add(bridge.last_reward(self.trainer))
        self._state["plateau"] = self._plateau.state()
        whole_units = (step - phase.start) % self.plan.geometry.unit_steps == 0
        if self.ranks.from_main(reached) and whole_units and step < phase.end:
            logger.info(
                "%s: the reward has stopped rising; ended at step %d instead of %d.", phase.name, step, phase.end
            )
            self._end_at(phase, step)

    def _training_summary(self, phase: Phase, state: TrainerState) -> TrainingNote:
        logged = [entry for entry in state.log_history if phase.start < entry["step"] <= phase.end]
        # TRL logs None where no reward function could judge a single completion.
        rewards = [entry["reward"] for entry in logged if entry.get("reward") is not None]
        cost = self._meter.cost(
            bridge.tokens_seen(self.trainer),
            time.perf_counter(),
            self.trainer.num_iterations,
            bridge.extra_forwards(self.trainer),
        )
        return TrainingNote(
            step=state.global_step,
            steps=phase.steps,
            reward=float(np.mean(rewards)) if rewards else None,
            training_seconds=cost.seconds,
            cost=cost,
        )

    def on_epoch_end(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # For "epoch" strategies a phase is the epoch: virtual epochs are an implementation detail.
        if state.global_step < self.plan.phase_at(state.global_step - 1).end:
            control.should_save &= args.save_strategy != "epoch"
            control.should_evaluate &= args.eval_strategy != "epoch"
            control.should_log &= args.logging_strategy != "epoch"

    def on_save(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._history.save()  # before the checkpoint is marked as whole
        save_reference(self.trainer, checkpoint_folder(self.trainer))
        save_generation(self.trainer, checkpoint_folder(self.trainer))
        self._drop_measurements()

    def _drop_measurements(self) -> None:
        """Without `keep_features`: what the pools that are safe now were selected by."""
        if not self.config.keep_features and self.ranks.is_main:
            for stage in self._state["pools"]:
                shutil.rmtree(self.folder / stage, ignore_errors=True)

    def on_train_end(  # noqa: D102
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= self.plan.total_steps:
            self._end_phase(self.plan.phases[-1].name, state.global_step)
            self._drop_measurements()
        self.record.write_log(state.log_history)

    def selected(self, stage: str) -> np.ndarray:
        """Rows of the training dataset that a stage selected, ascending.

        Args:
            stage (`str`): `"stage_1"`, `"stage_2"`, …

        Raises:
            `KeyError`: If that stage has not selected yet.
        """
        return np.asarray(self._state["pools"][stage], dtype=np.int64)

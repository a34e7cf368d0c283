"""The ledger: its token counts are the trainer's own, whatever the batching, and survive a resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
from interruptions import KillAt, Killed

from trl_learnalign import LearnAlignCallback, LearnAlignConfig
from trl_learnalign.records.notes import Cost, Ledger, TrainingMeter
from trl_learnalign.training.checkpoints import last_complete_checkpoint

TOKENS = ("tokens_generated", "tokens_prompt", "tokens_forward", "tokens_trained")


class Counter:
    """A reward that counts the completion tokens it sees, in training and in scoring."""

    def __init__(self):
        self.callback = None
        self.generated = {"training": 0, "scoring": 0}

    def reward(self):
        def accuracy_reward(completions, completion_ids, **_):
            kind = "scoring" if self.callback.is_scoring else "training"
            self.generated[kind] += sum(map(len, completion_ids))
            return cases.accuracy_reward(completions)

        return accuracy_reward


def settings(**options):
    # Shards and generation calls that divide the candidates of each stage among two processes: no prompt is rolled out
    # only to fill a call or to keep the other process company.
    return LearnAlignConfig(
        **{
            "warmup_samples": 4,
            "stages": [4, 4],
            "shard_size": 2,
            "scoring_batch_prompts": 2,
            "feature_dim": 64,
            **options,
        }
    )


def go(folder, config=None, callbacks=(), resume=False, validation=None, **options):
    counter = Counter()
    trainer = cases.trainer(folder, data=cases.dataset(12), rewards=counter.reward(), **options)
    counter.callback = LearnAlignCallback(
        trainer, config or settings(), validation_dataset=validation
    )
    trainer.add_callback(counter.callback)
    for callback in callbacks:
        trainer.add_callback(callback)
    found = last_complete_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    ledger = json.loads((Path(folder) / "_learnalign" / "run.json").read_text())["ledger"]
    return trainer, counter, ledger


def total(ledger, kind, name):
    return sum(
        entry[kind][name] for phase, entry in ledger.items() if phase != "total" and kind in entry
    )


def tokens(cost):
    return {name: cost[name] for name in TOKENS}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logging_steps": 3},
        {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1},
        {
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 1,
            "per_device_train_batch_size": 4,
        },
        {"beta": 0.1},
    ],
)
def test_ledger_figures_are_the_trainers_own_counts(tmp_path, options):
    cases.model().save_pretrained(tmp_path / "policy")  # a reference model is loaded by name
    policy = cases.Qwen2ForCausalLM.from_pretrained(tmp_path / "policy")
    trainer, counter, ledger = go(tmp_path / "run", policy=policy, **options)
    seen = trainer.state.num_input_tokens_seen
    logged = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    if options.get("logging_steps", 1) == 1:
        assert logged[-1] == seen
    assert total(ledger, "training", "tokens_generated") == counter.generated["training"]
    read = total(ledger, "training", "tokens_generated") + total(
        ledger, "training", "tokens_prompt"
    )
    assert read == seen
    assert total(ledger, "training", "tokens_trained") == trainer.num_iterations * seen
    forwards = (options.get("beta", 0) > 0) + ("num_iterations" in options)
    assert total(ledger, "training", "tokens_forward") == forwards * seen
    assert total(ledger, "scoring", "tokens_generated") == counter.generated["scoring"]
    for name in TOKENS:
        assert ledger["total"][name] == total(ledger, "training", name) + total(
            ledger, "scoring", name
        )


def test_prompt_tokens_are_those_of_the_prompts(tmp_path):
    trainer, _, ledger = go(tmp_path)
    prompts = trainer.train_dataset["prompt"]
    assert ledger["stage_1"]["scoring"]["tokens_prompt"] == 4 * sum(
        map(len, prompts)
    )  # one token per character
    # The first stage has every prompt of its pool once, and nothing to fill up with.
    chosen = trainer.callback_handler.callbacks[-1].selected("stage_1")
    assert ledger["stage_1"]["training"]["tokens_prompt"] == 4 * sum(
        len(prompts[i]) for i in chosen
    )


def test_scoring_is_charged_for_what_it_captures_and_reads(tmp_path):
    _, _, ledger = go(tmp_path / "gradients", settings(stages=[6]))
    captured = ledger["stage_1"]["scoring"]
    assert (
        0
        < captured["tokens_trained"]
        < 2 * (captured["tokens_generated"] + captured["tokens_prompt"])
    )
    assert captured["seconds"] > 0
    trainer, _, ledger = go(tmp_path / "likelihoods", settings(stages=[6], selector="ppl_top"))
    # Given its prompt and alone after the generation prompt "=": one digit of solution each, one token to start from.
    prompts = trainer.train_dataset["prompt"]
    assert (
        ledger["stage_1"]["scoring"]["tokens_forward"]
        == sum(len(prompt) + 1 for prompt in prompts) + 12 * 2
    )
    assert ledger["stage_1"]["scoring"]["tokens_generated"] == 0
    _, _, ledger = go(tmp_path / "random", settings(stages=[6], selector="random"))
    assert ledger["stage_1"]["scoring"] == {**dict.fromkeys(TOKENS, 0), "seconds": 0.0}


def test_a_validation_set_is_charged_too(tmp_path):
    trusted = cases.dataset(4)
    selector = settings(stages=[6], selector="validation_alignment")
    trainer, counter, ledger = go(tmp_path, selector, validation=trusted)
    read = sum(map(len, [*trainer.train_dataset["prompt"], *trusted["prompt"]]))
    assert ledger["stage_1"]["scoring"]["tokens_prompt"] == 4 * read
    assert ledger["stage_1"]["scoring"]["tokens_generated"] == counter.generated["scoring"]


@pytest.mark.parametrize("step", [4, 7])  # a boundary, and inside a stage and a generation
def test_a_resumed_run_has_the_ledger_of_an_uninterrupted_one(tmp_path, step):
    options = dict(save_strategy="steps", save_steps=1, num_iterations=2, logging_steps=2)
    _, _, whole = go(tmp_path / "whole", **options)
    with pytest.raises(Killed):
        go(tmp_path / "killed", callbacks=[KillAt(step)], **options)
    _, _, resumed = go(tmp_path / "killed", resume=True, **options)
    for phase, entry in whole.items():
        for kind in entry if phase != "total" else ():
            assert {name: resumed[phase][kind][name] for name in TOKENS} == {
                name: entry[kind][name] for name in TOKENS
            }
            assert resumed[phase][kind]["seconds"] > 0 or entry[kind]["seconds"] == 0
    assert {name: resumed["total"][name] for name in TOKENS} == {
        name: whole["total"][name] for name in TOKENS
    }


WORKER = """
import json, sys
from pathlib import Path
import test_ledger
from trl_learnalign.distributed import Ranks

trainer, counter, ledger = test_ledger.go(sys.argv[1], per_device_train_batch_size=4)
assert trainer.accelerator.num_processes == 2
counted = Ranks(trainer.accelerator).gather([counter.generated])
if trainer.accelerator.is_main_process:
    seen = trainer.state.num_input_tokens_seen
    (Path(sys.argv[1]) / "found.json").write_text(json.dumps({"counted": counted, "ledger": ledger, "seen": seen}))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_the_ledger_of_two_processes_is_their_sum(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
    ]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    paths = (Path(__file__).parent, cases.ROOT / "tests" / "helpers", cases.ROOT)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    done = subprocess.run(
        [*command, str(tmp_path / "worker.py"), str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=cases.HANGS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "run" / "found.json").read_text())
    for kind in ("training", "scoring"):
        assert total(found["ledger"], kind, "tokens_generated") == sum(
            one[kind] for one in found["counted"]
        )
    read = [
        total(found["ledger"], "training", name) for name in ("tokens_generated", "tokens_prompt")
    ]
    assert sum(read) == found["seen"]


# ---- the sums -------------------------------------------------------------------------------------------------------


def test_costs_add_up():
    one, other = Cost(1, 2, 3, 4, 0.5), Cost(10, 20, 30, 40, 1.0)
    assert one + other == Cost(11, 22, 33, 44, 1.5)
    assert one.forward_equivalents == one.compute(1) == 1 + 2 + 3 + 3 * 4
    assert one.compute(8) == 8 * 1 + 2 + 3 + 3 * 4


def test_the_meter_counts_each_generation_once_however_the_trainer_logs():
    times = iter([0.0, 5.0, 7.0, 7.0, 7.0, 0.0, 100.0, 101.0])
    clock = times.__next__
    meter = TrainingMeter(rollouts=4, clock=clock)
    meter.begin(seen=100)
    lengths = [2.5]
    meter.add_step(lengths)
    meter.add_step(lengths)  # a step without a generation of its own
    lengths.append(3.0)
    meter.add_step(lengths)
    meter.add_step([1.0])  # the trainer has logged
    assert meter.cost(seen=150) == Cost(26, 24, 0, 50, 2.0)
    assert meter.cost(seen=150, passes=2, forwards=1) == Cost(26, 24, 50, 100, 2.0)
    kept = json.loads(json.dumps(meter.state_dict()))
    other = TrainingMeter(rollouts=4, clock=clock)
    other.load_state_dict(kept)
    assert other.cost(seen=150) == Cost(26, 24, 0, 50, 3.0)


def test_a_ledger_has_the_phases_that_cost_something():
    cost = {
        "tokens_generated": 1,
        "tokens_prompt": 1,
        "tokens_forward": 0,
        "tokens_trained": 2,
        "seconds": 1.0,
    }
    ledger = Ledger()
    for phase, account in (("warmup", "training"), ("stage_1", "scoring"), ("stage_1", "training")):
        ledger.charge(phase, account, Cost(**cost))
    written = ledger.to_json()
    assert list(written) == ["warmup", "stage_1", "total"]
    assert list(written["stage_1"]) == ["scoring", "training"]
    assert written["stage_1"]["scoring"] == cost
    assert written["total"] == {
        **{name: 3 * value for name, value in cost.items()},
        "forward_equivalents": 24.0,
    }
    dear = Ledger(ledger.entries, price=8)
    assert dear.to_json()["total"]["forward_equivalents"] == 24 + 3 * 7
    assert dear.compute(Cost(tokens_generated=2)) == 16
    assert ledger.sum("training") == Cost(2, 2, 0, 4, 2.0)
    ledger.charge("warmup", "training", Cost(**cost))  # to the same account once more
    assert ledger.entries["warmup"]["training"] == Cost(2, 2, 0, 4, 2.0)

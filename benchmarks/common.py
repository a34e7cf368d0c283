"""What the benchmarks share: a trainer on a random model, made-up rollouts, clocks, memory, tables, JSON."""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

from trl_learnalign.bridge.hooks import preserve_trainer_state
from trl_learnalign.bridge.policy import gradient_capture
from trl_learnalign.gradients.projection import Projection
from trl_learnalign.measuring.generation import RolloutGroup, roll_out
from trl_learnalign.measuring.gradient_features import GradientFeaturizer
from trl_learnalign.records.store import write_atomically
from trl_learnalign.success import SuccessRule
from trl_learnalign.toy.model import CHECKPOINTING, MAX_COMPLETION_LENGTH, make_base_model
from trl_learnalign.toy.tasks import accuracy_reward, build_pool

SUMS = (
    "Anna has {a} apples and buys {b} more. How many apples does she have? Answer:",
    "A train goes {a} miles an hour for {b} hours. How far does it go? Answer:",
    "There are {a} boxes with {b} pencils in each. How many pencils are there? Answer:",
    "Tom had {a} dollars and spent some. Now he has {b}. How much did he spend or earn? Answer:",
    "Write a short story about {a} cats and {b} dogs.",
)
SAMPLED_TOGETHER = 8  # prompts
MODELS = ("tiny", "small", "smollm", "toy")
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "numpy",
    "trl-learnalign",
    "bergson",
    "traker",
    "dattri",
)


def parser(description: str, model: str | None = "small") -> argparse.ArgumentParser:
    """Command line with the options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    made.add_argument("--threads", type=int, default=1, help="threads of torch")
    made.add_argument(
        "--seed", type=int, default=0, help="seed of weights, rollouts and projections"
    )
    if model is not None:
        made.add_argument(
            "--model",
            choices=MODELS,
            default=model,
            help="small: Qwen2, 4.45 M parameters; smollm: Llama of SmolLM2-135M's shape, 210 linear layers; "
            "tiny: for tests (all three with random weights, random tokens and made-up rewards); toy: the "
            "quickstart's trained model of 0.3 M parameters with its own tasks, rollouts and rewards",
        )
        made.add_argument(
            "--chance", action="store_true", help="rollouts are right at random, whatever they say"
        )
        made.add_argument(
            "--checkpoint",
            metavar="DIR",
            help="a causal LM and its tokenizer instead; rollouts are then sampled",
        )
    return made


def rank(text: str) -> int | str | None:
    """A `capture_rank` on the command line."""
    return text if text == "auto" else None if text == "none" else int(text)


@contextmanager
def prepared(options: argparse.Namespace) -> Iterator[tuple[GRPOTrainer, list[RolloutGroup]]]:
    """A trainer and rollouts as the command line describes them."""
    if options.model == "toy" and options.checkpoint is None:
        with toy_trainer(options) as trainer:
            yield trainer, toy_groups(trainer, options.groups, options.seed)
        return
    model, processing_class = load_model(options)
    groups = groups_for(model, processing_class, options)
    with make_trainer(model, options.rollouts, processing_class) as trainer:
        yield trainer, groups


@contextmanager
def toy_trainer(options: argparse.Namespace) -> Iterator[GRPOTrainer]:
    """The quickstart's model (made once, in a minute or two), tasks and reward."""
    folder = make_base_model(Path(__file__).parent.parent / "outputs" / "toy")
    with make_trainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        options.rollouts,
        AutoTokenizer.from_pretrained(folder),
        build_pool("mixed", 2000, options.seed),
        accuracy_reward,
        max_completion_length=MAX_COMPLETION_LENGTH,
        temperature=1.0,
    ) as trainer:
        yield trainer


def toy_groups(trainer: GRPOTrainer, count: int, seed: int) -> list[RolloutGroup]:
    """The first `count` prompts with right and wrong rollouts."""
    groups: list[RolloutGroup] = []
    with preserve_trainer_state(trainer):
        for first in range(0, len(trainer.train_dataset), SAMPLED_TOGETHER):
            found = roll_out(
                trainer,
                range(first, first + SAMPLED_TOGETHER),
                seed + first,
                SuccessRule(0, "accuracy_reward", 0.5),
            )
            groups += [group for group in found if 0 < group.successes.mean() < 1]
            if len(groups) >= count:
                return groups[:count]
    raise SystemExit(
        f"--groups {count}: only {len(groups)} prompts have right and wrong rollouts; ask for fewer."
    )


def load_model(options: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """The model and the tokenizer that the command line names."""
    if options.checkpoint is None:
        return make_model(options.model, options.seed), tokenizer()
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(options.checkpoint)


def groups_for(
    model: PreTrainedModel, processing_class: Any, options: argparse.Namespace
) -> list[RolloutGroup]:
    """Rollout groups as the command line describes them."""
    if options.checkpoint is None:
        return made_up_groups(
            options.groups,
            options.rollouts,
            options.prompt_tokens,
            options.completion_tokens,
            model.config.vocab_size,
            options.seed,
            options.chance,
        )
    return sampled_groups(model, processing_class, options)


@torch.no_grad()
def sampled_groups(
    model: PreTrainedModel, processing_class: Any, options: argparse.Namespace
) -> list[RolloutGroup]:
    """Rollouts that the model samples at temperature 1 for small tasks; which of them are right is made up."""
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    model.eval()
    questions = []
    for _ in range(options.groups):
        a, b, kind = (int(torch.randint(2, 60, (), generator=generator)) for _ in range(3))
        questions.append(SUMS[kind % len(SUMS)].format(a=a, b=b))
    processing_class.padding_side = "left"
    encoded = processing_class(questions, return_tensors="pt", padding=True)
    groups: list[RolloutGroup] = []
    for first in range(0, len(questions), SAMPLED_TOGETHER):
        part = slice(first, first + SAMPLED_TOGETHER)
        ids, mask = encoded.input_ids[part], encoded.attention_mask[part]
        sampled = model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            num_return_sequences=options.rollouts,
            # All of one length: where a completion ends makes no difference to what is measured.
            min_new_tokens=options.completion_tokens,
            max_new_tokens=options.completion_tokens,
            pad_token_id=processing_class.pad_token_id,
        )[:, ids.shape[1] :].unflatten(0, (len(ids), -1))
        for prompt_ids, own, completion_ids in zip(ids, mask, sampled, strict=True):
            right = int(torch.randint(1, options.rollouts, (), generator=generator))
            successes = successes_of(completion_ids, right, options.chance, generator)
            repeated = prompt_ids[own.bool()].expand(options.rollouts, -1)
            groups.append(group_of(len(groups), repeated, list(completion_ids), successes))
        log(f"rollouts of {len(groups)} of {options.groups} prompts")
    return groups


def make_model(name: str, seed: int) -> PreTrainedModel:
    """A randomly initialised causal LM with tied embeddings.

    Args:
        name (`str`): One of `MODELS`.
        seed (`int`): Seed of the weights.
    """
    torch.manual_seed(seed)
    shared = dict(tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    if name == "smollm":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49152,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                max_position_embeddings=2048,
                initializer_range=1 / 24,
                **shared,
            )
        )
    hidden, wide, layers = (256, 704, 6) if name == "small" else (32, 64, 2)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer()),
            hidden_size=hidden,
            intermediate_size=wide,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=hidden**-0.5,
            **shared,
        )
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    special = ["[PAD]", "[EOS]", "[UNK]"]
    alphabet = string.ascii_lowercase + string.digits + " ?!.,:;'\"()[]{}+-*/=<>%$&#\n"
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        padding_side="left",
    )


@contextmanager
def make_trainer(
    policy: PreTrainedModel,
    rollouts: int,
    processing_class: Any = None,
    dataset: Dataset | None = None,
    reward: Callable[..., list[float]] | None = None,
    **options: Any,
) -> Iterator[GRPOTrainer]:
    """An unmodified `GRPOTrainer` in a temporary folder.

    Args:
        policy (`PreTrainedModel`): The model.
        rollouts (`int`): G.
        processing_class (optional): Tokenizer; default: one token per character.
        dataset (`datasets.Dataset`, *optional*): Prompts to roll out.
        reward (callable, *optional*): Reward function.
        options: For `GRPOConfig`.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(
            per_device_train_batch_size=rollouts,
            num_generations=rollouts,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
        )
        settings[CHECKPOINTING] = False
        yield GRPOTrainer(
            model=policy,
            reward_funcs=reward
            or (lambda completions, **_: [float(len(text)) for text in completions]),
            args=GRPOConfig(output_dir=folder, **{**settings, **options}),
            train_dataset=dataset or Dataset.from_dict({"prompt": ["a", "b"]}),
            processing_class=processing_class or tokenizer(),
        )


def made_up_groups(
    count: int,
    rollouts: int,
    prompt_tokens: int,
    completion_tokens: int,
    vocabulary: int,
    seed: int,
    by_chance: bool = False,
) -> list[RolloutGroup]:
    """Rollout groups of random tokens, each with right and wrong rollouts and GRPO's advantages.

    Args:
        count (`int`): P.
        rollouts (`int`): G.
        prompt_tokens (`int`): Q.
        completion_tokens (`int`): C.
        vocabulary (`int`): Number of tokens; the first three are special.
        seed (`int`): Seed.
        by_chance (`bool`, *optional*, defaults to `False`): See [`successes_of`].
    """
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for prompt in range(count):
        prompt_ids = torch.randint(3, vocabulary, (1, prompt_tokens), generator=generator).expand(
            rollouts, -1
        )
        completion_ids = torch.randint(
            3, vocabulary, (rollouts, completion_tokens), generator=generator
        )
        right = int(torch.randint(1, rollouts, (), generator=generator))
        successes = successes_of(completion_ids, right, by_chance, generator)
        groups.append(group_of(prompt, prompt_ids, list(completion_ids), successes))
    return groups


def successes_of(
    completion_ids: torch.Tensor, right: int, by_chance: bool, generator: torch.Generator
) -> torch.Tensor:
    """`(G,)`: which rollouts are right.

    A reward is the same function for all prompts, so that their gradients have something in common: here it is low
    token ids (in a real vocabulary: frequent words). By chance, gradients of different prompts have nothing to do
    with each other, and nearly every pair of scores is a near tie.

    Args:
        completion_ids (`torch.Tensor`): `(G, C)`.
        right (`int`): How many are right.
        by_chance (`bool`): Right at random.
        generator (`torch.Generator`): For chance.
    """
    if by_chance:
        places = torch.randperm(len(completion_ids), generator=generator)
    else:
        places = completion_ids.double().log1p().mean(dim=1).argsort().argsort()
    return (places < right).double()


def group_of(
    prompt: int,
    prompt_ids: torch.Tensor,
    completions: Sequence[torch.Tensor],
    successes: torch.Tensor,
) -> RolloutGroup:
    """One prompt's rollouts with GRPO's advantages of their successes.

    Args:
        prompt (`int`): Number of the prompt.
        prompt_ids (`torch.Tensor`): `(G, Q)`.
        completions (sequence of `torch.Tensor`): G token lists of any lengths.
        successes (`torch.Tensor`): `(G,)`.
    """
    lengths = torch.tensor([len(ids) for ids in completions])
    completion_ids = nn.utils.rnn.pad_sequence(list(completions), batch_first=True)
    mask = (torch.arange(completion_ids.shape[1]) < lengths.unsqueeze(1)).long()
    advantages = (successes - successes.mean()) / (successes.std() + 1e-4)
    inputs = {
        "prompt_ids": prompt_ids.contiguous(),
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": mask,
        "advantages": advantages.float(),
        "num_items_in_batch": mask.sum(),
    }
    return RolloutGroup(prompt, inputs, successes.float().unsqueeze(1), successes, lengths)


@contextmanager
def engine_of(
    trainer: GRPOTrainer, projection: Projection, tokens: int
) -> Iterator[GradientFeaturizer]:
    """The package's capture with some projection.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        projection (`Projection`): What becomes of the gradients.
        tokens (`int`): Token budget of a forward pass.
    """
    with preserve_trainer_state(trainer), gradient_capture(trainer, projection) as capture:
        yield GradientFeaturizer(trainer, capture, tokens, lambda values: values)


class Nothing(Projection):
    """A projection that does nothing: what is left is the forward and backward pass without weight gradients."""

    version = "nothing"

    def add_dense(self, *_: Any) -> None:
        pass

    add_outer = add_rows = add_dense


@dataclass
class Timing:
    """Seconds of each method in each round.

    Args:
        seconds (`dict[str, list[float]]`): By method.
    """

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of a method."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, over: str) -> float:
        """Median over the rounds of the quotient within a round: slow drifts of the machine cancel."""
        return statistics.median(
            a / b for a, b in zip(self.seconds[name], self.seconds[over], strict=True)
        )


def interleaved(
    methods: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]
) -> Timing:
    """Time all methods in turn, `repeats` times, after one round that warms up caches.

    Args:
        methods (mapping of `str` to callable): What to time.
        repeats (`int`): Rounds.
        clock (callable): Seconds.
    """
    timing = Timing({name: [] for name in methods})
    for name, method in methods.items():
        log(f"warming up: {name}")
        method()
    for number in range(repeats):
        # Every other round backwards, so that no method always follows the same one.
        order = list(methods) if number % 2 == 0 else list(reversed(methods))
        for name in order:
            gc.collect()
            start = clock()
            methods[name]()
            timing.seconds[name].append(clock() - start)
        log(f"round {number + 1} of {repeats}")
    return timing


def clock_for(threads: int) -> tuple[str, Callable[[], float]]:
    """CPU time with one thread: unlike wall time, it does not count other processes. Wall time with more."""
    return ("cpu", time.process_time) if threads == 1 else ("wall", time.perf_counter)


def peak_megabytes(method: Callable[[], Any]) -> float | None:
    """Peak resident memory of a call beyond what was resident before it; Linux only, elsewhere `None`."""
    resets = Path("/proc/self/clear_refs")
    if not resets.exists():
        method()
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # pages that were freed but not given back
    before = _status("VmRSS")
    resets.write_text("5")  # the peak is counted from here
    method()
    return _status("VmHWM") - before


def peak_megabytes_in_child(prepare: Callable[[], Any], method: Callable[[], Any]) -> float | None:
    """[`peak_megabytes`] in a forked child, which leaves this process as it was.

    Args:
        prepare (callable): Called first; what it leaves in memory is no part of the figure.
        method (callable): What to measure.
    """
    reader, writer = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        prepare()
        writer.send(peak_megabytes(method))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    writer.close()
    try:
        return reader.recv()
    finally:
        process.join()


def _status(name: str) -> float:
    """A line of `/proc/self/status`, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024 / 1e6


def log(message: str) -> None:
    """Progress, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table that is valid Markdown."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    print(f"\n{title}\n")
    for line in [list(header), ["-" * width for width in widths], *cells]:
        print(
            "| "
            + " | ".join(value.ljust(width) for value, width in zip(line, widths, strict=True))
            + " |"
        )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(
    path: Path | None, figures: Mapping[str, Any], arguments: argparse.Namespace
) -> None:
    """Write figures with settings, versions and machine."""
    settings = {name: value for name, value in vars(arguments).items() if name != "json"}
    content = {**figures, "settings": settings, "versions": versions(), "machine": machine()}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, default=str) + "\n")


def write_table(path: Path, table: pa.Table, origin: Mapping[str, Any]) -> None:
    """Write a Parquet file whole or not at all.

    Args:
        path (`Path`): The file.
        table (`pa.Table`): Its rows.
        origin (mapping): What made them, by name: JSON in the file's metadata.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = dict(table.schema.metadata or {})
    for name, value in origin.items():
        metadata[name.encode()] = json.dumps(value).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(metadata), sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def versions() -> dict[str, str]:
    """Versions of the packages whose speed is measured."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = [
            line for line in information.read_text().splitlines() if line.startswith("model name")
        ]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }

"""What gradient capture costs, against plain training of the same rollouts and against other ways to do it.

Everything runs in one process on the same model, rollouts and micro-batches, in turn, and each quotient is the median
over the rounds of the quotient within a round:

- `plain`: the trainer's own forward and backward pass, accumulating into `.grad` as training does;
- `floor`: the capture with a projection that does nothing: forward and backward without weight gradients;
- `exact`, `factored`: the capture with the count-sketch, without and with `capture_rank`;
- `loop`: one prompt at a time with `torch.autograd.grad` over all parameters, no projection;
- `less`: one prompt at a time into `.grad`, then a dense random projection of the flat gradient (LESS, TRAK on a CPU);
- `bergson`, `trak`, `dattri`: those packages, where installed. bergson gives one gradient per rollout of the linear
  layers alone (no embedding, head, norms or biases), 16×16 numbers for each; its rows are added up per prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn
from trl import GRPOTrainer

from trl_learnalign.gradients.projection import CountSketch, Projection
from trl_learnalign.measuring.generation import RolloutGroup

# Prompts, and prompts in a micro-batch: a few seconds a round for each model.
SIZES = {"tiny": (2, 2), "small": (8, 4), "smollm": (2, 1), "toy": (16, 16)}
GRADIENTS_AT_ONCE = 16  # LESS projects 16 gradients at a time
LESS_BLOCK = 128  # and generates 128 rows of its matrix at a time
BERGSON_DIM = 16

Method = Callable[[], Any]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    clock_name, clock = common.clock_for(options.threads)
    with contextlib.ExitStack() as stack:
        trainer, groups = stack.enter_context(common.prepared(options))
        model = trainer.model
        bench = Bench(trainer, groups, options)
        methods: dict[str, Method] = {
            "plain": bench.plain,
            "floor": lambda: bench.capture(common.Nothing(options.dim, options.seed)),
            "exact": lambda: bench.capture(bench.exact),
            "factored": lambda: bench.capture(bench.factored),
            "loop": bench.loop,
        }
        skipped = {}
        if "bergson" in options.peers:
            if importlib.util.find_spec("bergson"):
                methods["bergson"] = stack.enter_context(bergson(trainer, groups, options))
            else:
                skipped["bergson"] = "not installed"
        memory = bench.memory()
        timing = common.interleaved(methods, options.repeats, clock)
        dense, notes, skipped_too = dense_projections(
            options, sum(p.numel() for p in model.parameters()), clock
        )
    figures = summarise(timing, dense, memory)
    figures |= {
        "clock": clock_name,
        "notes": notes,
        "skipped": skipped | skipped_too,
        "model": describe(model, groups),
    }
    report(figures)
    common.write_json(options.json, figures, options)
    return figures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--groups", type=int, help="prompts; default by model")
    parser.add_argument(
        "--micro-batch", type=int, help="prompts in a forward pass; default by model"
    )
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts of a prompt, G")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--completion-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--dim", type=int, default=8192, help="feature dimensions, d")
    parser.add_argument(
        "--rank", type=common.rank, default="auto", help="capture_rank of the factored capture"
    )
    parser.add_argument(
        "--slice", type=int, default=1 << 20, help="gradient entries that dense projections run on"
    )
    parser.add_argument(
        "--peers", nargs="*", default=["bergson", "trak", "dattri"], help="packages to measure"
    )
    options = parser.parse_args(arguments)
    count, together = SIZES[options.model]
    options.groups = options.groups or count
    options.micro_batch = options.micro_batch or together
    return options


class Bench:
    """The methods that run inside the trainer.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        groups (sequence of `RolloutGroup`): Rollouts of the prompts.
        options (`argparse.Namespace`): Command line.
    """

    def __init__(
        self, trainer: GRPOTrainer, groups: Sequence[RolloutGroup], options: argparse.Namespace
    ):
        self.trainer = trainer
        self.groups = groups
        self.together = options.micro_batch
        self.tokens = max(group.tokens for group in groups) * options.rollouts * options.micro_batch
        self.exact = CountSketch(options.dim, options.seed)
        self.factored = CountSketch(options.dim, options.seed, options.rank)
        # Set by the trainer's own loop, which does not run here: one optimizer step over all micro-batches.
        trainer.current_gradient_accumulation_steps = -(-len(groups) // self.together)

    def plain(self, batches: int | None = None) -> None:
        """Forward and backward passes of training, of all micro-batches or the first few."""
        self.trainer.model.train()
        for first in range(0, len(self.groups), self.together)[:batches]:
            self._backward(self.groups[first : first + self.together])
        self.trainer._metrics[
            "train"
        ].clear()  # the loss appends its statistics, and nobody logs here

    def capture(self, projection: Projection, batches: int | None = None) -> torch.Tensor:
        """Features of all prompts, or those of the first few micro-batches."""
        end = len(self.groups) if batches is None else batches * self.together
        with common.engine_of(self.trainer, projection, self.tokens) as engine:
            return engine.features(self.groups[:end])

    def loop(self) -> None:
        """The gradient of each prompt by itself."""
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        for group in self.groups:
            loss = self.trainer.compute_loss(self.trainer.model, dict(group.inputs))
            torch.autograd.grad(loss, parameters)
        self.trainer._metrics["train"].clear()

    def memory(self) -> dict[str, float | None]:
        """Peak megabytes of one micro-batch: parameters, gradients (training has them) and all that is allocated."""
        found: dict[str, float | None] = {}
        parameters = 4 * sum(p.numel() for p in self.trainer.model.parameters()) / 1e6
        for name, method, resident in (
            ("plain", self.plain, 2 * parameters),
            # As after an optimizer step, when scoring begins: transformers has set gradients to `None`.
            ("exact", lambda n: self.capture(self.exact, n), parameters),
            ("factored", lambda n: self.capture(self.factored, n), parameters),
        ):
            # The first micro-batch makes what stays: gradients in training, tables of signs in the capture.
            step = common.peak_megabytes_in_child(lambda f=method: f(1), lambda f=method: f(1))
            found[f"{name}_step"] = step
            found[name] = None if step is None else resident + step
        return found

    def _backward(self, groups: Sequence[RolloutGroup]) -> None:
        parts = [group.inputs for group in groups]
        inputs = {
            name: torch.cat([part[name] for part in parts])
            if value.ndim
            else sum(part[name] for part in parts)
            for name, value in parts[0].items()
        }
        device = self.trainer.accelerator.device
        inputs = {name: value.to(device) for name, value in inputs.items()}
        self.trainer.accelerator.backward(self.trainer.compute_loss(self.trainer.model, inputs))


@contextlib.contextmanager
def bergson(
    trainer: GRPOTrainer, groups: Sequence[RolloutGroup], options: argparse.Namespace
) -> Iterator[Method]:
    """What `bergson build` runs, collecting in memory: its own batches, loss and hooks, projections to 16×16."""
    import bergson as package
    from datasets import Dataset

    rows = []
    for group in groups:
        for i in range(group.rollouts):
            prompt, answer = (
                group.inputs[name][i].tolist() for name in ("prompt_ids", "completion_ids")
            )
            labels = [-100] * len(prompt) + answer
            rows.append(
                {
                    "input_ids": prompt + answer,
                    "labels": labels,
                    "advantage": group.inputs["advantages"][i],
                }
            )
    data = Dataset.from_list(rows)
    size = options.micro_batch * options.rollouts
    batches = [
        list(range(first, min(first + size, len(rows)))) for first in range(0, len(rows), size)
    ]
    processor = package.GradientProcessor(
        projection_dim=BERGSON_DIM
    )  # keeps its matrices from run to run
    model = trainer.model

    with tempfile.TemporaryDirectory() as folder:
        config = package.IndexConfig(
            run_path=folder, projection_dim=BERGSON_DIM, loss_reduction="sum"
        )
        Path(config.partial_run_path).mkdir(parents=True, exist_ok=True)

        def run() -> torch.Tensor:
            trainable = [(p, p.requires_grad) for p in model.parameters()]
            try:
                # As its workers do, so that no weight gradients are formed.
                model.requires_grad_(False)
                model.get_input_embeddings().requires_grad_(True)
                collector = package.InMemoryCollector(
                    model=model.base_model, data=data, cfg=config, processor=processor
                )
                with quiet():
                    computer = package.CollectorComputer(
                        model=model, data=data, collector=collector, batches=batches, cfg=config
                    )
                    computer.run_with_collector_hooks()
            finally:
                for parameter, requires_grad in trainable:
                    parameter.requires_grad_(requires_grad)
            features = torch.cat(list(collector.gradients.values()), dim=1)
            return features.unflatten(0, (-1, options.rollouts)).sum(dim=1)

        yield run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and lists of layers."""
    from tqdm.auto import tqdm

    original = tqdm.__init__
    tqdm.__init__ = lambda self, *args, **kwargs: original(
        self, *args, **{**kwargs, "disable": True}
    )
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        tqdm.__init__ = original
        logging.disable(logging.NOTSET)


def dense_projections(
    options: argparse.Namespace, entries: int, clock: Callable[[], float]
) -> tuple[dict[str, float], dict[str, str], dict[str, str]]:
    """Seconds of dense projections of the prompts' gradients, extrapolated from a slice of the matrix.

    Returns:
        `tuple`: Seconds, notes on how they were found, and what was left out and why.
    """
    height = min(options.slice, entries)
    gradients = torch.randn(GRADIENTS_AT_ONCE, height)
    projectors: dict[str, tuple[Method, int]] = {
        "less": (lambda: less_block(gradients, options.seed), LESS_BLOCK)
    }
    skipped = {}
    dims = 200  # two blocks of the packages' default size
    if "trak" in options.peers:
        if importlib.util.find_spec("trak"):
            from trak.projectors import BasicProjector as Trak
            from trak.projectors import ProjectionType

            trak = Trak(height, dims, options.seed, ProjectionType.rademacher, torch.device("cpu"))
            projectors["trak"] = (lambda: trak.project(gradients, 0), dims)
        else:
            skipped["trak"] = "not installed"
    if "dattri" in options.peers:
        if importlib.util.find_spec("dattri"):
            from dattri.func import projection

            kind = projection.ProjectionType.rademacher
            dattri = projection.BasicProjector(
                height, dims, options.seed, kind, torch.device("cpu")
            )
            projectors["dattri"] = (lambda: dattri.project(gradients, 0), dims)
        else:
            skipped["dattri"] = "not installed"
    timing = common.interleaved(
        {name: method for name, (method, _) in projectors.items()}, 3, clock
    )
    factor = entries / height * options.dim * options.groups / GRADIENTS_AT_ONCE
    seconds = {name: timing.median(name) * factor / dims for name, (_, dims) in projectors.items()}
    notes = {
        name: f"loop + projection, the latter extrapolated from {height} of {entries} entries, {dims} of "
        f"{options.dim} dimensions and {GRADIENTS_AT_ONCE} gradients at once"
        for name, (_, dims) in projectors.items()
    }
    return seconds, notes, skipped


def less_block(gradients: torch.Tensor, seed: int) -> torch.Tensor:
    """A block of dense Rademacher projection, its matrix made anew as LESS and TRAK do without a GPU."""
    generator = torch.Generator().manual_seed(seed)
    matrix = (
        torch.empty(gradients.shape[1], LESS_BLOCK)
        .bernoulli_(0.5, generator=generator)
        .mul_(2)
        .sub_(1)
    )
    return gradients @ matrix


def describe(model: nn.Module, groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    """What was measured."""
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "head" not in name
    ]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "linear_layers": len(linear),
        "tokens_per_group": statistics.median(group.tokens * group.rollouts for group in groups),
    }


def summarise(
    timing: common.Timing, dense: dict[str, float], memory: dict[str, float | None]
) -> dict[str, Any]:
    """The figures: what others read first, then what they are made of."""
    seconds = {name: timing.median(name) for name in timing.seconds}
    seconds |= {name: seconds["loop"] + value for name, value in dense.items()}
    ratios = {
        f"{name}_over_plain": timing.ratio(name, "plain")
        for name in timing.seconds
        if name != "plain"
    }
    ratios |= {f"{name}_over_plain": seconds[name] / seconds["plain"] for name in dense}
    captures = {name: over(memory, name, "plain") for name in ("exact", "factored")}
    ratios |= {f"{name}_peak_memory_over_plain": value for name, value in captures.items()}
    ratios["peak_memory_over_plain"] = max(
        captures.values(), default=None, key=lambda value: value or 0.0
    )
    ratios["factored_over_floor_difference"] = (
        ratios["factored_over_plain"] - ratios["floor_over_plain"]
    )
    for name in ("bergson", "less"):
        if name in seconds:
            ratios[f"{name}_over_factored"] = seconds[name] / seconds["factored"]
            ratios[f"{name}_over_exact"] = seconds[name] / seconds["exact"]
    return {**ratios, "seconds": seconds, "rounds": timing.seconds, "memory_mb": memory}


def over(memory: dict[str, float | None], name: str, base: str) -> float | None:
    """A quotient, if both were measured."""
    a, b = memory[name], memory[base]
    return None if a is None or b is None else a / b


def report(figures: dict[str, Any]) -> None:
    """Print the tables."""
    model = figures["model"]
    title = (
        f"{model['parameters'] / 1e6:.2f} M parameters, {model['linear_layers']} linear layers, "
        f"{model['tokens_per_group']} tokens per prompt; {figures['clock']} seconds"
    )
    rows = [
        (
            name,
            seconds,
            figures.get(f"{name}_over_plain", 1.0),
            "extrapolated" if name in figures["notes"] else "",
        )
        for name, seconds in figures["seconds"].items()
    ]
    rows += [(name, None, None, reason) for name, reason in figures["skipped"].items()]
    common.table(title, ("method", "seconds", "over plain", ""), rows)
    memory = figures["memory_mb"]
    common.table(
        "Peak memory of one micro-batch, MB (optimizer state left out)",
        ("method", "total", "over plain", "of the micro-batch alone"),
        [
            (name, memory[name], over(memory, name, "plain"), memory[f"{name}_step"])
            for name in ("plain", "exact", "factored")
        ],
    )


if __name__ == "__main__":
    main(sys.argv[1:])

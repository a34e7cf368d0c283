"""How well projected gradients keep what selection needs, against the full gradient of the same rollouts.

For each projection, three figures over several seeds (medians): the root mean square error of the cosines of all pairs
of prompts, Spearman's correlation of the final score (Eq. 9) with the one from full gradients, and the overlap of the
best quarter. Full gradients are captured once; projections of them are what a capture gives (they are linear), and one
capture of each kind is compared with that. bergson, where installed, gives one gradient per rollout of the linear
layers, 16x16 numbers for each; its rows are added up per prompt.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import capture_cost
import common
import numpy as np
import torch

from trl_learnalign import scoring
from trl_learnalign.bridge.policy import trainable_sizes
from trl_learnalign.gradients.projection import Projection, Unprojected, make_projection
from trl_learnalign.intervals import spearman

GROUPS = {"tiny": 6, "small": 48, "smollm": 16, "toy": 128}
AT_ONCE = 1 << 22  # entries projected in one go
MAX_DENSE = 400_000  # entries that the dense projection is tried on, with the first seed alone
Rank = int | str | None


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        trainer, groups = stack.enter_context(common.prepared(options))
        full = FullGradients(trainer, groups, options, stack)
        truth = full.cosines()
        learnability = scoring.learnability(torch.stack([group.successes for group in groups]))
        judge = Judge(truth, learnability)
        rows, captured = measure(trainer, groups, full, judge, options, skipped)
        if "bergson" in options.peers and importlib.util.find_spec("bergson"):
            run = stack.enter_context(capture_cost.bergson(trainer, groups, options))
            rows.append({"name": "bergson", "dim": None, "rank": None, **judge(cosines(run()))})
        elif "bergson" in options.peers:
            skipped["bergson"] = "not installed"
    at_default = {row["name"]: row for row in rows if row["dim"] in (options.dim, None)}
    keys = ("cosine_rmse", "spearman", "top25_overlap")
    figures: dict[str, Any] = {
        name: {key: at_default[name][key] for key in keys}
        for name in ("exact", "factored", "bergson")
        if name in at_default
    }
    if "bergson" in figures:
        figures["bergson_rmse_over_factored"] = (
            figures["bergson"]["cosine_rmse"] / figures["factored"]["cosine_rmse"]
        )
    off_diagonal = truth[~np.eye(len(truth), dtype=bool)]
    figures |= {
        "rows": rows,
        "capture_relative_error": captured,
        "true_cosines": {"mean": float(off_diagonal.mean()), "std": float(off_diagonal.std())},
        "skipped": skipped,
        "model": capture_cost.describe(trainer.model, groups) | {"groups": len(groups)},
    }
    report(figures)
    common.write_json(options.json, figures, options)
    return figures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = common.parser(__doc__, "toy")
    parser.add_argument("--groups", type=int, help="prompts; default by model")
    parser.add_argument("--micro-batch", type=int, default=1, help="prompts in a forward pass")
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts of a prompt, G")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--completion-tokens", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the projection")
    parser.add_argument(
        "--dim", type=int, default=8192, help="feature dimensions, d, of the main figures"
    )
    parser.add_argument(
        "--dims",
        type=int,
        nargs="*",
        default=[1024, 16384],
        help="others to try with exact gradients",
    )
    parser.add_argument(
        "--rank", type=common.rank, default="auto", help="capture_rank of the main figures"
    )
    parser.add_argument("--ranks", type=common.rank, nargs="*", default=[32], help="others to try")
    parser.add_argument("--peers", nargs="*", default=["bergson"], help="packages to measure")
    parser.add_argument(
        "--folder", type=Path, help="where full gradients go; default: a temporary folder"
    )
    options = parser.parse_args(arguments)
    options.groups = options.groups or GROUPS["smollm" if options.checkpoint else options.model]
    return options


class FullGradients:
    """Unprojected gradients of all prompts, in a file that is mapped into memory.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        groups (sequence of `RolloutGroup`): Rollouts of the prompts.
        options (`argparse.Namespace`): Command line.
        stack (`ExitStack`): Closes the file's folder.
    """

    def __init__(
        self, trainer: Any, groups: Sequence[Any], options: argparse.Namespace, stack: ExitStack
    ):
        self.shapes = {name: tuple(p.shape) for name, p in trainer.model.named_parameters()}
        sizes = trainable_sizes(trainer)
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder))
        shape = (len(groups), sum(sizes.values()))
        self.values = np.memmap(
            Path(folder) / "gradients", dtype=np.float32, mode="w+", shape=shape
        )
        projection = Unprojected(sizes)
        ends = np.cumsum(list(sizes.values())).tolist()
        self.slices = {
            name: slice(end - size, end)
            for (name, size), end in zip(sizes.items(), ends, strict=True)
        }
        with common.engine_of(trainer, projection, tokens_at_once(groups, options)) as engine:
            for number, group in enumerate(groups):
                self.values[number] = engine.features([group])[0].numpy()
                common.log(f"full gradient {number + 1} of {len(groups)}")

    def parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and gradients, `(P, *shape)`, of each parameter."""
        for name, place in self.slices.items():
            part = torch.from_numpy(np.ascontiguousarray(self.values[:, place]))
            yield name, part.view(len(part), *self.shapes[name])

    def cosines(self) -> np.ndarray:
        """Cosines of all pairs, `(P, P)`; sums in float64."""
        gram = torch.zeros(len(self.values), len(self.values), dtype=torch.float64)
        for _, part in self.parts():
            flat = part.flatten(1)
            for start in range(0, flat.shape[1], 1 << 20):
                piece = flat[:, start : start + (1 << 20)]
                gram += (piece @ piece.T).double()
        norms = gram.diagonal().sqrt()
        return (gram / norms / norms.unsqueeze(1)).numpy()

    def projected(self, projections: Sequence[Projection]) -> list[torch.Tensor]:
        """Features of each projection, `(P, D)`; the file is read once for all."""
        outs = [torch.zeros(len(self.values), projection.dim) for projection in projections]
        for name, part in self.parts():
            together = max(1, AT_ONCE // part[0].numel())
            for projection, out in zip(projections, outs, strict=True):
                for p in range(0, len(part), together):
                    projection.add_dense(out[p : p + together], name, part[p : p + together])
        return outs


class Judge:
    """Compares cosines with true ones.

    Args:
        truth (`np.ndarray`): `(P, P)` cosines of full gradients.
        learnability (`torch.Tensor`): `(P,)`.
    """

    def __init__(self, truth: np.ndarray, learnability: torch.Tensor):
        self.truth = truth
        self.v = learnability.numpy()

    def scores(self, matrix: np.ndarray) -> np.ndarray:
        """Row averages of `S` (Eq. 9)."""
        return self.v * (matrix @ self.v) / len(self.v)

    def __call__(self, found: np.ndarray) -> dict[str, float]:
        """The three figures."""
        pairs = np.triu_indices(len(self.truth), 1)
        ours, theirs = self.scores(found), self.scores(self.truth)
        quarter = max(1, len(ours) // 4)
        both = set(np.argsort(-ours)[:quarter]) & set(np.argsort(-theirs)[:quarter])
        return {
            "cosine_rmse": float(np.sqrt(np.mean((found[pairs] - self.truth[pairs]) ** 2))),
            "spearman": spearman(ours, theirs),
            "top25_overlap": len(both) / quarter,
        }


def cosines(features: torch.Tensor) -> np.ndarray:
    """Cosines of all pairs of rows."""
    directions = scoring.normalised(features)
    return (directions @ directions.T).numpy()


def measure(
    trainer: Any,
    groups: Sequence[Any],
    full: FullGradients,
    judge: Judge,
    options: argparse.Namespace,
    skipped: dict[str, str],
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Each projection with each seed.

    Returns:
        `tuple`: Rows of figures, and how far captured features are from projections of the full gradients, relative.
    """
    kinds: list[tuple[str, str, int, Rank]] = [
        ("exact", "count_sketch", options.dim, None),
        ("factored", "count_sketch", options.dim, options.rank),
        *((f"exact, d={dim}", "count_sketch", dim, None) for dim in options.dims),
        *((f"factored, k={rank}", "count_sketch", options.dim, rank) for rank in options.ranks),
    ]
    if full.values.shape[1] <= MAX_DENSE:
        kinds.append(("rademacher", "rademacher", options.dim, None))
    else:
        skipped["rademacher"] = f"more than {MAX_DENSE} parameters"
    found: dict[str, list[dict[str, float]]] = {name: [] for name, *_ in kinds}
    captured = {}
    for seed in range(options.seeds):
        common.log(f"projections, seed {seed + 1} of {options.seeds}")
        # The dense projection takes as long as everything else together.
        tried = [kind for kind in kinds if seed == 0 or kind[1] != "rademacher"]
        projections = [make_projection(kind, dim, seed, rank, {}) for _, kind, dim, rank in tried]
        for (name, *_), projection, features in zip(
            tried, projections, full.projected(projections), strict=True
        ):
            found[name].append(judge(cosines(features)))
            if seed == 0 and name in ("exact", "factored"):
                captured[name] = capture_error(trainer, groups, projection, features, options)
    rows = [
        {
            "name": name,
            "dim": dim,
            "rank": rank,
            **{key: statistics.median(run[key] for run in found[name]) for key in found[name][0]},
            "by_seed": found[name],
        }
        for name, _, dim, rank in kinds
    ]
    return rows, captured


def capture_error(
    trainer: Any,
    groups: Sequence[Any],
    projection: Projection,
    expected: torch.Tensor,
    options: argparse.Namespace,
) -> float:
    """Largest relative distance of captured features from projections of the full gradients."""
    with common.engine_of(trainer, projection, tokens_at_once(groups, options)) as engine:
        features = engine.features(groups)
    return float(((features - expected).norm(dim=1) / expected.norm(dim=1)).max())


def tokens_at_once(groups: Sequence[Any], options: argparse.Namespace) -> int:
    """Token budget of a forward pass of `--micro-batch` prompts."""
    return max(group.tokens for group in groups) * options.rollouts * options.micro_batch


def report(figures: Mapping[str, Any]) -> None:
    """Print the table."""
    model = figures["model"]
    title = (
        f"{model['groups']} prompts, {model['parameters'] / 1e6:.2f} M parameters, {model['linear_layers']} linear "
        f"layers; true cosines {figures['true_cosines']['mean']:.3f} ± {figures['true_cosines']['std']:.3f}"
    )
    header = ("features", "d", "capture_rank", "cosine RMSE", "Spearman", "top-25 % overlap")
    keys = ("name", "dim", "rank", "cosine_rmse", "spearman", "top25_overlap")
    lines = [[row[key] for key in keys] for row in figures["rows"]]
    lines += [[name, *[None] * 4, reason] for name, reason in figures["skipped"].items()]
    common.table(title, header, lines)
    print(
        "\nCaptured features against projections of full gradients, relative:",
        figures["capture_relative_error"],
    )


if __name__ == "__main__":
    main(sys.argv[1:])

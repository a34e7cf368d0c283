"""`docs/results/selection.md` and its plot from the finished cells of the selection table."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from scipy import stats

from selection.cells import BUDGETED, COVERING, COVERING_RESULTS, STEPS
from trl_learnalign.records.store import write_atomically

PAGE = "selection.md"
HEADER = """# Choosing a subset once: all tables

Made by `python benchmarks/selection/table.py --report`: do not edit. What the tables show, and the four pools
(*regimes*): [results.md](../results.md#choosing-a-subset-once).

*Steps* are optimizer steps. *Compute* is in forward equivalents: a token that is generated or read counts 1, one that
is trained on 3. ± is half of a 95 % interval; brackets are 95 % intervals of differences paired by seed.
"""
ORDER = (
    "random",
    "token_length",
    "ppl_top",
    "ppl_middle",
    "ifd",
    "selectit",
    "feature_similarity",
    "limr",
    "learnability",
    "alignment",
    "learnalign_no_warmup",
    "learnalign",
    "learnalign_coverage",
    "learnalign_logdet",
    *BUDGETED,
)
NAMES = {
    "alignment": "alignment (no V)",
    "learnalign_no_warmup": "LearnAlign without warm-up",
    "learnalign": "**LearnAlign**",
    "learnalign_coverage": "LearnAlign, coverage",
    "learnalign_logdet": "LearnAlign, log-det",
    "learnalign_coverage_budget": "coverage, 40 % of the rollouts",
    "learnalign_logdet_budget": "log-det, 40 % of the rollouts",
    "staged": "LearnAlign, staged 50/30/20",
    "full": "whole pool",
}
PLOTTED = ("random", "learnability", "alignment", "learnalign")
CONFIDENCE = 0.95


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over seeds with Student's interval; NaN without a second seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    error = float(stats.sem(values))
    if error == 0:
        return mean, mean, mean
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=error)
    return mean, float(low), float(high)


SAME_WEIGHTS = 0.01
"""Accuracy by which untrained answers of the same weights may differ on another machine: 5 of 500 tasks."""

SAME_CELL = 0.15
"""Accuracy by which a trained cell may differ on another machine; 0.12 is the most that was seen."""


def expected(
    table: pd.DataFrame, rows: list[dict[str, Any]], base: Path | None
) -> list[tuple[float, float]]:
    """Where the accuracies of cells are expected.

    A trained cell lies within `SAME_CELL` of the same cell of the table, and in Student's prediction interval for one
    more run, `mean ± t s sqrt(1 + 1/k)`, from the `k` seeds of the same regime, selector, N and budget there, at the
    confidence `1 - 0.05 / trained cells`. The untrained base model lies within `SAME_WEIGHTS` of its record.

    Args:
        table (`pd.DataFrame`): The published cells.
        rows (`list[dict]`): Cells that are in the table, too.
        base (`Path`, *optional*): The published base model; without it, untrained cells may be anything.
    """
    names = ["regime", "selector", "n", "budget"]
    groups = dict(list(table.groupby(names)))
    recorded = {} if base is None else json.loads(base.with_suffix(".json").read_text())["accuracy"]
    trained = sum(row["selector"] != "base" for row in rows)
    ranges = []
    for row in rows:
        if row["selector"] == "base":
            known = recorded.get(row["regime"])
            ranges.append(
                (0.0, 1.0) if known is None else (known - SAME_WEIGHTS, known + SAME_WEIGHTS)
            )
            continue
        group = groups[tuple(row[name] for name in names)]
        values = group["accuracy"].to_numpy()
        same = float(group.loc[group["seed"] == row["seed"], "accuracy"].item())
        scale = values.std(ddof=1) * np.sqrt(1 + 1 / len(values))
        low, high = stats.t.interval(
            1 - 0.05 / trained, len(values) - 1, loc=values.mean(), scale=scale
        )
        ranges.append((max(float(low), same - SAME_CELL), min(float(high), same + SAME_CELL)))
    return ranges


def summarise(cells: pd.DataFrame) -> pd.DataFrame:
    """One row per regime, selector, N and budget: mean, interval, and the paired difference to random.

    Random is paired by seed at the same N; at `budget="compute"` too, the difference is that of the others' equal
    steps to random with as much total compute.
    """
    rows = []
    for (regime, selector, n, budget), group in cells.groupby(
        ["regime", "selector", "n", "budget"], sort=False
    ):
        mean, low, high = interval(group["accuracy"].to_numpy())
        row = {
            "regime": regime,
            "selector": selector,
            "n": n,
            "budget": budget,
            "seeds": len(group),
        }
        row |= {"accuracy": mean, "low": low, "high": high, "compute": group["compute"].mean()}
        row |= {"steps": group["steps"].mean()}
        for against in ("steps", "compute"):
            row |= {
                f"{name}_{against}": value for name, value in _paired(cells, group, against).items()
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _paired(cells: pd.DataFrame, group: pd.DataFrame, budget: str) -> dict[str, float]:
    first = group.iloc[0]
    base = cells[
        (cells["regime"] == first["regime"])
        & (cells["selector"] == "random")
        & (cells["n"] == first["n"])
        & (cells["budget"] == budget)
    ]
    both = group.merge(base, on="seed", suffixes=("", "_random"))
    if len(both) < 2 or (first["selector"] == "random" and first["budget"] == budget):
        return {
            "difference": float("nan"),
            "difference_low": float("nan"),
            "difference_high": float("nan"),
            "p": 1.0,
        }
    differences = (both["accuracy"] - both["accuracy_random"]).to_numpy()
    mean, low, high = interval(differences)
    p = float(stats.ttest_1samp(differences, 0).pvalue) if np.ptp(differences) else 1.0
    return {"difference": mean, "difference_low": low, "difference_high": high, "p": p}


def write(results: Path) -> Path:
    """Write all tables and the plot beside the cells.

    Args:
        results (`Path`): The Parquet file of finished cells.

    Returns:
        `Path`: The page.

    Raises:
        `FileNotFoundError`: If there are no cells.
    """
    if not results.exists():
        raise FileNotFoundError(
            f"{results} does not exist: run benchmarks/selection/table.py first."
        )
    table = pq.read_table(results)
    metadata = {
        key.decode(): json.loads(value)
        for key, value in table.schema.metadata.items()
        if key != b"pandas"
    }
    cells = table.to_pandas()
    summary = summarise(cells)
    found = [HEADER, *_sections(cells, summary, metadata)]
    covering = results.with_name(COVERING_RESULTS.name)
    if covering.exists():
        both = pd.concat([cells, pd.read_parquet(covering)], ignore_index=True)
        found += _covering_section(both) + _budget_section(both)
    reliability = results.with_name("ranking_reliability.json")
    if reliability.exists():
        found += _reliability_section(json.loads(reliability.read_text()))
    page = results.with_name(PAGE)
    write_atomically(page, ("\n\n".join(found) + "\n").encode())
    plot(summary, cells, results.with_name("accuracy_against_n.png"))
    return page


def _main_size(summary: pd.DataFrame) -> int:
    """The N whose differences to random come first."""
    sizes = sorted(summary[summary["selector"] == "random"]["n"].unique())
    return sizes[min(2, len(sizes) - 1)]


def _at_equal_steps(
    summary: pd.DataFrame, regimes: list[str], selector: str, n: int
) -> list[pd.Series | None]:
    """A selector's row in each pool; `None` where it has none."""
    return [
        _of(summary, regime=regime, selector=selector, n=n, budget="steps") for regime in regimes
    ]


def _differences_section(summary: pd.DataFrame, regimes: list[str], n: int) -> list[str]:
    """Every selector against random at one N."""
    rows = []
    for selector in ORDER:
        found = _at_equal_steps(summary, regimes, selector, n)
        if any(row is not None for row in found):
            show = _accuracy if selector == "random" else _signed_row
            figures = ["" if row is None else show(row) for row in found]
            rows.append([NAMES.get(selector, selector), *figures])
    words = (
        f"N = {n}. Of random the accuracy in %, mean over seeds ± half of the 95 % interval (Student's t); of the "
        "others the paired difference to it; **bold** where its interval does not contain 0."
    )
    return ["## Difference to random", words, markdown(["selector", *regimes], rows)]


def _signed_row(row: pd.Series) -> str:
    return _difference(row, "steps")


def _facts(cells: pd.DataFrame, metadata: dict[str, Any]) -> list[str]:
    settings = metadata["settings"]
    facts = [
        f"{(cells['steps'] > 0).sum()} training runs, seeds {cells['seed'].min()} to {cells['seed'].max()}; "
        f"held-out accuracy of {cells['n_eval'].iloc[0]} tasks, greedy; pools of {settings['pool']} prompts.",
        f"Settings of all runs: `{json.dumps(settings)}`.",
        f"Versions: `{json.dumps(metadata['versions'])}`; machine: `{json.dumps(metadata['machine'])}`.",
    ]
    return ["## Runs", "\n".join(f"- {fact}" for fact in facts)]


def _sections(cells: pd.DataFrame, summary: pd.DataFrame, metadata: dict[str, Any]) -> list[str]:
    sizes = sorted(n for n in summary[summary["selector"] == "random"]["n"].unique())
    found = _facts(cells, metadata)
    regimes = list(dict.fromkeys(cells["regime"]))
    found += _differences_section(summary, regimes, _main_size(summary))
    found += [
        "## Accuracy at equal steps",
        "Mean over seeds in %, ± half of the 95 % interval (Student's t), in "
        "brackets the paired difference to random at the same N and its 95 % interval; **bold** where that "
        "interval does not contain 0.",
    ]
    for regime in regimes:
        found += _accuracy_table(summary, cells, regime, sizes)
    found += _compute_section(summary, regimes)
    found += _cost_section(summary, sizes, regimes)
    found += _staged_section(summary, cells, regimes)
    found += _composition_section(cells, sizes, regimes)
    return found


def _accuracy_table(
    summary: pd.DataFrame, cells: pd.DataFrame, regime: str, sizes: list[int]
) -> list[str]:
    own = summary[(summary["regime"] == regime) & (summary["budget"] == "steps")]
    base = own[own["selector"] == "base"]["accuracy"]
    full = own[own["selector"] == "full"]
    lines = [f"### {regime}"]
    notes = [f"Base model {100 * base.iloc[0]:.1f}"] if len(base) else []
    if len(full):
        notes.append(f"whole pool at equal steps {_accuracy(full.iloc[0])}")
    if notes:
        lines.append("; ".join(notes) + ".")
    rows = []
    for selector in ORDER:
        cells_of = {row["n"]: row for _, row in own[own["selector"] == selector].iterrows()}
        if cells_of:
            rows.append([NAMES.get(selector, selector), *(_cell(cells_of.get(n)) for n in sizes)])
    return [*lines, markdown(["selector", *(f"N = {n}" for n in sizes)], rows)]


def _accuracy(row: pd.Series) -> str:
    if np.isnan(row["low"]):
        return f"{100 * row['accuracy']:.1f} (one seed)"
    return f"{100 * row['accuracy']:.1f} ± {50 * (row['high'] - row['low']):.1f}"


def _difference(row: pd.Series, against: str) -> str:
    if np.isnan(row[f"difference_{against}"]):
        return ""
    low, high = row[f"difference_low_{against}"], row[f"difference_high_{against}"]
    text = f"{100 * row[f'difference_{against}']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def _cell(row: pd.Series | None) -> str:
    if row is None:
        return ""
    difference = _difference(row, "steps")
    seeds = "" if row["seeds"] >= 5 else f", {row['seeds']} seeds"
    return _accuracy(row) + (f" ({difference}{seeds})" if difference else "")


def _compute_section(summary: pd.DataFrame, regimes: list[str]) -> list[str]:
    random = summary[(summary["selector"] == "random") & (summary["budget"] == "compute")]
    if random.empty:
        return []
    rows = []
    for regime in regimes:
        for _, longer in random[random["regime"] == regime].sort_values("n").iterrows():
            same = (summary["regime"] == regime) & (summary["n"] == longer["n"])
            for _, row in summary[same & (summary["selector"] == "learnalign")].iterrows():
                ours = [_accuracy(row), f"{row['compute'] / 1e3:.0f}"]
                theirs = [
                    _accuracy(longer),
                    f"{longer['compute'] / 1e3:.0f}",
                    f"{longer['steps']:.0f}",
                ]
                whole = _of(summary, regime=regime, selector="full", budget="compute")
                pool = "" if whole is None else _accuracy(whole)
                rows.append(
                    [regime, int(row["n"]), *ours, *theirs, _difference(row, "compute"), pool]
                )
    heading = [
        "regime",
        "N",
        "LearnAlign",
        "its compute",
        "random",
        "its compute",
        "its steps",
        "difference",
    ]
    heading += ["whole pool"]
    words = (
        "LearnAlign (warm-up, scoring of the whole pool and training) against random that trains as much longer as "
        "warm-up and scoring cost. Compute is in thousand tokens of a forward pass: a generated or read token counts "
        "1, a token trained on 3. The last column is the whole pool, shuffled, trained on for as long."
    )
    return ["## Accuracy at equal total compute", words, markdown(heading, rows)]


def _of(summary: pd.DataFrame, **wanted: Any) -> pd.Series | None:
    """The row with these values, if there is one."""
    rows = summary[
        np.logical_and.reduce([summary[name] == value for name, value in wanted.items()])
    ]
    return None if rows.empty else rows.iloc[0]


def _cost_section(summary: pd.DataFrame, sizes: list[int], regimes: list[str]) -> list[str]:
    """Total compute of each selector at one N."""
    n = sizes[min(2, len(sizes) - 1)]
    rows = []
    for selector in ORDER:
        found = _at_equal_steps(summary, regimes, selector, n)
        if any(row is not None for row in found):
            figures = ["" if row is None else f"{row['compute'] / 1e3:.0f}" for row in found]
            rows.append([NAMES.get(selector, selector), *figures])
    words = (
        f"Total compute at N = {n} and equal steps, in thousand tokens of a forward pass: what choosing took "
        "(warm-up, rollouts, gradients, readings, or for limr the run that recorded its history) and the training, "
        "which is all that random pays."
    )
    return ["## What choosing costs", words, markdown(["selector", *regimes], rows)]


def _staged_section(summary: pd.DataFrame, cells: pd.DataFrame, regimes: list[str]) -> list[str]:
    passes = cells[cells["budget"] == "pass"]
    rows = []
    for regime in regimes:
        staged, shuffled = (
            passes[(passes["regime"] == regime) & (passes["selector"] == name)]
            for name in ("staged", "full")
        )
        both = staged.merge(shuffled, on="seed", suffixes=("", "_shuffled"))
        if len(both) < 2:
            continue
        ours, theirs = both["accuracy"].to_numpy(), both["accuracy_shuffled"].to_numpy()
        accuracies = [triple(interval(ours)), triple(interval(theirs))]
        rows.append([regime, len(both), *accuracies, signed(interval(ours - theirs))])
    if not rows:
        return []
    words = "One pass over the whole pool after the same warm-up: in stages chosen by LearnAlign, or shuffled."
    return [
        "## Staged 50/30/20 against one shuffled pass",
        words,
        markdown(["regime", "seeds", "staged", "shuffled", "difference"], rows),
    ]


def _covering_section(cells: pd.DataFrame) -> list[str]:
    """Choices that cover the pool's signal against the others, paired by seed, over all seeds there are."""
    regimes = list(dict.fromkeys(cells["regime"]))
    own = cells[(cells["budget"] == STEPS) & (cells["selector"] != "base")]
    rows = []
    for name in COVERING:
        for regime, n in product(regimes, sorted(own[own["selector"] == name]["n"].unique())):
            here = own[(own["regime"] == regime) & (own["n"] == n)].set_index("seed")
            ours = here[here["selector"] == name]["accuracy"]
            if len(ours) < 2:
                continue
            row = [NAMES[name], regime, n, len(ours), triple(interval(ours.to_numpy()))]
            for other in ("learnalign", "random", "learnability"):
                theirs = here[here["selector"] == other]["accuracy"]
                row.append(signed(interval((ours - theirs).dropna().to_numpy())))
            rows.append(row)
    if not rows:
        return []
    header = ["selector", "regime", "N", "seeds", "accuracy"]
    header += ["minus LearnAlign", "minus random", "minus learnability"]
    words = "At equal steps; differences are paired by seed, with 95 % intervals."
    return ["## Choices that cover", words, markdown(header, rows)]


def _budget_section(cells: pd.DataFrame) -> list[str]:
    """The same choices from fewer rollouts, paired by seed, over all seeds there are."""
    rows = []
    for name, unlimited in BUDGETED.items():
        ours = cells[cells["selector"] == name]
        # At equal steps, the choice from all rollouts costs what LearnAlign's does: it has no steps to add.
        theirs = cells[(cells["selector"] == unlimited) & (cells["budget"] == STEPS)]
        both = ours.merge(theirs, on=["regime", "n", "seed"], suffixes=("", "_all"))
        for (budget, n, regime), pairs in both.groupby(["budget", "n", "regime"], sort=False):
            if len(pairs) > 1:
                equal = "steps" if budget == STEPS else "total compute"
                rows.append([NAMES[unlimited], f"equal {equal}", n, regime, *_of_pairs(pairs)])
    if not rows:
        return []
    header = ["selector", "at", "N", "regime", "seeds", "within the budget", "all rollouts"]
    header += ["difference", "steps", "tokens generated to select"]
    words = (
        "The same selector with `rollout_budget=0.4`: 40 % of the pool is rolled out to score it. Differences are "
        "paired by seed, with 95 % intervals; tokens include the warm-up's. At equal total compute what the budget "
        "saves goes into more steps."
    )
    rows.sort(key=lambda row: (row[0], row[1], -row[2]))
    return ["## A rollout budget", words, markdown(header, rows)]


def _of_pairs(pairs: pd.DataFrame) -> list[Any]:
    """What one regime's pairs come to: accuracies, their difference, and what was spent."""
    fewer, everything = (pairs[column].to_numpy() for column in ("accuracy", "accuracy_all"))
    generated = pairs["selecting_tokens_generated"] / pairs["selecting_tokens_generated_all"]
    return [
        len(pairs),
        triple(interval(fewer)),
        triple(interval(everything)),
        signed(interval(fewer - everything)),
        f"{pairs['steps'].mean():.0f}",
        f"{generated.mean():.0%}",
    ]


def triple(values: tuple[float, float, float]) -> str:
    """Mean ± half of the interval, in %."""
    mean, low, high = values
    return f"{100 * mean:.1f} ± {50 * (high - low):.1f}"


def signed(values: tuple[float, float, float]) -> str:
    """A difference and its interval in points, bold where it is apart from 0."""
    mean, low, high = (100 * value for value in values)
    text = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def _composition_section(cells: pd.DataFrame, sizes: list[int], regimes: list[str]) -> list[str]:
    """Which skills the main selectors chose, and how well each was learned."""
    n = sizes[min(2, len(sizes) - 1)]
    found = [
        f"## What was chosen, and what was learned (N = {n})",
        "For each skill: prompts chosen (mean over seeds), and held-out accuracy of its tasks after training in %.",
    ]
    for regime in regimes:
        own = cells[(cells["regime"] == regime) & (cells["n"] == n) & (cells["budget"] == "steps")]
        base = cells[(cells["regime"] == regime) & (cells["selector"] == "base")]
        if own.empty or base.empty:
            continue
        before = json.loads(base["family_accuracy"].iloc[0])
        rows = []
        for selector in PLOTTED:
            runs = own[own["selector"] == selector]
            if runs.empty:
                continue
            chosen = (
                pd.DataFrame(list(map(json.loads, runs["families"])))
                .reindex(columns=list(before))
                .fillna(0)
                .mean()
            )
            learned = pd.DataFrame(list(map(json.loads, runs["family_accuracy"]))).mean()
            cells_of = [f"{chosen[name]:.0f} → {100 * learned[name]:.0f}" for name in before]
            rows.append([NAMES.get(selector, selector), *cells_of])
        if rows:
            rows.insert(0, ["base model", *(f"{100 * value:.0f}" for value in before.values())])
            found += [f"### {regime}", markdown(["selector", *before], rows)]
    return found


def _reliability_section(found: dict[str, Any]) -> list[str]:
    """What split halves predict beside what a second scoring shows."""
    rows = []
    for key, value in found.items():
        if "/" not in key:
            continue
        regime, selector = key.split("/")
        size = value["overlap_size"]
        correlations = [
            value["spearman_halves"],
            value["spearman"][str(value["rollouts"])],
            value["actual_spearman"],
        ]
        overlaps = [
            value[name] for name in ("overlap_halves", "actual_overlap", "overlap_by_chance")
        ]
        rows.append([regime, selector, *map(_number, [*correlations, *overlaps])])
    words = (
        f"`python benchmarks/ranking_reliability.py --json docs/results/ranking_reliability.json`: pools of "
        f"{found['settings']['pool']} prompts, one seed, scored twice with the same warmed-up policy and other "
        f"rollouts (G = 8). ρ is Spearman's; the overlap is of the best {size}."
    )
    header = ["regime", "selector", "ρ of two halves", "predicted for G = 8", "ρ of two scorings"]
    header += ["overlap of halves", "of two scorings", "by chance"]
    return ["## Reliability of a ranking", words, markdown(header, rows)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def plot(summary: pd.DataFrame, cells: pd.DataFrame, path: Path) -> None:
    """Accuracy against N at equal steps, with bands of 95 %; one panel per regime."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    regimes = list(dict.fromkeys(cells["regime"]))
    figure, axes = pyplot.subplots(
        1, len(regimes), figsize=(3.6 * len(regimes), 3.4), squeeze=False
    )
    for axis, regime in zip(axes[0], regimes, strict=True):
        own = summary[(summary["regime"] == regime) & (summary["budget"] == "steps")]
        for number, selector in enumerate(PLOTTED):
            line = own[own["selector"] == selector].sort_values("n")
            if line.empty:
                continue
            colour = f"C{number}"
            axis.plot(line["n"], 100 * line["accuracy"], marker="o", color=colour, label=selector)
            if len(line) > 1:
                axis.fill_between(
                    line["n"], 100 * line["low"], 100 * line["high"], color=colour, alpha=0.15, lw=0
                )
            else:
                errors = 100 * np.abs(
                    line[["low", "high"]].to_numpy().T - line["accuracy"].to_numpy()
                )
                axis.errorbar(
                    line["n"], 100 * line["accuracy"], yerr=errors, color=colour, capsize=3
                )
        base = own[own["selector"] == "base"]
        if len(base):
            axis.axhline(100 * base["accuracy"].iloc[0], color="grey", ls=":", label="base model")
        axis.set(title=regime, xlabel="N prompts selected", xscale="log")
        ticks = sorted(own[own["selector"] == "random"]["n"].unique())
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
    axes[0][0].set_ylabel("held-out accuracy (%)")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)

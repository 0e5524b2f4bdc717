"""The scaling measurements as a page and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmark_projection import (
    PROJECTED_PAIRS,
    SLOPE_RANGE,
    Scaling,
    Throughput,
    curvature_flops,
    curvature_share,
    hours,
    hours_at,
    log_log_slope,
    textbook_flops,
)

_SUSTAINED_TFLOPS = (1.0, 10.0, 50.0)
_COLOURS = ("#2a6f97", "#c8791b", "#5a7d2a", "#8a4f7d")

_QUICK = """

**Small sizes (`--quick`): they show that the script runs, the numbers mean nothing.**"""
_TEXT = """# Cost of estimating a posterior

Written by `scripts/benchmark_scaling.py` (`make benchmark-scaling`); do not edit. `C` is the contrast size (pairs
that are contrasted with each other), `D` the size of the embeddings, `K` that of the projections' inputs. Pairs are
random embeddings in float32, whose making is not counted; "curvature" is all that estimation does after the
towers: both factors of both modalities, whose `K` is taken to be equal.{quick}

![Seconds over pairs, and pairs a second over the contrast size](scaling.png)

## Measured

On {machine}, {threads} of {cores} threads, torch {torch}.

### Time and memory of the curvature, against the textbook formula

{throughput}

Competitors were timed in turn, A B A B ..., {runs} runs of each after one to warm up; the numbers are from medians. Ours
is `CurvatureAccumulator.update` of both modalities, on at most {rows:,} rows of the block against all `C` candidates.
The textbook formula builds one `D x D` matrix a row; it was timed on {textbook_rows} rows of each modality, without the
input factor, and extrapolated by rows.

Memory is the peak over what was resident before, in a fresh process each, with the inputs of the block not counted:
ours over one whole block of one modality (the other follows after it), the textbook formula over one batch of
{textbook_batch} rows; each further row of a batch costs what the last column says.

{exponents}

### Growth with the number of pairs

`C` = {growth_contrast:,}, `D` = {growth_features}, `K` = {growth_inputs}; block by block, each pass in a fresh process, small and large numbers
in turn, {rounds} passes at each. Other work on a machine can only add time, so the fastest pass counts.

{growth}

Least-squares slope of log seconds over log pairs: **{slope:.3f}** (median passes: {median_slope:.3f}); linear growth is 1,
the project asks for {low} to {high}: {verdict}. Peak memory changes by {memory_change:+.1f} MiB from the smallest to the
largest number of pairs.

### Prior precision

`K` = {prior_in}, `D` = {prior_features}, random factors with the traces of published ones, float64.

| way | seconds | distance to the maximum |
|---|---|---|
{prior}

Our solve is **{prior_ratio:.0f} x** faster. Distance is the absolute difference of the logarithms of the prior precisions;
the maximum was found by bisection of autograd's derivative of the log-determinants. It is done twice in a whole
estimation, whatever the number of pairs.

### Towers

{towers}

## Projected: {pairs:,} pairs

Nothing in this section was run at this size. It is the measured pairs a second, carried on along the straight line
above.

{projection}

### Other machines

Matrix products of one pair (both modalities): `2 (6 C D + 2 C + 8 D² + 2 K²)` operations, the last term in float64.
Elementwise work on the `C` logits of a row, about ten passes, is not in it. Towers are counted by torch's
operators. Divide by the TFLOP/s that a machine *sustains* in float32 products, not by its data sheet's peak:

{gpu}

This machine sustained {achieved} of these operations in the curvature. Decoding and resizing images is in
none of the numbers. Curvature can be had for less by a smaller contrast size: see `sensitivity.md` for what that
changes.
"""


def write_report(scaling: Scaling, path: Path) -> None:
    """Write the page, and the plot beside it as PNG.

    Args:
        scaling: What was measured.
        path: The page.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    growth, prior, grid = scaling.growth, scaling.prior, scaling.throughput
    low, high = SLOPE_RANGE
    achieved = [
        row.pairs_per_second * curvature_flops(row.contrast, row.features, row.in_features) / 1e9
        for row in grid
    ]
    plot(scaling, path.with_name("scaling.png"))
    text = _TEXT.format(
        **scaling.machine,
        quick=_QUICK if scaling.quick else "",
        runs=scaling.runs,
        throughput=_throughput(grid),
        rows=max(row.rows for row in grid),
        textbook_rows=grid[0].textbook_rows,
        textbook_batch=grid[0].textbook_batch,
        exponents=_exponents(grid),
        growth_contrast=growth.contrast,
        growth_features=growth.features,
        growth_inputs=growth.in_features,
        rounds=len(growth.seconds[0]),
        growth=_growth(scaling),
        slope=growth.slope,
        median_slope=growth.median_slope,
        low=low,
        high=high,
        verdict="met" if low <= growth.slope <= high else "**not met**",
        memory_change=growth.highest_mib[-1] - growth.highest_mib[0],
        prior_in=prior.in_features,
        prior_features=prior.features,
        prior=_prior(scaling),
        prior_ratio=prior.ratio,
        towers=_towers(scaling),
        pairs=PROJECTED_PAIRS,
        projection=_projection(scaling),
        gpu=_other_machines(scaling),
        achieved=f"{min(achieved):,.0f} to {max(achieved):,.0f} GFLOP/s",
    )
    path.write_text(text, encoding="utf-8")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _throughput(grid: Sequence[Throughput]) -> str:
    columns = (
        *("C", "D", "K", "pairs/s", "textbook pairs/s", "ratio"),
        *("peak MiB", "textbook peak MiB", "textbook MiB a row"),
    )
    rows = [
        (
            *(f"{row.contrast:,}", f"{row.features:,}", f"{row.in_features:,}"),
            f"{row.pairs_per_second:,.0f}",
            f"{row.textbook_pairs_per_second:,.2f}",
            f"**{row.ratio:,.0f} x**",
            f"{row.peak_mib:,.0f}",
            f"{row.textbook_peak_mib:,.0f}",
            f"{row.textbook_mib_per_row:,.1f}",
        )
        for row in grid
    ]
    return _table(columns, rows)


def _exponents(grid: Sequence[Throughput]) -> str:
    """How seconds a pair grow with C and with D, where the grid has at least two of them."""
    sentences: list[str] = []
    for axis, other, symbol in (("contrast", "features", "C"), ("features", "contrast", "D")):
        slopes: list[float] = []
        lines = sorted(grid, key=lambda row: (getattr(row, other), getattr(row, axis)))
        for _, group in groupby(lines, key=lambda row: getattr(row, other)):
            line = list(group)
            if len(line) > 1:
                sizes = [getattr(row, axis) for row in line]
                slopes.append(log_log_slope(sizes, [1.0 / row.pairs_per_second for row in line]))
        if slopes:
            spread = " to ".join(f"{value:.2f}" for value in sorted({min(slopes), max(slopes)}))
            sentences.append(f"as `{symbol}` to the power {spread}")
    if not sentences:
        return "The matrix products of a row grow as O(C D)."
    return (
        f"Seconds of a pair were measured to grow {' and '.join(sentences)}; the matrix products\n"
        "alone grow as O(C D), elementwise work on the logits as O(C)."
    )


def _growth(scaling: Scaling) -> str:
    growth = scaling.growth
    rows = [
        (
            f"{n:,}",
            f"{min(seconds):.2f}",
            ", ".join(f"{value:.2f}" for value in seconds),
            f"{1e3 * min(seconds) / n:.4f}",
            f"{max(peaks):.0f}",
        )
        for n, seconds, peaks in zip(growth.pairs, growth.seconds, growth.peak_mib, strict=True)
    ]
    return _table(("pairs", "seconds", "all passes", "ms a pair", "peak MiB"), rows)


def _prior(scaling: Scaling) -> str:
    prior = scaling.prior
    distances = "; ".join(
        f"{value:.1e} (learning rate {rate})" for rate, value in prior.adam_distances.items()
    )
    start = f"from {prior.adam_start:g}, the maximum being {prior.maximum:.5g}"
    return "\n".join(
        (
            f"| `optimize_prior_precision`: eigenvalues once, bracketed root | {prior.seconds:.3f} "
            f"| {prior.distance:.1e} |",
            f"| {prior.adam_steps} steps of Adam on two log-determinants, {start} "
            f"| {prior.adam_seconds:.3f} | {distances} |",
        )
    )


def _towers(scaling: Scaling) -> str:
    towers = scaling.towers
    return (
        f"Forward pass of {towers.name} (random weights, {towers.text_tokens} text tokens, batches of "
        f"{towers.batch},\nfloat32): {towers.pairs_per_second:.1f} pairs/s, "
        f"{towers.flops_per_pair / 1e9:.1f} GFLOP a pair."
    )


def _projection(scaling: Scaling) -> str:
    towers = scaling.towers.pairs_per_second
    rows = [
        (
            f"{row.contrast:,}",
            f"{row.features:,}",
            f"{hours(PROJECTED_PAIRS, row.pairs_per_second):,.0f}",
            f"{hours(PROJECTED_PAIRS, row.textbook_pairs_per_second):,.0f}",
            f"{100 * curvature_share(row.pairs_per_second, towers):.1f} %"
            if row.features == scaling.growth.features
            else "",
        )
        for row in scaling.throughput
    ]
    columns = ("C", "D", "curvature, hours", "textbook, hours", "curvature's part")
    growth = scaling.growth
    return (
        f"{_table(columns, rows)}\n\n"
        f'"Curvature\'s part" is of curvature and towers together, with the towers measured above\n'
        f"(`D` = {growth.features}), which would take {hours(PROJECTED_PAIRS, towers):,.0f} hours on this "
        f"machine.\nFrom the longest pass (`C` = {growth.contrast:,}, `D` = {growth.features}): "
        f"{hours(PROJECTED_PAIRS, growth.pairs_per_second):,.0f} hours of curvature."
    )


def _other_machines(scaling: Scaling) -> str:
    columns = (
        *("C", "D", "MFLOP a pair", "textbook MFLOP a pair"),
        *(f"hours at {speed:g} TFLOP/s" for speed in _SUSTAINED_TFLOPS),
    )
    rows: list[tuple[str, ...]] = []
    for row in scaling.throughput:
        flops = curvature_flops(row.contrast, row.features, row.in_features)
        textbook = textbook_flops(row.contrast, row.features)
        spent = [hours_at(PROJECTED_PAIRS, flops, speed) for speed in _SUSTAINED_TFLOPS]
        rows.append(
            (
                *(f"{row.contrast:,}", f"{row.features:,}", f"{flops / 1e6:,.1f}"),
                f"{textbook / 1e6:,.0f}",
                *(f"{value:,.1f}" for value in spent),
            )
        )
    towers = scaling.towers
    spent = [hours_at(PROJECTED_PAIRS, towers.flops_per_pair, s) for s in _SUSTAINED_TFLOPS]
    name = f"both towers of {towers.name}"
    counted = f"{towers.flops_per_pair / 1e6:,.1f}"
    rows.append((name, "", counted, "", *(f"{value:,.1f}" for value in spent)))
    return _table(columns, rows)


def plot(scaling: Scaling, path: Path) -> None:
    """Draw time over pairs and pairs a second over contrast size, both on logarithmic axes.

    Args:
        scaling: What was measured.
        path: Where to write; the ending sets the format.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'hf_bayesvlm[plot]'") from error
    figure = Figure(figsize=(10.0, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_growth(left, scaling)
    _draw_throughput(right, scaling)
    figure.savefig(path, dpi=130)


def _draw_growth(axes: Any, scaling: Scaling) -> None:
    growth = scaling.growth
    for n, seconds in zip(growth.pairs, growth.seconds, strict=True):
        axes.plot([n] * len(seconds), seconds, ".", color="#999999", markersize=5)
    axes.plot(growth.pairs, growth.best_seconds, "o", color=_COLOURS[0], label="fastest pass")
    largest, longest = growth.pairs[-1], growth.best_seconds[-1]
    linear = [longest * n / largest for n in growth.pairs]
    axes.plot(growth.pairs, linear, "--", color=_COLOURS[1], label="linear, through the last")
    _set_logarithmic(axes, growth.pairs)
    axes.set_xlabel("pairs")
    axes.set_ylabel("seconds")
    axes.set_title(
        f"Curvature of n pairs: slope {growth.slope:.3f}\nC = {growth.contrast:,}, D = {growth.features}",
        fontsize=10,
        loc="left",
    )
    axes.legend(fontsize=8, frameon=False)


def _draw_throughput(axes: Any, scaling: Scaling) -> None:
    contrasts = sorted({row.contrast for row in scaling.throughput})
    for number, features in enumerate(sorted({row.features for row in scaling.throughput})):
        rows = [row for row in scaling.throughput if row.features == features]
        sizes = [row.contrast for row in rows]
        colour = _COLOURS[number % len(_COLOURS)]
        ours = [row.pairs_per_second for row in rows]
        textbook = [row.textbook_pairs_per_second for row in rows]
        axes.plot(sizes, ours, "o-", color=colour, label=f"ours, D = {features:,}")
        axes.plot(sizes, textbook, "s:", color=colour, label=f"textbook, D = {features:,}")
    _set_logarithmic(axes, contrasts)
    axes.set_xlabel("contrast size")
    axes.set_ylabel("pairs/s, both modalities")
    axes.set_title(
        f"Pairs a second\n{scaling.machine['threads']} CPU threads", fontsize=10, loc="left"
    )
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _set_logarithmic(axes: Any, sizes: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.tick_params(labelsize=8)
    axes.grid(True, which="major", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)

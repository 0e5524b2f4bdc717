"""From measurements to a projection: arithmetic of a pair, slopes, hours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmark_prior import PriorPrecision

PROJECTED_PAIRS = 400_000_000
SLOPE_RANGE = (0.95, 1.05)


@dataclass(frozen=True)
class Throughput:
    """One cell of the grid: both modalities' curvature at one contrast size and embedding size.

    Attributes:
        contrast: Contrast size, `C`.
        features: Embedding size, `D`.
        in_features: Inputs of the projections, `K`.
        rows: Rows of ours that were timed against all candidates.
        textbook_rows: Rows of the textbook formula that were timed.
        pairs_per_second: Of ours, from median seconds.
        textbook_pairs_per_second: Of the textbook formula, from median seconds.
        peak_mib: Peak extra memory of ours over one whole block.
        textbook_batch: Rows of one batch of the textbook formula.
        textbook_peak_mib: Its peak extra memory.
        textbook_mib_per_row: What each further row of a batch costs.
    """

    contrast: int
    features: int
    in_features: int
    rows: int
    textbook_rows: int
    pairs_per_second: float
    textbook_pairs_per_second: float
    peak_mib: float
    textbook_batch: int
    textbook_peak_mib: float
    textbook_mib_per_row: float

    @property
    def ratio(self) -> float:
        """How many times as many pairs a second."""
        return self.pairs_per_second / self.textbook_pairs_per_second


@dataclass(frozen=True)
class Growth:
    """Seconds and memory over the number of pairs.

    Attributes:
        contrast: Contrast size.
        features: Embedding size.
        in_features: Inputs of the projections.
        pairs: Numbers of pairs.
        seconds: Seconds of each pass at each number.
        peak_mib: Peak extra memory of each pass.
    """

    contrast: int
    features: int
    in_features: int
    pairs: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    peak_mib: tuple[tuple[float, ...], ...]

    @property
    def best_seconds(self) -> tuple[float, ...]:
        """Fastest pass at each number: other work on the machine can only add to it."""
        return tuple(map(min, self.seconds))

    @property
    def highest_mib(self) -> tuple[float, ...]:
        """Highest peak at each number."""
        return tuple(map(max, self.peak_mib))

    @property
    def slope(self) -> float:
        """Slope of log seconds over log pairs; 1 is linear."""
        return log_log_slope(self.pairs, self.best_seconds)

    @property
    def median_slope(self) -> float:
        """The same of the median passes."""
        return log_log_slope(self.pairs, tuple(map(statistics.median, self.seconds)))

    @property
    def pairs_per_second(self) -> float:
        """At the largest number of pairs."""
        return self.pairs[-1] / self.best_seconds[-1]


@dataclass(frozen=True)
class Towers:
    """Forward pass of both towers.

    Attributes:
        name: Which model.
        batch: Pairs at once.
        text_tokens: Tokens of a text.
        pairs_per_second: Images and texts.
        flops_per_pair: Counted by torch's operators.
    """

    name: str
    batch: int
    text_tokens: int
    pairs_per_second: float
    flops_per_pair: int


@dataclass(frozen=True)
class Scaling:
    """Everything that was measured.

    Attributes:
        machine: From `benchmark_common.machine`.
        quick: Whether the sizes were small, to see that everything runs.
        runs: Timed runs of each competitor.
        throughput: The grid.
        growth: Passes over more and more pairs.
        prior: Choice of the prior precision.
        towers: The forward pass, for comparison.
    """

    machine: dict[str, Any]
    quick: bool
    runs: int
    throughput: tuple[Throughput, ...]
    growth: Growth
    prior: PriorPrecision
    towers: Towers


def log_log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of `log y` over `log x`.

    Args:
        x: At least two different positive values.
        y: As many positive values.

    Returns:
        The exponent of a power law.

    Raises:
        ValueError: If a line is not determined.
    """
    if len(x) != len(y) or len(set(x)) < 2:
        raise ValueError("a slope needs two different values and one result of each")
    logs_x, logs_y = [math.log(value) for value in x], [math.log(value) for value in y]
    return statistics.linear_regression(logs_x, logs_y).slope


def curvature_flops(contrast: int, features: int, in_features: int) -> int:
    """Floating-point operations of the matrix products of one pair, both modalities.

    A row takes three products with all candidates, four `D x D` updates and one `K x K` update.

    Args:
        contrast: Contrast size, `C`.
        features: Embedding size, `D`.
        in_features: Inputs of the projections, `K`.

    Returns:
        Multiplications and additions, counted as two.
    """
    row = 6 * contrast * features + 2 * contrast + 8 * features**2 + 2 * in_features**2
    return 2 * row


def textbook_flops(contrast: int, features: int) -> int:
    """The same of the batched textbook formula, without the input factor.

    Args:
        contrast: Contrast size.
        features: Embedding size.

    Returns:
        Multiplications and additions.
    """
    return 2 * (4 * contrast * features + 2 * contrast * features**2 + 4 * features**3)


def hours(pairs: int, pairs_per_second: float) -> float:
    """Hours for a number of pairs."""
    return pairs / pairs_per_second / 3600.0


def hours_at(pairs: int, flops_per_pair: float, teraflops: float) -> float:
    """Hours for a number of pairs at a sustained speed in TFLOP/s."""
    return pairs * flops_per_pair / (teraflops * 1e12) / 3600.0


def curvature_share(curvature_per_second: float, towers_per_second: float) -> float:
    """Part of the time of towers and curvature that is curvature."""
    curvature, towers = 1.0 / curvature_per_second, 1.0 / towers_per_second
    return curvature / (curvature + towers)

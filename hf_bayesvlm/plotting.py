"""Pictures of predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

MAX_ROWS = 24
"""Images that one picture shows at most."""

MAX_BARS = 12
"""Labels that one image shows at most, the most probable ones."""

_SURE, _UNSURE = "#2a6f97", "#c8791b"


def score_interval(score: float, logit_std: float) -> tuple[float, float]:
    """The score when the label's own logit is one standard deviation lower or higher.

    Args:
        score: Predictive probability.
        logit_std: Standard deviation of the label's logit.

    Returns:
        Lower and upper probability.
    """
    if score <= 0.0 or score >= 1.0:
        return score, score
    odds = math.log(score) - math.log1p(-score)
    return _sigmoid(odds - logit_std), _sigmoid(odds + logit_std)


def plot_predictions(
    images: Sequence[Image.Image],
    results: Sequence[dict[str, Any]],
    titles: Sequence[str],
    path: str | Path,
    *,
    unsure: Sequence[bool] | None = None,
    total: int | None = None,
) -> None:
    """Draw each image beside its predictive bars with error bars.

    Args:
        images: The images.
        results: From our pipeline with `return_uncertainty=True`, one an image.
        titles: One an image.
        path: Where to write; the ending sets the format.
        unsure: Which images to mark as unsure.
        total: How many images there were, if not all are passed.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw or the counts differ.
    """
    if not images or not len(images) == len(results) == len(titles):
        raise ValueError("images, results and titles must be as many, and at least one")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'hf_bayesvlm[plot]'") from error
    unsure = unsure or [False] * len(images)
    rows = min(len(images), MAX_ROWS)
    columns = 1 if rows <= 3 else 2
    lines = math.ceil(rows / columns)
    bars = min(MAX_BARS, max(len(result["predictions"]) for result in results[:rows]))
    height = max(1.7, 0.24 * bars + 0.75)
    figure = Figure(figsize=(6.0 * columns, height * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(lines, 2 * columns, width_ratios=[1.0, 2.6] * columns)
    for i in range(rows):
        line, column = divmod(i, columns)
        picture = figure.add_subplot(grid[line, 2 * column])
        picture.imshow(images[i])
        picture.set_axis_off()
        axes = figure.add_subplot(grid[line, 2 * column + 1])
        _draw_bars(axes, results[i], titles[i], unsure[i])
    total = max(len(images), total or 0)
    left_out = f" (first {rows} of {total} images)" if rows < total else ""
    figure.supxlabel(
        "predictive probability; whiskers: its logit moved by one standard deviation" + left_out,
        fontsize=9,
    )
    figure.savefig(path, dpi=130)


def _draw_bars(axes: Any, result: dict[str, Any], title: str, unsure: bool) -> None:
    predictions = result["predictions"][:MAX_BARS]
    scores = [prediction["score"] for prediction in predictions]
    intervals = [score_interval(p["score"], p["logit_std"]) for p in predictions]
    errors = [
        [score - low for score, (low, _) in zip(scores, intervals, strict=True)],
        [high - score for score, (_, high) in zip(scores, intervals, strict=True)],
    ]
    positions = range(len(predictions))
    axes.barh(
        positions,
        scores,
        xerr=errors,
        height=0.7,
        color=_UNSURE if unsure else _SURE,
        error_kw={"elinewidth": 1.2, "capsize": 3, "ecolor": "#222222"},
    )
    axes.set_yticks(
        positions, [_shorten(prediction["label"]) for prediction in predictions], parse_math=False
    )
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.0)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    verdict = ", unsure" if unsure else ""
    entropies = f"H = {result['entropy']:.2f}, MI = {result['mutual_information']:.3f} nats"
    axes.set_title(
        f"{_shorten(title, 34)}{verdict}\n{entropies}", fontsize=9, loc="left", parse_math=False
    )


def _shorten(text: str, limit: int = 24) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _sigmoid(value: float) -> float:
    if value >= 0:
        return 1.0 / (1.0 + math.exp(-value))
    return math.exp(value) / (1.0 + math.exp(value))

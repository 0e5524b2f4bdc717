"""Picture of a tuning: validation metrics against the pseudo-data count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .tuning_result import Trial, TuningResult

_COLOURS = {
    ("reference", "factored"): "#2a6f97",
    ("evidence", "factored"): "#c8791b",
    ("evidence", "exact"): "#5a8f3c",
}
_STYLES = {"full": "-", "diagonal": ":"}
_CRITERIA = {"nlpd": "NLPD", "ece": "ECE", "brier": "Brier score"}
_PLAIN, _CHOSEN = "#555555", "#b3123b"
# A panel shows this many times the gain over the plain model; lines beyond it leave the picture.
_HEADROOM = 3.0


def plot_tuning(result: TuningResult, path: str | Path) -> None:
    """Draw NLPD and ECE against the pseudo-data count, one line for each form of the posterior.

    Lines are of the chosen modalities; the plain model is dashed and the chosen point marked.

    Args:
        result: From `tune_posterior`.
        path: Where to write; the ending sets the format.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'hf_bayesvlm[plot]'") from error
    figure = Figure(figsize=(10.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes, metric, label in zip(
        panels,
        ("nlpd", "ece"),
        ("NLPD (nats an image)", "expected calibration error"),
        strict=True,
    ):
        _draw_panel(axes, result, metric, label)
    best = result.best
    figure.suptitle(
        f"{result.num_images:,} validation images, {result.num_classes:,} classes, uncertainty of "
        f"{_whose(best)}; chosen by {_CRITERIA[result.criterion]}",
        fontsize=10,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _draw_panel(axes: Any, result: TuningResult, metric: str, label: str) -> None:
    plain, best = getattr(result.plain, metric), result.best
    axes.axhline(plain, color=_PLAIN, linestyle="--", linewidth=1.2, label="plain model (MAP)")
    for key, trials in _lines(result).items():
        objective, damping, covariance = key
        axes.plot(
            [trial.pseudo_data_count for trial in trials],
            [getattr(trial, metric) for trial in trials],
            color=_COLOURS[objective, damping],
            linestyle=_STYLES[covariance],
            linewidth=1.7,
            marker="o",
            markersize=3.5,
            label=f"{objective}, {damping} damping, {covariance}",
        )
    axes.plot(
        [best.pseudo_data_count],
        [getattr(best, metric)],
        color=_CHOSEN,
        linestyle="none",
        marker="*",
        markersize=15,
        markeredgecolor="white",
        zorder=5,
        label=f"chosen: count {best.pseudo_data_count:g}",
    )
    values = [getattr(trial, metric) for trial in result.trials] + [plain]
    low, high = min(values), max(values)
    gain = max(plain - low, 0.1 * (high - low), 1e-6)
    axes.set_ylim(low - 0.15 * gain, min(high + 0.15 * gain, plain + _HEADROOM * gain))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("pseudo-data count τ")
    axes.set_ylabel(label)
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _lines(result: TuningResult) -> dict[tuple[str, str, str], list[Trial]]:
    """Trials of the chosen modalities by objective, damping and covariance, counts ascending."""
    lines: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in sorted(result.trials, key=lambda trial: trial.pseudo_data_count):
        if trial.modalities == result.best.modalities:
            key = (trial.objective, trial.damping, trial.covariance)
            lines.setdefault(key, []).append(trial)
    return dict(sorted(lines.items(), key=lambda item: list(_COLOURS).index(item[0][:2])))


def _whose(trial: Trial) -> str:
    return "images and texts" if trial.modalities == "both" else f"{trial.modalities}s only"

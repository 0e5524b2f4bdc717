"""The sensitivity measurements as a page; its conclusions are made from the numbers."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emoji_evaluation import Scores

FIXED_COUNT, EVIDENCE_COUNT = 10.0, 1.0
SETTINGS = {
    "fixed": f"reference objective, count {FIXED_COUNT:g}",
    "evidence": f"evidence, count {EVIDENCE_COUNT:g}",
    "chosen": "reference objective, count re-chosen",
}
"""How the prior precision and the pseudo-data count of a posterior are set."""

# Losing this part of the posterior's gain does not matter, in percent.
_NEGLIGIBLE = 10.0
_METRICS = ("nlpd", "ece", "accuracy")
_TASKS = {"full": "all names", "names-105": "about 105 names", "coarse": "18 everyday words"}


@dataclass(frozen=True)
class Trial:
    """One posterior on the validation split.

    Attributes:
        pairs: Training pairs it was estimated from.
        contrast: Pairs that were contrasted with each other.
        seed: Of the order of the pairs.
        setting: One of `SETTINGS`.
        pseudo_data_count: The count.
        prior_precision: Of the image projection.
        objective: By which the prior precisions were chosen.
        scores: On all slices and tasks.
    """

    pairs: int
    contrast: int
    seed: int
    setting: str
    pseudo_data_count: float
    prior_precision: float
    objective: str
    scores: tuple[Scores, ...]


@dataclass(frozen=True)
class Sensitivity:
    """Everything that was measured.

    Attributes:
        data_revision: Of the data set.
        total: Training pairs there are.
        seeds: Random orders of the pairs.
        counts: Pseudo-data counts to choose from.
        selection_slices: Slices that the count is chosen on.
        plain: Scores of the plain model.
        trials: All posteriors.
    """

    data_revision: str
    total: int
    seeds: int
    counts: tuple[float, ...]
    selection_slices: tuple[str, ...]
    plain: tuple[Scores, ...]
    trials: tuple[Trial, ...]

    def cells(self) -> list[tuple[int, int]]:
        """Numbers of pairs and contrast sizes, rising."""
        return sorted({(trial.pairs, trial.contrast) for trial in self.trials})

    def of(self, cell: tuple[int, int], setting: str) -> list[Trial]:
        """The trials of one cell, one a seed."""
        return [
            trial
            for trial in self.trials
            if (trial.pairs, trial.contrast) == cell and trial.setting == setting
        ]

    def mean(self, scores: Sequence[Scores], metric: str) -> float:
        """Mean of a metric over the selection slices and all their tasks."""
        return statistics.fmean(
            s.values[metric] for s in scores if s.slice in self.selection_slices
        )

    def summary(self, cell: tuple[int, int], setting: str, metric: str) -> tuple[float, float]:
        """Mean and standard error over the seeds of the mean over the selection slices."""
        return mean_and_error([self.mean(t.scores, metric) for t in self.of(cell, setting)])


_TEXT = """# Sensitivity: pairs, contrast size, pseudo-data count

Written by `scripts/sensitivity.py`; do not edit. What the number of training pairs and the contrast size `C` (pairs that
are contrasted with each other) of a posterior change, on the **validation** split of emoji-styles
({data_revision}). The test split was not read.

* **Posteriors** of the trained emoji CLIP, from random subsets of its {total:,} training pairs in random order, {seeds} seeds
  each. The order decides both which pairs are in a subset and which meet in a block. All pairs in one
  block are one posterior. The last block of a pass is smaller where `C` does not divide the pairs. Diagonal
  covariance, factored damping, uncertainty of the image.
* **Reference, {fixed:g}**: prior precision by the reference objective, pseudo-data count {fixed:g}, as in the embedded model.{fallback}
* **Evidence, {evidence:g}**: prior precision by the evidence, every pair counted once. Needs no labelled images.
* **Re-chosen**: reference objective; of the counts {counts} the one with the lowest NLPD,
  averaged over {slices} and their tasks, that keeps the plain model's accuracy. The numbers of these slices
  are therefore of the images that the count was chosen on (one of {num_counts}); those of the held-out slices are not.
* **±** is one standard error over the seeds: of the subset and the order, not of the validation images. NLPD in
  nats, ECE with 20 bins. Large subsets share most of their pairs, so that they differ less than fresh samples would.

## What to choose

{advice}

## Mean over {slices} and their tasks

{summary}

## By slice and task

{tables}
"""


def write_report(report: Sensitivity, path: Path) -> None:
    """Write the page.

    Args:
        report: What was measured.
        path: Where to write it.
    """
    counted = [f"{count:g}" for count in report.counts]
    text = _TEXT.format(
        data_revision=report.data_revision,
        total=report.total,
        seeds=report.seeds,
        fallback=_fallback(report),
        evidence=EVIDENCE_COUNT,
        fixed=FIXED_COUNT,
        counts=f"{', '.join(counted[:-1])} and {counted[-1]}",
        num_counts=len(counted),
        slices=" and ".join(report.selection_slices),
        advice="\n".join(_bullet(sentence) for sentence in advice(report)),
        summary=_summary(report),
        tables="\n\n".join(_by_task(report)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _bullet(sentence: str) -> str:
    return textwrap.fill(
        f"* {sentence}",
        118,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is 0, as nothing varies.

    Args:
        values: One a seed.

    Returns:
        Mean and standard error.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def advice(report: Sensitivity) -> list[str]:
    """Sentences on what to choose, made from the numbers.

    What an option costs is compared with what the posterior of all pairs gains over the plain model.
    """
    whole = (report.total, report.total)
    plain = report.mean(report.plain, "nlpd")
    reached = {setting: report.summary(whole, setting, "nlpd")[0] for setting in SETTINGS}
    listed = ", ".join(f"{reached[setting]:.3f} ({label})" for setting, label in SETTINGS.items())
    gain = plain - reached["chosen"]
    sentences = [
        f"**The yardstick.** The posterior of all {report.total:,} pairs in one block takes the mean NLPD of the "
        f"plain model from {plain:.3f} to {listed}."
    ]
    if gain <= 0:
        return [*sentences, "There is no gain to compare with: no further conclusion is drawn."]
    cells = report.cells()
    fewer = [cell for cell in cells if cell[0] == cell[1] != report.total]
    if fewer:
        sentences.append(_effect(report, fewer, whole, gain))
    for pairs in sorted({pairs for pairs, _ in cells}, reverse=True):
        smaller = [cell for cell in cells if cell[0] == pairs != cell[1]]
        if smaller:
            sentences.append(_effect(report, smaller, (pairs, pairs), gain))
    if len(cells) > 1:
        sentences += [_precisions(report), *_held_out(report)]
    return [*sentences, _counts(report), _accuracy(report)]


def _effect(
    report: Sensitivity, cells: Sequence[tuple[int, int]], base: tuple[int, int], gain: float
) -> str:
    """What some cells cost against another one, under each setting."""
    name = "Fewer pairs" if cells[0][0] != base[0] else "A smaller contrast size"
    parts: list[str] = []
    worst: dict[str, float] = {}
    for setting, label in SETTINGS.items():
        best = report.summary(base, setting, "nlpd")[0]
        changes: list[str] = []
        for cell in cells:
            mean, error = report.summary(cell, setting, "nlpd")
            changes.append(f"{mean - best:+.3f} ± {error:.4f} ({min(cell):,})")
            worst[setting] = max(worst.get(setting, 0.0), 100.0 * (mean - best) / gain)
        parts.append(f"{label}: {', '.join(changes)}")
    return (
        f"**{name}** than {base[0]:,} pairs in one block. Change of the mean NLPD, {'; '.join(parts)}. "
        f"{_verdict(worst)}"
    )


def _verdict(worst: dict[str, float]) -> str:
    """What follows from the largest losses, in percent of the gain over the plain model."""
    if max(worst.values()) <= _NEGLIGIBLE:
        return (
            f"At most {max(worst.values()):.0f} % of the gain over the plain model is lost, whatever the "
            "setting: choose by what it costs."
        )
    shares = [
        f"{share:.0f} %{' (worse than the plain model)' if share > 100.0 else ''} ({SETTINGS[name]})"
        for name, share in worst.items()
    ]
    text = f"At worst this loses, of the gain over the plain model, {', '.join(shares)}."
    if worst["chosen"] <= _NEGLIGIBLE:
        text += (
            " With labelled images for validation choose the count again, and it hardly matters."
        )
    else:
        text += " Choosing the count again does not bring it back: take as many as there are."
    safer = min(("fixed", "evidence"), key=lambda name: worst[name])
    return f"{text} Without labelled images the safer setting is: {SETTINGS[safer]}."


def _precisions(report: Sensitivity) -> str:
    """Prior precision of the image projection from the fewest and from all pairs, one block each."""
    cells = [cell for cell in report.cells() if cell[0] == cell[1]]
    values = {
        setting: [
            statistics.fmean(trial.prior_precision for trial in report.of(cell, setting))
            for cell in (cells[-1], cells[0])
        ]
        for setting in ("fixed", "evidence")
    }
    return (
        f"**The prior precision** of the image projection goes from {values['fixed'][0]:.1f} to "
        f"{values['fixed'][1]:.1f} by the reference objective and from {values['evidence'][0]:.1f} to "
        f"{values['evidence'][1]:.1f} by the evidence when there are {cells[0][0]:,} pairs instead of "
        f"{cells[-1][0]:,}. The smaller it is, the wider is the posterior."
    )


def _held_out(report: Sensitivity) -> list[str]:
    """What the slices say that the count was not chosen on, where there are any."""

    def mean(scores: Sequence[Scores]) -> float:
        return statistics.fmean(
            s.values["nlpd"]
            for s in scores
            if s.slice not in report.selection_slices and not _is_repeat(scores, s)
        )

    if all(score.slice in report.selection_slices for score in report.plain):
        return []
    cells = [cell for cell in report.cells() if cell[0] == cell[1]]
    few, whole = (
        statistics.fmean(mean(trial.scores) for trial in report.of(cell, "fixed"))
        for cell in (cells[0], cells[-1])
    )
    text = (
        f"**Held-out concepts**, which have no part in any choice: mean NLPD {mean(report.plain):.3f} of the plain "
        f"model, {whole:.3f} from {cells[-1][0]:,} pairs and {few:.3f} from {cells[0][0]:,} ({SETTINGS['fixed']})."
    )
    if few < whole:
        text += " What is wider than seen concepts call for is better for these: choose for what you expect."
    return [text]


def _fallback(report: Sensitivity) -> str:
    """Where the reference objective had no maximum."""
    pairs = sorted(
        {t.pairs for t in report.trials if t.setting != "evidence" and t.objective == "evidence"}
    )
    if not pairs:
        return ""
    listed = ", ".join(f"{count:,}" for count in pairs)
    return f"\n  It has no maximum for some posteriors of {listed} pairs: the evidence was taken instead."


def _counts(report: Sensitivity) -> str:
    """Which counts were chosen, by cell."""
    listed = [
        f"{_range(report, cell)} for {cell[0]:,} pairs, C = {cell[1]:,}" for cell in report.cells()
    ]
    return f"**Re-chosen pseudo-data counts**: {'; '.join(listed)}."


def _range(report: Sensitivity, cell: tuple[int, int]) -> str:
    counts = sorted({trial.pseudo_data_count for trial in report.of(cell, "chosen")})
    return f"{counts[0]:g}" if len(counts) == 1 else f"{counts[0]:g} to {counts[-1]:g}"


def _accuracy(report: Sensitivity) -> str:
    plain = report.mean(report.plain, "accuracy")
    changes = [report.mean(trial.scores, "accuracy") - plain for trial in report.trials]
    largest = max(changes, key=abs)
    return (
        f"**Accuracy** hardly depends on any of it: of all {len(changes)} posteriors the largest change "
        f"against the plain model's mean of {plain:.3f} is {largest:+.4f}."
        if abs(largest) < 0.01
        else f"**Accuracy** changes by up to {largest:+.3f} against the plain model's mean of {plain:.3f}: "
        "look at it as well."
    )


def _format(mean: float, error: float | None) -> str:
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.4f}"


def _rows(
    plain: dict[str, float], lines: list[tuple[str, str, str, dict[str, dict[str, str]]]]
) -> str:
    columns = ["pairs", "C"]
    for name in (f"reference, {FIXED_COUNT:g}", f"evidence, {EVIDENCE_COUNT:g}"):
        columns += [f"{name}: NLPD", "ECE", "accuracy"]
    columns += ["re-chosen: count", "NLPD", "ECE", "accuracy"]
    shown = [f"{plain[metric]:.3f}" for metric in _METRICS]
    rows = [["plain model", "", *shown, *[""] * 7]]
    for pairs, contrast, counts, values in lines:
        fixed, evidence, chosen = ([values[s][m] for m in _METRICS] for s in SETTINGS)
        rows.append([pairs, contrast, *fixed, *evidence, counts, *chosen])
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def _summary(report: Sensitivity) -> str:
    plain = {metric: report.mean(report.plain, metric) for metric in _METRICS}
    lines = [
        (*_names(report, cell), _measured(report, cell, report.selection_slices, None))
        for cell in report.cells()
    ]
    return _rows(plain, lines)


def _by_task(report: Sensitivity) -> list[str]:
    tables: list[str] = []
    for score in report.plain:
        if _is_repeat(report.plain, score):
            continue
        lines = [
            (*_names(report, cell), _measured(report, cell, (score.slice,), score.task))
            for cell in report.cells()
        ]
        task = _TASKS.get(score.task, score.task)
        title = f"### {score.slice}, {task} ({score.classes}-way, {score.images:,} images)"
        tables.append(f"{title}\n\n{_rows(score.values, lines)}")
    return tables


def _names(report: Sensitivity, cell: tuple[int, int]) -> tuple[str, str, str]:
    pairs = f"{cell[0]:,}" + (" (all)" if cell[0] == report.total else "")
    contrast = f"{cell[1]:,}" + (" (one block)" if cell[0] == cell[1] else "")
    return pairs, contrast, _range(report, cell)


def _measured(
    report: Sensitivity, cell: tuple[int, int], slices: Sequence[str], task: str | None
) -> dict[str, dict[str, str]]:
    """Formatted mean and error over the seeds, by setting and metric."""
    found: dict[str, dict[str, str]] = {}
    for setting in SETTINGS:
        trials = report.of(cell, setting)
        found[setting] = {}
        for metric in _METRICS:
            values = [
                statistics.fmean(
                    s.values[metric]
                    for s in trial.scores
                    if s.slice in slices and task in (None, s.task)
                )
                for trial in trials
            ]
            mean, error = mean_and_error(values)
            shown = error if len(trials) > 1 else None
            found[setting][metric] = _format(mean, shown)
    return found


def _is_repeat(scores: Sequence[Scores], score: Scores) -> bool:
    """Held-out concepts are few: their task of about 105 names is the task of all names."""
    return score.task == "names-105" and any(
        other.slice == score.slice and other.task == "full" and other.classes == score.classes
        for other in scores
    )

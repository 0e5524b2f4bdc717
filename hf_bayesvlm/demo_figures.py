"""The demo's results as HTML: verdicts, bars with error bars, and the entropy in two parts.

Every text that a visitor can choose is escaped.  Colours come from the style sheet (`demo_style.py`), so that
light and dark mode show the same markup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .curvature import Likelihood
from .demo_scoring import Assessment, Prediction, Thresholds, Verdict

MAX_BARS = 8
"""Labels that are shown; the JSON has all of them."""

# Per cent of the bar's width; a shorter one would be a blot.
_LEAST_WHISKER = 1.0
_VERDICTS: dict[Verdict, tuple[str, str]] = {
    "sure": ("✓", "Sure"),
    "unsure": ("?", "Unsure"),
    "none": ("✕", "Probably none of these"),
}


def render_results(
    assessments: Sequence[Assessment],
    *,
    preview: str,
    caption: str,
    thresholds: Thresholds,
    likelihood: Likelihood,
) -> str:
    """The whole result area.

    Args:
        assessments: Plain, Bayesian and perhaps a second posterior, in this order.
        preview: `data:` URL of the image as the model saw it.
        caption: What was done to it.
        thresholds: Of the verdicts.
        likelihood: Of the model.

    Returns:
        HTML.
    """
    shown, left_out = shown_labels(assessments)
    panels = "".join(
        _panel(kind, assessment, shown, left_out, likelihood, assessments[0].name)
        for kind, assessment in zip(("plain", "bayes", "second"), assessments, strict=False)
    )
    return (
        '<div class="bv-results" data-ready="1">'
        f'<div class="bv-summary"><img class="bv-preview" src="{escape(preview)}" '
        f'alt="The image as the model sees it: {escape(caption)}">'
        f'<div class="bv-summary-text"><p class="bv-headline">{_headline(assessments)}</p>'
        f'<p class="bv-caption">The model sees: {escape(caption)}.</p></div></div>'
        f'<div class="bv-panels bv-panels-{len(assessments)}">{panels}</div>'
        f'<p class="bv-rule">{_rule(thresholds, likelihood)}</p></div>'
    )


def render_message(text: str) -> str:
    """An error in place of the result.

    Args:
        text: Plain text.

    Returns:
        HTML that screen readers announce.
    """
    return (
        '<div class="bv-results"><div class="bv-message" role="alert">'
        '<span class="bv-message-icon" aria-hidden="true">!</span>'
        f"<p>{escape(text)}</p></div></div>"
    )


def shown_labels(assessments: Sequence[Assessment]) -> tuple[list[str], int]:
    """Which labels are drawn, in one order for all panels, so that their rows can be compared.

    Args:
        assessments: Of the same labels.

    Returns:
        The best labels of the Bayesian prediction (of the only one, if there is but one) with the best label
        of every other, and how many are left out.
    """
    leader = assessments[min(1, len(assessments) - 1)]
    order = [prediction.label for prediction in leader.predictions]
    needed = {assessment.predictions[0].label for assessment in assessments}
    chosen = set(order[:MAX_BARS])
    missing = [label for label in order if label in needed - chosen]
    kept = [label for label in order[:MAX_BARS] if label not in needed]
    for _ in missing:
        chosen.discard(kept.pop())
    shown = [label for label in order if label in chosen | set(missing)]
    return shown, len(order) - len(shown)


def _panel(
    kind: str,
    assessment: Assessment,
    shown: list[str],
    left_out: int,
    likelihood: Likelihood,
    first_name: str,
) -> str:
    by_label = {prediction.label: prediction for prediction in assessment.predictions}
    best = assessment.predictions[0].label
    rows = "".join(_row(by_label[label], label == best) for label in shown)
    more = ""
    if left_out:
        rest = sum(
            prediction.score
            for prediction in assessment.predictions
            if prediction.label not in shown
        )
        share = f", {percent(rest)} together" if likelihood == "softmax" else ""
        more = f'<p class="bv-more">and {left_out} more{share}</p>'
    symbol, words = _VERDICTS[assessment.verdict]
    return (
        f'<section class="bv-panel bv-{kind}" aria-label="{escape(assessment.name)}" '
        f'data-verdict="{assessment.verdict}">'
        f'<header><div class="bv-title"><h3>{escape(assessment.name)}</h3>'
        f'<span class="bv-verdict bv-verdict-{assessment.verdict}">'
        f'<span aria-hidden="true">{symbol}</span> {words}</span></div>'
        f'<p class="bv-detail">{escape(assessment.detail)}</p></header>'
        f'<div><ul class="bv-bars">{rows}</ul>{more}</div>'
        f"{_entropy(assessment)}{_none(assessment)}</section>"
    )


def _row(prediction: Prediction, best: bool) -> str:
    whisker = ""
    spread = ""
    left, width = 100 * prediction.low, 100 * (prediction.high - prediction.low)
    if width > 0.0:
        spread = f", one standard deviation {percent(prediction.low)} to {percent(prediction.high)}"
    if width >= _LEAST_WHISKER:
        whisker = f'<span class="bv-whisker" style="left:{left:.2f}%;width:{width:.2f}%"></span>'
    label = escape(prediction.label)
    return (
        f'<li class="bv-row{" bv-best" if best else ""}" '
        f'title="{label}: {percent(prediction.score)}{spread}">'
        f'<span class="bv-label">{label}</span>'
        '<span class="bv-track" aria-hidden="true">'
        f'<span class="bv-fill" style="width:{100 * prediction.score:.2f}%"></span>{whisker}</span>'
        f'<span class="bv-score">{percent(prediction.score)}</span></li>'
    )


def _entropy(assessment: Assessment) -> str:
    most = max(assessment.max_entropy, 1e-9)
    aleatoric = 100 * min(assessment.aleatoric / most, 1.0)
    epistemic = 100 * min(assessment.epistemic / most, 1.0 - aleatoric / 100)
    return (
        '<div class="bv-entropy"><div class="bv-entropy-head"><span>Predictive entropy</span>'
        f"<span><b>{assessment.entropy:.2f}</b> of at most {assessment.max_entropy:.2f} nats</span></div>"
        '<div class="bv-stack" aria-hidden="true">'
        f'<span class="bv-aleatoric" style="width:{aleatoric:.2f}%"></span>'
        f'<span class="bv-epistemic" style="width:{epistemic:.2f}%"></span></div>'
        '<div class="bv-legend"><span><i class="bv-aleatoric"></i>aleatoric '
        f"<b>{assessment.aleatoric:.2f}</b></span>"
        '<span><i class="bv-epistemic"></i>epistemic '
        f"<b>{assessment.epistemic:.3f}</b></span></div></div>"
    )


def _none(assessment: Assessment) -> str:
    value = assessment.none_probability
    text = "not known" if value is None else percent(value)
    return f'<p class="bv-none">None of these: <b>{text}</b></p>'


def _headline(assessments: Sequence[Assessment]) -> str:
    plain, bayes = assessments[0], assessments[min(1, len(assessments) - 1)]
    first, second = plain.predictions[0], bayes.predictions[0]
    if first.label == second.label:
        return (
            f"<b>{escape(first.label)}</b>: {percent(first.score)} by the plain model, "
            f"<b>{percent(second.score)}</b> when its uncertainty counts"
        )
    return (
        f"The plain model says <b>{escape(first.label)}</b> ({percent(first.score)}), the Bayesian one "
        f"<b>{escape(second.label)}</b> ({percent(second.score)})"
    )


def _rule(thresholds: Thresholds, likelihood: Likelihood) -> str:
    none = (
        f"the best label’s score is at most {100 * (1.0 - thresholds.none):.3g} %"
        if likelihood == "sigmoid"
        else f"a “something else” class beside your labels would get {100 * thresholds.none:.3g} %"
    )
    more = "" if likelihood == "sigmoid" else " or more"
    return (
        f"<b>Probably none of these</b>: {none}{more}. Otherwise <b>sure</b>: the best label has "
        f"{100 * thresholds.sure:.3g} % or more; else <b>unsure</b>. Whiskers: the score when the label’s own logit "
        "is one standard deviation lower or higher."
    )


def percent(value: float) -> str:
    """A probability in per cent, never rounded to a certainty that it is not.

    Args:
        value: From 0 to 1.

    Returns:
        Such as `"64.8 %"`, `"<0.1 %"` or `">99.9 %"`, with a space that does not break.
    """
    if 0.0 < value < 0.001:
        return "<0.1\u00a0%"
    if 0.999 < value < 1.0:
        return ">99.9\u00a0%"
    return f"{math.floor(1000 * value + 0.5) / 10:.1f}\u00a0%"

"""What the demo computes: plain and Bayesian scores of one image, verdicts, and all of it as JSON.

"Probably none of these" needs something to compare the labels with, because a softmax over labels adds up to 1
whatever the image shows.  For CLIP-like models this is one more class, the mean of a few prompts that fit
anything (`NULL_LABELS`); for SigLIP-like models the sigmoid scores are absolute already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from ._version import __version__
from .base_access import evaluation_mode
from .cosine import GaussianEmbedding, gaussian_embedding
from .curvature import Likelihood
from .demo_images import Degradation
from .label_cache import LabelCache, check_labels, check_templates
from .modeling_bayesvlm import BayesVLMForZeroShot
from .pipeline import BayesVLMZeroShotImageClassificationPipeline, image_uncertainty
from .plotting import score_interval
from .predictive import predictive_probs, probit_logits

MAX_LABELS = 200
MAX_LABEL_LENGTH = 100
MAX_TEMPLATES = 8
MAX_TEMPLATE_LENGTH = 200
MAX_SAMPLES = 200
SURE_THRESHOLD = 0.5
"""An image is unsure when its best label is less probable than this."""

NONE_THRESHOLDS: dict[Likelihood, float] = {"softmax": 0.5, "sigmoid": 0.9}
"""From which probability of "none of these" on this is the verdict.  SigLIP's scores of good matches are often low."""

NULL_LABELS = ("something", "something else", "an object", "a thing", "a picture")
"""Prompts that fit any image."""

Verdict = Literal["sure", "unsure", "none"]


@dataclass(frozen=True)
class Thresholds:
    """Where the verdicts part.

    Attributes:
        sure: Least probability of the best label for "sure".
        none: Least probability of "none of these" for this verdict.

    Raises:
        ValueError: If one is not between 0 and 1.
    """

    sure: float = SURE_THRESHOLD
    none: float = NONE_THRESHOLDS["softmax"]

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0.0 <= value <= 1.0:
                raise ValueError(f"the threshold for {name!r} must be from 0 to 1, not {value!r}")


@dataclass(frozen=True)
class Variant:
    """One way to score: a model and what to call it.

    Attributes:
        name: Short title.
        detail: A line about it.
        model: Shares its base with the other variants.
    """

    name: str
    detail: str
    model: BayesVLMForZeroShot


@dataclass(frozen=True)
class Prediction:
    """One label's score.

    Attributes:
        label: The label.
        score: Predictive probability.
        low: The score when its logit is one standard deviation lower.
        high: The score when its logit is one standard deviation higher.
        logit_mean: Mean of the logit.
        logit_std: Its standard deviation.
    """

    label: str
    score: float
    low: float
    high: float
    logit_mean: float
    logit_std: float


@dataclass(frozen=True)
class Assessment:
    """What one variant says about an image.

    Attributes:
        name: The variant's title.
        detail: The variant's line.
        predictions: Best first.
        entropy: Of the prediction, in nats.
        aleatoric: Expected entropy, in nats: doubt that stays however well the weights are known.
        epistemic: Mutual information, in nats: doubt that comes from the weights.
        max_entropy: Largest possible entropy for as many labels, in nats.
        none_probability: That the image shows none of the labels; None where every null prompt is a label.
        verdict: `"sure"`, `"unsure"` or `"none"`.
    """

    name: str
    detail: str
    predictions: tuple[Prediction, ...]
    entropy: float
    aleatoric: float
    epistemic: float
    max_entropy: float
    none_probability: float | None
    verdict: Verdict


def parse_labels(text: str | Sequence[str]) -> tuple[str, ...]:
    """Labels that a visitor typed, with commas or line ends between them.

    Empty entries and repeats are dropped: lists are pasted, and end with a comma.

    Args:
        text: What was typed, or a list of labels.

    Returns:
        The labels.

    Raises:
        ValueError: If there are none, too many, or one is too long.
    """
    labels = _items(text, separators=",\n", what="labels")
    if not labels:
        raise ValueError("There are no labels: type at least one, such as: cat, dog")
    _check_items("labels", labels, MAX_LABELS, MAX_LABEL_LENGTH)
    return check_labels(labels)


def parse_templates(text: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Prompt templates that a visitor typed, one a line.

    Args:
        text: What was typed, or a list of templates.

    Returns:
        The templates, or None for the model's own.

    Raises:
        ValueError: If one has no `{}`, there are too many, or one is too long.
    """
    templates = _items(text or "", separators="\n", what="prompt templates")
    if not templates:
        return None
    _check_items("prompt templates", templates, MAX_TEMPLATES, MAX_TEMPLATE_LENGTH)
    return check_templates(templates)


def default_templates(model: BayesVLMForZeroShot) -> tuple[str, ...]:
    """The model's own prompt templates under the limits for visitors, or the stock one."""
    return parse_templates(model.config.hypothesis_template) or check_templates(None)


def assess(
    pipe: BayesVLMZeroShotImageClassificationPipeline,
    variants: Sequence[Variant],
    image: Image.Image,
    labels: tuple[str, ...],
    templates: tuple[str, ...] | None = None,
    thresholds: Thresholds | None = None,
) -> list[Assessment]:
    """Score one image with several variants of a model; the image tower runs once.

    Scores and entropies are those of the pipeline for the same model.

    Args:
        pipe: Preprocesses, and keeps the labels.
        variants: Share the base of the pipeline's model.
        image: In RGB.
        labels: From `parse_labels`.
        templates: From `parse_templates`.
        thresholds: For the verdicts; by default those of the model's likelihood.

    Returns:
        One assessment a variant.

    Raises:
        ValueError: For NaN in the model, or if the variants do not share a base.
    """
    if any(variant.model.vlm is not pipe.bayes_model.vlm for variant in variants):
        raise ValueError("the variants do not share the pipeline's base model")
    if templates is None:
        templates = default_templates(pipe.bayes_model)
    if thresholds is None:
        thresholds = Thresholds(none=NONE_THRESHOLDS[pipe.bayes_model.likelihood])
    with torch.no_grad(), evaluation_mode(pipe.bayes_model):
        inputs = pipe.preprocess(image).to(pipe.device)
        embedding = pipe.bayes_model.encode_image(**inputs)
        return [
            _assess_one(
                variant, embedding, labels, templates, thresholds, pipe.label_cache, pipe.tokenizer
            )
            for variant in variants
        ]


def _assess_one(
    variant: Variant,
    embedding: GaussianEmbedding,
    labels: tuple[str, ...],
    templates: tuple[str, ...],
    thresholds: Thresholds,
    cache: LabelCache,
    tokenizer: Any,
) -> Assessment:
    model = variant.model
    covariance = None
    if model.factors is not None:
        covariance = model.factors.covariance("image", embedding.mean.dtype)
    image = gaussian_embedding(embedding.mean, embedding.features, covariance)
    label_set = cache.get(model, tokenizer, labels, templates)
    mean, var = model.similarity(image, label_set.embedding)
    logits = probit_logits(mean, var)
    scores = predictive_probs(logits, model.likelihood)[0]
    entropies = {
        name: float(value[0])
        for name, value in image_uncertainty(
            model, image, label_set, min(model.config.num_samples, MAX_SAMPLES)
        ).items()
    }
    if not bool(torch.isfinite(scores).all()) or not all(map(math.isfinite, entropies.values())):
        raise ValueError("the model gave NaN or infinite scores: its weights are damaged")
    null_labels = _null_labels(labels)
    null_logits = None
    if model.likelihood == "softmax" and null_labels:
        nulls = cache.get(model, tokenizer, null_labels, templates)
        null_logits = probit_logits(*model.similarity(image, nulls.embedding))[0]
    none = none_probability(logits[0], null_logits, model.likelihood)
    predictions = _predictions(labels, scores, mean[0], var[0])
    return Assessment(
        name=variant.name,
        detail=variant.detail,
        predictions=predictions,
        entropy=entropies["entropy"],
        aleatoric=entropies["expected_entropy"],
        epistemic=entropies["mutual_information"],
        max_entropy=max_entropy(len(labels), model.likelihood),
        none_probability=none,
        verdict=verdict(predictions[0].score, none, thresholds),
    )


def none_probability(
    logits: Tensor, null_logits: Tensor | None, likelihood: Likelihood
) -> float | None:
    r"""Probability that an image shows none of the labels.

    Softmax: of one more class beside the labels, whose odds are the mean of those of the null prompts,
    $\bar e / (\bar e + \sum_c e^{z_c})$ with $\bar e = \frac1M \sum_m e^{z_m}$.  Sigmoid: what the best label's
    score leaves, $1 - \max_c \sigma(z_c)$.

    Args:
        logits: Probit-scaled logits of the labels, `[labels]`.
        null_logits: Those of the null prompts, `[nulls]`; not needed for a sigmoid.
        likelihood: `"softmax"` or `"sigmoid"`.

    Returns:
        The probability; None without null prompts.
    """
    if likelihood == "sigmoid":
        return float(torch.sigmoid(-logits.double().max()))
    if null_logits is None:
        return None
    null = null_logits.double().logsumexp(0) - math.log(len(null_logits))
    return float(torch.sigmoid(null - logits.double().logsumexp(0)))


def verdict(score: float, none: float | None, thresholds: Thresholds) -> Verdict:
    """What to say about an image.

    Args:
        score: Of the best label.
        none: Probability of "none of these"; None where it is not known.
        thresholds: Where the verdicts part.

    Returns:
        `"none"` if this is probable enough, else `"sure"` if the best label is, else `"unsure"`.
    """
    if none is not None and none >= thresholds.none:
        return "none"
    return "sure" if score >= thresholds.sure else "unsure"


def max_entropy(num_labels: int, likelihood: Likelihood) -> float:
    """Largest entropy, in nats: of a uniform choice, or of as many fair coins for a sigmoid."""
    return math.log(num_labels) if likelihood == "softmax" else num_labels * math.log(2.0)


def as_json(
    assessments: Sequence[Assessment],
    *,
    model: str,
    labels: Sequence[str],
    templates: Sequence[str],
    degradation: Degradation,
    thresholds: Thresholds,
    likelihood: Likelihood,
) -> dict[str, Any]:
    """A result that can be shared: what was asked, of which model, and what came out.

    Args:
        assessments: Plain, Bayesian and perhaps a second posterior, in this order.
        model: What names the model.
        labels: As they were scored.
        templates: As they were used.
        degradation: Of the image.
        thresholds: Of the verdicts.
        likelihood: Of the model.

    Returns:
        Strings, numbers, lists and dictionaries only.
    """
    keys = ("plain", "bayesian", "second")
    return {
        "hf_bayesvlm": __version__,
        "model": model,
        "likelihood": likelihood,
        "labels": list(labels),
        "templates": list(templates),
        "degradation": asdict(degradation),
        "thresholds": asdict(thresholds),
        "null_labels": list(_null_labels(labels)) if likelihood == "softmax" else [],
        **{
            key: asdict(assessment) | {"predictions": [asdict(p) for p in assessment.predictions]}
            for key, assessment in zip(keys, assessments, strict=False)
        },
    }


def _predictions(
    labels: tuple[str, ...], scores: Tensor, mean: Tensor, var: Tensor
) -> tuple[Prediction, ...]:
    rows: list[Prediction] = []
    stds = var.sqrt().tolist()
    values, means = scores.tolist(), mean.tolist()
    for i in scores.argsort(descending=True, stable=True).tolist():
        # Without uncertainty the interval is the score, to the last digit.
        low, high = score_interval(values[i], stds[i]) if stds[i] else (values[i], values[i])
        rows.append(Prediction(labels[i], values[i], low, high, means[i], stds[i]))
    return tuple(rows)


def _null_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """The null prompts that are not among the labels."""
    given = {label.casefold() for label in labels}
    return tuple(label for label in NULL_LABELS if label not in given)


def _items(text: str | Sequence[str], *, separators: str, what: str) -> list[str]:
    if isinstance(text, str):
        for separator in separators[1:]:
            text = text.replace(separator, separators[0])
        text = text.split(separators[0])
    if not isinstance(text, (list, tuple)) or not all(isinstance(item, str) for item in text):
        raise ValueError(f"The {what} must be text.")
    stripped = [item.strip() for item in text]
    return list(dict.fromkeys(item for item in stripped if item))


def _check_items(what: str, items: list[str], most: int, length: int) -> None:
    if len(items) > most:
        raise ValueError(f"There are {len(items)} {what}; at most {most} are accepted.")
    longest = max(items, key=len)
    if len(longest) > length:
        raise ValueError(
            f"One of the {what} has {len(longest)} characters ({longest[:30]!r}…); "
            f"at most {length} are accepted."
        )

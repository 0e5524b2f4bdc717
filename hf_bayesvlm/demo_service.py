"""What the demo answers: one request in, a page and its JSON out.  Knows nothing of the user interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .curvature import Likelihood
from .demo_figures import render_results
from .demo_images import Degradation, as_data_url, degrade, read_visitor_image
from .demo_models import Hyperparameters, ModelStore
from .demo_scoring import (
    NONE_THRESHOLDS,
    SURE_THRESHOLD,
    Thresholds,
    as_json,
    assess,
    default_templates,
    parse_labels,
    parse_templates,
)


@dataclass(frozen=True)
class Request:
    """What a visitor asks.

    Attributes:
        image: A file that the server has stored, or the encoded bytes.
        labels: As typed, or a list.
        templates: As typed, one a line; empty for the model's own.
        degradation: Of the image.
        sure_threshold: Least probability of the best label for "sure".
        none_threshold: Least probability of "none of these" for that verdict; None for the model's default.
        model: A name of the operator's, or a Hub id; None for the default.
        posterior: The same of a posterior; None for the model's own.
        compare: Whether to score with a second posterior.
        second_posterior: Its name or Hub id; None for the first's.
        second_hyperparameters: Changes to it.
    """

    image: str | Path | bytes
    labels: str | Sequence[str]
    templates: str | Sequence[str] | None = None
    degradation: Degradation = field(default_factory=Degradation)
    sure_threshold: float = SURE_THRESHOLD
    none_threshold: float | None = None
    model: str | None = None
    posterior: str | None = None
    compare: bool = False
    second_posterior: str | None = None
    second_hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)


@dataclass(frozen=True)
class Answer:
    """What comes back.

    Attributes:
        html: The result area of the page.
        result: The same as strings, numbers, lists and dictionaries.
        likelihood: Of the model.
    """

    html: str
    result: dict[str, Any]
    likelihood: Likelihood


class DemoService:
    """Answers requests; any number of threads may call it at once.

    Args:
        store: The models.
    """

    def __init__(self, store: ModelStore) -> None:
        self.store = store

    def answer(self, request: Request) -> Answer:
        """Score one image.

        Args:
            request: What is asked.

        Returns:
            The answer.

        Raises:
            ValueError: For anything that the visitor can mend; the message is for the visitor
                (`DemoError` and `ImageInputError` are among them).
        """
        # Cheap checks come before a model is loaded.
        labels = parse_labels(request.labels)
        templates = parse_templates(request.templates)
        image = read_visitor_image(request.image)
        loaded = self.store.load(request.model)
        second = None
        if request.compare:
            second = (request.second_posterior, request.second_hyperparameters)
        variants = self.store.variants(loaded, request.posterior, second)
        model = loaded.pipe.bayes_model
        none = request.none_threshold
        if none is None:
            none = NONE_THRESHOLDS[model.likelihood]
        thresholds = Thresholds(sure=request.sure_threshold, none=none)
        templates = templates or default_templates(model)
        degraded = degrade(image, request.degradation)
        assessments = assess(loaded.pipe, variants, degraded, labels, templates, thresholds)
        html = render_results(
            assessments,
            preview=as_data_url(degraded),
            caption=describe(request.degradation),
            thresholds=thresholds,
            likelihood=model.likelihood,
        )
        result = as_json(
            assessments,
            model=loaded.name,
            labels=labels,
            templates=templates,
            degradation=request.degradation,
            thresholds=thresholds,
            likelihood=model.likelihood,
        )
        return Answer(html, result, model.likelihood)


def describe(degradation: Degradation) -> str:
    """What was done to an image, in words.

    Args:
        degradation: Of the image.

    Returns:
        Such as `"the image rotated by 30°, with blur 2 %"`.
    """
    parts = []
    if degradation.rotation:
        parts.append(f"rotated by {degradation.rotation:g}°")
    if degradation.blur:
        parts.append(f"with blur {degradation.blur:g} %")
    if degradation.noise:
        parts.append(f"with noise {degradation.noise:g} %")
    return "the image " + ", ".join(parts) if parts else "the image as it is"

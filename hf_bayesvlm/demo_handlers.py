"""What happens on the demo page: raw values of its components in, results or a sentence out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from .demo_figures import render_message
from .demo_images import Degradation
from .demo_models import Hyperparameters
from .demo_server import uploaded_path
from .demo_service import Answer, DemoService, Request

logger = logging.get_logger(__name__)

AS_IT_IS = "as it is"
"""Choice of a drop-down list that changes nothing."""

_NONE_THRESHOLD = 7  # its place among the values
_UNEXPECTED = "Something went wrong on the server. Try another image or other settings."
_NO_IMAGE = "There is no image: upload, paste or take one, or pick an example."


class Handlers:
    """Event handlers.  The values come in the order of the arguments of `classify`.

    Args:
        service: Answers.
    """

    def __init__(self, service: DemoService) -> None:
        self.service = service

    def update(self, *values: Any) -> tuple[str, Any]:
        """Result area and JSON; an error takes the place of the result."""
        try:
            answer = self._answer(*values)
        except ValueError as error:
            return render_message(str(error)), None
        except Exception:
            logger.exception("the demo could not answer")
            return render_message(_UNEXPECTED), None
        return answer.html, answer.result

    def load(self, *values: Any) -> tuple[str, Any, Any]:
        """Score with another model, at the default threshold of its likelihood."""
        import gradio as gr

        changed = list(values)
        changed[_NONE_THRESHOLD] = None
        html, result = self.update(*changed)
        if result is None:
            return html, result, gr.skip()
        return html, result, result["thresholds"]["none"]

    def classify(
        self,
        image: Any,
        labels: str,
        templates: str,
        blur: float,
        noise: float,
        rotation: float,
        sure_threshold: float,
        none_threshold: float,
        model: str,
        posterior: str,
        compare: bool,
        second_posterior: str,
        pseudo_data_count: str,
        covariance: str,
        damping: str,
        modalities: str,
        objective: str,
    ) -> dict[str, Any]:
        """The endpoint `/classify`; its errors are sentences too."""
        import gradio as gr

        try:
            answer = self._answer(
                image,
                labels,
                templates,
                blur,
                noise,
                rotation,
                sure_threshold,
                none_threshold,
                model,
                posterior,
                compare,
                second_posterior,
                pseudo_data_count,
                covariance,
                damping,
                modalities,
                objective,
            )
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except Exception:
            logger.exception("the demo could not answer")
            raise gr.Error(_UNEXPECTED, print_exception=False) from None
        return answer.result

    def _answer(self, *values: Any) -> Answer:
        (image, labels, templates, blur, noise, rotation, sure, none, model, posterior, compare) = (
            values[:11]
        )
        second, count, *others = values[11:]
        path = uploaded_path(image)
        if path is None:
            raise ValueError(_NO_IMAGE)
        return self.service.answer(
            Request(
                image=path,
                labels=labels or "",
                templates=templates,
                degradation=Degradation(blur=blur, noise=noise, rotation=rotation),
                sure_threshold=sure,
                none_threshold=none,
                model=_text("model", model),
                posterior=_text("posterior", posterior),
                compare=bool(compare),
                second_posterior=_text("second posterior", second),
                second_hyperparameters=_hyperparameters(count, others),
            )
        )


def _hyperparameters(count: Any, others: Sequence[Any]) -> Hyperparameters:
    """From the drop-down lists; wrong values are refused by the posterior."""
    text = _text("pseudo-data count", count)
    try:
        number = None if text is None else float(text)
    except ValueError as error:
        raise ValueError(f"The pseudo-data count {text!r} is not a number.") from error
    names = ("covariance", "damping", "modalities", "objective")
    chosen = {name: _text(name, value) for name, value in zip(names, others, strict=True)}
    return Hyperparameters(pseudo_data_count=number, **chosen)


def _text(what: str, value: Any) -> str | None:
    if value is None or value == AS_IT_IS:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = f"{value:g}"
    if not isinstance(value, str):
        raise ValueError(f"The {what} must be text.")
    return value.strip() or None

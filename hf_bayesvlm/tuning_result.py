"""What tuning tried and what it chose."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .cosine import CovarianceForm, Modalities
from .kronecker import Damping
from .laplace import Objective
from .metrics import Scores
from .posterior import BayesVLMPosterior

Criterion = Literal["nlpd", "ece", "brier"]


@dataclass(frozen=True)
class Trial:
    """One candidate and its metrics on the validation set.

    Attributes:
        pseudo_data_count: Of both projections.
        objective: How the prior precisions were chosen.
        covariance: `"diagonal"` or `"full"`.
        damping: `"factored"` or `"exact"`.
        modalities: Whose uncertainty counts.
        image_prior_precision: Of the image projection.
        text_prior_precision: Of the text projection.
        nlpd: Negative log predictive density, nats an image (`metrics.RunningScores`).
        ece: Expected calibration error.
        accuracy: Accuracy.
        brier: Brier score.
    """

    pseudo_data_count: float
    objective: Objective
    covariance: CovarianceForm
    damping: Damping
    modalities: Modalities
    image_prior_precision: float
    text_prior_precision: float
    nlpd: float
    ece: float
    accuracy: float
    brier: float


@dataclass(frozen=True, eq=False)
class TuningResult:
    """What was tried, and what was chosen.

    Attributes:
        posterior: The chosen posterior, with the choice in `provenance["tuning"]`.
        best: The chosen candidate.
        trials: All candidates, in the order of the grid.
        plain: Metrics of the plain model (MAP) on the same images.
        criterion: What was minimised.
        max_accuracy_loss: Accuracy that a choice may lose against the plain model; None for any.
        num_images: Validation images.
        num_classes: Classes.
        left_out: Combinations without a prior precision, with the reason.
        seconds: What the grid took, without the towers.
    """

    posterior: BayesVLMPosterior
    best: Trial
    trials: tuple[Trial, ...]
    plain: Scores
    criterion: Criterion
    max_accuracy_loss: float | None
    num_images: int
    num_classes: int
    left_out: tuple[str, ...]
    seconds: float

    def ranked(self) -> list[Trial]:
        """All candidates, best first by the criterion; those that lose too much accuracy come last."""
        return sorted(
            self.trials, key=lambda t: (not self.keeps_accuracy(t), getattr(t, self.criterion))
        )

    def keeps_accuracy(self, trial: Trial) -> bool:
        """Whether a candidate loses no more accuracy than allowed."""
        return _keeps_accuracy(trial, self.plain, self.max_accuracy_loss)

    @property
    def at_grid_edge(self) -> Literal["smallest", "largest"] | None:
        """Whether the chosen count is the smallest or largest tried, so that a wider grid may do better."""
        counts = {trial.pseudo_data_count for trial in self.trials}
        if len(counts) > 1 and self.best.pseudo_data_count == min(counts):
            return "smallest"
        if len(counts) > 1 and self.best.pseudo_data_count == max(counts):
            return "largest"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the factors, as plain numbers and strings."""
        return {
            "criterion": self.criterion,
            "max_accuracy_loss": self.max_accuracy_loss,
            "num_images": self.num_images,
            "num_classes": self.num_classes,
            "seconds": self.seconds,
            "plain": asdict(self.plain),
            "best": asdict(self.best),
            "left_out": list(self.left_out),
            "trials": [asdict(trial) for trial in self.ranked()],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)


def choose_trial(
    trials: Sequence[Trial], plain: Scores, criterion: Criterion, max_loss: float | None
) -> Trial:
    """The candidate with the lowest criterion among those that keep the plain model's accuracy.

    Args:
        trials: All candidates; of equals the first is taken.
        plain: Metrics of the plain model.
        criterion: What to minimise.
        max_loss: Accuracy that a choice may lose; None for any.

    Returns:
        The choice.

    Raises:
        ValueError: If every candidate loses more.
    """
    keeping = [trial for trial in trials if _keeps_accuracy(trial, plain, max_loss)]
    if not keeping:
        closest = max(trials, key=lambda trial: trial.accuracy)
        raise ValueError(
            f"every candidate loses more than max_accuracy_loss={max_loss:g} against the plain model's "
            f"accuracy of {plain.accuracy:.4f}; the closest has {closest.accuracy:.4f}, at a pseudo-data count "
            f"of {closest.pseudo_data_count:g}. Try larger counts, more images, or a larger max_accuracy_loss"
        )
    return min(keeping, key=lambda trial: getattr(trial, criterion))


def _keeps_accuracy(trial: Trial, plain: Scores, max_loss: float | None) -> bool:
    # A loss of exactly the limit is allowed, whatever the rounding.
    return max_loss is None or trial.accuracy >= plain.accuracy - max_loss - 1e-9

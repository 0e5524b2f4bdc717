"""Metrics of probabilistic classifiers, as pure functions of probabilities and labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .curvature import Likelihood


def accuracy(probs: Tensor, labels: Tensor) -> float:
    """Share of rows whose most probable class is the label.

    Args:
        probs: `[batch, classes]`.
        labels: Class indices, `[batch]`.

    Returns:
        Between 0 and 1.

    Raises:
        ValueError: If shapes disagree, there are no rows, or a label is out of range.
    """
    _check(probs, labels)
    return (probs.argmax(dim=1) == labels).double().mean().item()


def nlpd(probs: Tensor, labels: Tensor) -> float:
    """Negative log predictive density, the mean of `-log p(label)`.

    Args:
        probs: `[batch, classes]`.
        labels: Class indices, `[batch]`.

    Returns:
        In nats; infinite where a label has probability 0.

    Raises:
        ValueError: As `accuracy`.
    """
    _check(probs, labels)
    picked = probs.double().gather(1, labels[:, None])
    return -picked.log().mean().item()


def ece(probs: Tensor, labels: Tensor, *, num_bins: int = 20) -> float:
    """Expected calibration error of the top class: equal-width bins, weighted l1 (arXiv:1706.04599).

    Args:
        probs: `[batch, classes]`.
        labels: Class indices, `[batch]`.
        num_bins: Bins of confidence; the paper takes 20.

    Returns:
        Between 0 and 1.

    Raises:
        ValueError: As `accuracy`, or for fewer than one bin.
    """
    _check(probs, labels)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, not {num_bins}")
    confidence, predicted = probs.double().max(dim=1)
    correct = (predicted == labels).double()
    gaps = _bin_gaps(confidence, correct, num_bins)
    return gaps.abs().sum().item() / labels.numel()


def brier(probs: Tensor, labels: Tensor) -> float:
    """Brier score: mean squared distance between the probabilities and the one-hot label.

    Args:
        probs: `[batch, classes]`.
        labels: Class indices, `[batch]`.

    Returns:
        Between 0 and 2.

    Raises:
        ValueError: As `accuracy`.
    """
    _check(probs, labels)
    probs = probs.double()
    picked = probs.gather(1, labels[:, None])[:, 0]
    return (probs.square().sum(dim=1) - 2.0 * picked + 1.0).mean().item()


@dataclass(frozen=True)
class Scores:
    """Metrics of one classifier on one labelled set.

    Attributes:
        nlpd: Negative log predictive density, nats an image.
        ece: Expected calibration error of the top class, between 0 and 1.
        accuracy: Between 0 and 1.
        brier: Between 0 and 2 for a softmax.
    """

    nlpd: float
    ece: float
    accuracy: float
    brier: float


class RunningScores:
    r"""All metrics over many batches, from predictive logits, without keeping the probabilities.

    With a softmax they are `nlpd`, `ece`, `accuracy` and `brier` of the probabilities.  With a sigmoid every
    class has a probability of its own, and an image is a yes for its label and a no for every other class:
    the NLPD is $-\log\sigma(z_y) - \sum_{c \ne y} \log\sigma(-z_c)$, the density of all these answers.  It is a proper
    score of the very numbers that a sigmoid model shows; the other metrics are taken of them as they are.

    Args:
        likelihood: `"softmax"` or `"sigmoid"`.
        num_bins: Bins of confidence for the ECE.

    Raises:
        ValueError: For an unknown likelihood, or fewer than one bin.

    Example:
        >>> scores = RunningScores("softmax")
        >>> scores.update(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> round(scores.result().nlpd, 4), scores.result().ece
        (1.3863, 0.25)
    """

    def __init__(self, likelihood: Likelihood, *, num_bins: int = 20) -> None:
        if likelihood not in ("softmax", "sigmoid"):
            raise ValueError(f"likelihood must be 'softmax' or 'sigmoid', not {likelihood!r}")
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, not {num_bins}")
        self.likelihood = likelihood
        self.num_bins = num_bins
        self._count = 0
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._gaps = torch.zeros(num_bins, dtype=torch.float64)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch.

        Args:
            logits: Predictive logits, whose softmax or sigmoid is the prediction, `[batch, classes]`.
            labels: Class indices, `[batch]`.

        Raises:
            ValueError: If shapes disagree, there are no rows, or a label is out of range.
        """
        _check(logits, labels)
        logits, column = logits.double(), labels[:, None]
        if self.likelihood == "softmax":
            log_probs = logits.log_softmax(dim=1)
            density = log_probs.gather(1, column)[:, 0]
            probs = log_probs.exp()
        else:
            probs = logits.sigmoid()
            # log sigma(-z) of every class, and z more for the label: log sigma(z) = log sigma(-z) + z.
            noes = torch.nn.functional.logsigmoid(-logits).sum(dim=1)
            density = noes + logits.gather(1, column)[:, 0]
        confidence, predicted = probs.max(dim=1)
        correct = (predicted == labels).double()
        misses = probs.square().sum(dim=1) - 2.0 * probs.gather(1, column)[:, 0] + 1.0
        self._sums += torch.stack([-density.sum(), correct.sum(), misses.sum()]).cpu()
        self._gaps += _bin_gaps(confidence, correct, self.num_bins).cpu()
        self._count += labels.numel()

    def result(self) -> Scores:
        """The metrics of all batches so far.

        Raises:
            ValueError: If there were none.
        """
        if self._count == 0:
            raise ValueError("there are no rows to measure")
        nlpd_sum, correct, misses = self._sums.tolist()
        return Scores(
            nlpd=nlpd_sum / self._count,
            ece=self._gaps.abs().sum().item() / self._count,
            accuracy=correct / self._count,
            brier=misses / self._count,
        )


def _bin_gaps(confidence: Tensor, correct: Tensor, num_bins: int) -> Tensor:
    """Sum of `correct - confidence` in every bin of confidence, `[num_bins]`."""
    # Bins are (lower, upper]: a confidence of exactly 1 belongs to the last one.
    bins = (confidence * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1)
    gaps = torch.zeros(num_bins, dtype=torch.float64, device=confidence.device)
    return gaps.index_add_(0, bins, correct - confidence)


def _check(probs: Tensor, labels: Tensor) -> None:
    if probs.ndim != 2 or labels.ndim != 1 or probs.shape[0] != labels.shape[0]:
        raise ValueError(
            f"probs must be [batch, classes] and labels [batch], not {tuple(probs.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if labels.numel() == 0:
        raise ValueError("there are no rows to measure")
    if labels.min() < 0 or labels.max() >= probs.shape[1]:
        raise ValueError(f"labels must be class indices from 0 to {probs.shape[1] - 1}")

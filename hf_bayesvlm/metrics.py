"""Metrics of probabilistic classifiers, as pure functions of probabilities and labels."""

from __future__ import annotations

import torch
from torch import Tensor


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
    # Bins are (lower, upper]: a confidence of exactly 1 belongs to the last one.
    bins = (confidence * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1)
    gaps = torch.zeros(num_bins, dtype=torch.float64, device=probs.device)
    gaps.index_add_(0, bins, correct - confidence)
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

r"""Uncertainty of predictive distributions, in nats.

Total entropy splits into the expected entropy (noise that more data would not remove) and the mutual
information between the label and the weights (BALD, Houlsby et al. 2011, arXiv:1112.5745):
$H[E_w\,p] = E_w H[p] + I(y; w)$.

Under a sigmoid likelihood labels do not compete: each is a Bernoulli variable, and entropies are summed
over the labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .curvature import Likelihood


def entropy(probs: Tensor, *, likelihood: Likelihood = "softmax") -> Tensor:
    """Entropy of each distribution; exactly 0 at a probability of 0 or 1.

    Args:
        probs: `[..., classes]`.
        likelihood: `"softmax"`: one categorical variable; `"sigmoid"`: one Bernoulli variable a class.

    Returns:
        Entropies in nats, `[...]`.

    Raises:
        ValueError: For an unknown likelihood.
    """
    if likelihood not in ("softmax", "sigmoid"):
        raise ValueError(f"likelihood must be 'softmax' or 'sigmoid', not {likelihood!r}")
    terms = torch.special.entr(probs)
    if likelihood == "sigmoid":
        # entr(1 - p) with the digits of a small p.
        terms = terms - torch.special.xlog1py(1.0 - probs, -probs)
    return terms.sum(dim=-1)


def expected_entropy(probs: Tensor, *, likelihood: Likelihood = "softmax") -> Tensor:
    """Mean entropy over weight samples (aleatoric part).

    Args:
        probs: `[batch, samples, classes]`.
        likelihood: As in `entropy`.

    Returns:
        `[batch]`, in nats.

    Raises:
        ValueError: If `probs` is not three-dimensional.
    """
    _check_samples(probs)
    return entropy(probs, likelihood=likelihood).mean(dim=-1)


def bald(probs: Tensor, *, likelihood: Likelihood = "softmax") -> Tensor:
    """Mutual information between the label and the weights (epistemic part), BALD.

    Args:
        probs: `[batch, samples, classes]`; each sample is one draw of the weights.
        likelihood: As in `entropy`.

    Returns:
        `[batch]`, in nats, never negative.

    Raises:
        ValueError: If `probs` is not three-dimensional.
    """
    return entropy_decomposition(probs, likelihood=likelihood)[2]


def entropy_decomposition(
    probs: Tensor, *, likelihood: Likelihood = "softmax"
) -> tuple[Tensor, Tensor, Tensor]:
    """Total entropy, expected entropy and mutual information, each computed once.

    Args:
        probs: `[batch, samples, classes]`; each sample is one draw of the weights.
        likelihood: As in `entropy`.

    Returns:
        Three tensors `[batch]`, in nats; the first is the sum of the other two up to rounding, and the
        mutual information is never negative.

    Raises:
        ValueError: If `probs` is not three-dimensional.
    """
    expected = expected_entropy(probs, likelihood=likelihood)
    total = entropy(probs.mean(dim=1), likelihood=likelihood)
    return total, expected, (total - expected).clamp_min(0.0)


def _check_samples(probs: Tensor) -> None:
    if probs.ndim != 3:
        raise ValueError(f"probs must be [batch, samples, classes], not {tuple(probs.shape)}")

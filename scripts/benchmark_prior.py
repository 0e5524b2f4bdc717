"""The choice of the prior precision against gradient steps on log-determinants."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from benchmark_common import interleaved
from torch import Tensor

from hf_bayesvlm.laplace import optimize_prior_precision

# Traces of the published image factors of a CLIP ViT-B/32, and the squared norm of its projection.
_TRACES = (5.6e5, 6.1e3)
_WEIGHT_NORM_SQUARED = 63.658
_PSEUDO_DATA_COUNT = 10.0
_LEARNING_RATES = (0.01, 0.1)
_START = 1000.0


@dataclass(frozen=True)
class PriorPrecision:
    """Two ways to the prior precision.

    Attributes:
        in_features: Size of the input factor.
        features: Size of the output factor.
        seconds: Median seconds of ours.
        adam_seconds: Median seconds of Adam.
        adam_steps: Its steps.
        adam_start: Its first prior precision.
        maximum: The maximiser, by bisection of autograd's derivative of the log-determinants in float64.
        distance: How far ours is from it: absolute difference of the logarithms.
        adam_distances: The same of Adam by learning rate.
    """

    in_features: int
    features: int
    seconds: float
    adam_seconds: float
    adam_steps: int
    adam_start: float
    maximum: float
    distance: float
    adam_distances: dict[str, float]

    @property
    def ratio(self) -> float:
        """Adam's seconds over ours."""
        return self.adam_seconds / self.seconds


def reference_objective(log_lam: Tensor, A: Tensor, B: Tensor, norm: float, tau: float) -> Tensor:
    """The reference objective as written, by two log-determinants."""
    in_features, features = len(A), len(B)
    root_lam, root_tau = (0.5 * log_lam).exp(), math.sqrt(tau)
    eyes = (torch.eye(size, dtype=A.dtype) for size in (in_features, features))
    logdets = [
        torch.logdet(root_tau * factor + root_lam * eye)
        for factor, eye in zip((A, B), eyes, strict=True)
    ]
    prior = 0.5 * (in_features * features * log_lam - log_lam.exp() * norm)
    return prior - (in_features * logdets[0] + features * logdets[1])


def adam_precision(
    A: Tensor, B: Tensor, norm: float, tau: float, *, steps: int, rate: float
) -> float:
    """Prior precision after some steps of Adam on its logarithm."""
    log_lam = torch.tensor(math.log(_START), dtype=A.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([log_lam], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (-reference_objective(log_lam, A, B, norm, tau)).backward()
        optimizer.step()
    return math.exp(log_lam.item())


def true_maximum(A: Tensor, B: Tensor, norm: float, tau: float, *, steps: int = 50) -> float:
    """The maximiser by bisection of autograd's derivative: slow, and independent of eigenvalues."""

    def slope(value: float) -> float:
        log_lam = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(reference_objective(log_lam, A, B, norm, tau), log_lam)
        return grad.item()

    low, high = math.log(_START) - 12.0, math.log(_START) + 12.0
    for _ in range(steps):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(middle) > 0.0 else (low, middle)
    return math.exp(0.5 * (low + high))


def random_factor(size: int, trace: float, generator: torch.Generator) -> Tensor:
    """A factor whose eigenvalues fall about as one over their rank."""
    scale = torch.arange(1, size + 1, dtype=torch.float64).rsqrt()
    rows = torch.randn(4 * size, size, generator=generator, dtype=torch.float64) * scale
    factor = rows.T @ rows
    return factor * (trace / factor.trace())


def bench_prior_precision(
    in_features: int, features: int, adam_steps: int, runs: int
) -> PriorPrecision:
    """Seconds of our solve and of Adam, and how far each is from the maximum.

    Args:
        in_features: Size of the input factor.
        features: Size of the output factor.
        adam_steps: Steps of Adam.
        runs: Timed runs of each, in turn.

    Returns:
        The comparison.
    """
    generator = torch.Generator().manual_seed(0)
    A = random_factor(in_features, _TRACES[0], generator)
    B = random_factor(features, _TRACES[1], generator)
    norm, tau = _WEIGHT_NORM_SQUARED, _PSEUDO_DATA_COUNT
    rate = _LEARNING_RATES[0]
    adam_seconds, seconds = interleaved(
        lambda: adam_precision(A, B, norm, tau, steps=adam_steps, rate=rate),
        lambda: optimize_prior_precision(A, B, norm, tau),
        runs,
    )
    maximum = true_maximum(A, B, norm, tau)

    def distance(precision: float) -> float:
        return abs(math.log(precision / maximum))

    return PriorPrecision(
        in_features=in_features,
        features=features,
        seconds=seconds,
        adam_seconds=adam_seconds,
        adam_steps=adam_steps,
        adam_start=_START,
        maximum=maximum,
        distance=distance(optimize_prior_precision(A, B, norm, tau)),
        adam_distances={
            str(rate): distance(adam_precision(A, B, norm, tau, steps=adam_steps, rate=rate))
            for rate in _LEARNING_RATES
        },
    )

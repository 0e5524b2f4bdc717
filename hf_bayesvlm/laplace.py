r"""Choice of the prior precision $\lambda$ by maximising an objective of the Laplace posterior.

Once the eigenvalues of the factors are known, both objectives are functions of one scalar and concave
in $\log\lambda$: their derivative is a sum of terms that fall monotonically.  A bracketed root search on the
derivative therefore finds *the* maximum to machine precision, without a learning rate.

`"evidence"` is the Laplace evidence (arXiv:2104.04975) up to constants,
$-\frac{\lambda}{2}|W|^2 + \frac{KD}{2}\log\lambda - \frac12 \log\det P$, where $P$ is the posterior precision.
`"reference"` is the objective of the authors of arXiv:2412.06014 as their code computes it,
$-\frac{\lambda}{2}|W|^2 + \frac{KD}{2}\log\lambda - [K \log\det\tilde A + D \log\det\tilde B]$;
it reproduces their published values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .curvature import _as_float
from .kronecker import Damping, check_positive, symmetric_eigvalsh

Objective = Literal["reference", "evidence"]

# Prior precisions outside of exp(+-60) are not meaningful in any unit.
_LOG_BOUND = 60.0
# Eigenvalues below this fraction of the largest are rounding of float32 sums.  Counted as curvature, they
# would give an objective without a maximum one near exp(-30).
_RANK_TOLERANCE = 1e-6


def squared_norm(weight: Tensor) -> float:
    """Sum of squares in float64, computed on the CPU: not every device has float64.

    Args:
        weight: Weights of any shape.

    Returns:
        $|W|^2$.
    """
    return float(weight.detach().cpu().double().square().sum())


class NoMaximumError(ValueError):
    """The objective has no maximum: too many eigenvalues of the factors are zero."""


def optimize_prior_precision(
    A: Tensor,
    B: Tensor,
    weight_norm_squared: float | Tensor,
    pseudo_data_count: float,
    objective: Objective = "reference",
    *,
    damping: Damping = "factored",
) -> float:
    r"""Prior precision $\lambda$ that maximises an objective.

    Args:
        A: Input factor, `[in_features, in_features]`.
        B: Output factor, `[features, features]`.
        weight_norm_squared: $|W_{MAP}|^2$, the sum of squares of the projection (and its bias).
        pseudo_data_count: $\tau$, how often the proxy data are counted.
        objective: `"reference"` (the paper's published values) or `"evidence"`.
        damping: Which posterior the evidence is of; `"reference"` is defined for `"factored"` only.

    Returns:
        The maximiser, a positive float.

    Raises:
        NoMaximumError: If the factors have so few non-zero eigenvalues that the objective only falls; this
            is a `ValueError`.
        ValueError: For damaged factors, non-positive scalars, or an unknown objective or damping.

    Example:
        >>> import torch
        >>> A, B = torch.eye(3, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        >>> round(optimize_prior_precision(A, B, 6.0, 1.0, objective="evidence", damping="exact"), 6)
        0.618034
    """
    weight_norm_squared = _checked_norm(weight_norm_squared, pseudo_data_count)
    _check_choice(objective, damping)
    return best_prior_precision(
        symmetric_eigvalsh(A),
        symmetric_eigvalsh(B),
        weight_norm_squared,
        pseudo_data_count,
        objective,
        damping=damping,
    )


def best_prior_precision(
    in_values: Tensor,
    out_values: Tensor,
    weight_norm_squared: float | Tensor,
    pseudo_data_count: float,
    objective: Objective = "reference",
    *,
    damping: Damping = "factored",
) -> float:
    r"""As `optimize_prior_precision`, from eigenvalues that are known already.

    Args:
        in_values: Eigenvalues of `A`, ascending, `[in_features]`.
        out_values: Eigenvalues of `B`, ascending, `[features]`.
        weight_norm_squared: $|W_{MAP}|^2$.
        pseudo_data_count: $\tau$.
        objective: `"reference"` or `"evidence"`.
        damping: Which posterior the evidence is of.

    Returns:
        The maximiser, a positive float.

    Raises:
        NoMaximumError: As `optimize_prior_precision`.
        ValueError: For non-positive scalars, or an unknown objective or damping.
    """
    weight_norm_squared = _checked_norm(weight_norm_squared, pseudo_data_count)
    _check_choice(objective, damping)
    alpha, beta = _without_rounding(in_values), _without_rounding(out_values)
    slope = _objective_slope(
        alpha, beta, weight_norm_squared, float(pseudo_data_count), objective, damping
    )
    # The limit is a multiple of a quarter: anything this small is the rounding of a zero.
    if slope(-_LOG_BOUND) <= 1e-12 * alpha.numel() * beta.numel():
        raise NoMaximumError(
            f"the {objective} objective has no maximum for these factors: too many of their "
            "eigenvalues are zero. Estimate the posterior from more pairs, or set the prior precision by hand"
        )
    if slope(_LOG_BOUND) >= 0.0:
        raise ValueError(
            f"weight_norm_squared={weight_norm_squared} is too small to fix a precision"
        )
    return math.exp(_falling_root(slope))


def implied_weight_norm_squared(
    A: Tensor,
    B: Tensor,
    prior_precision: float,
    pseudo_data_count: float,
    objective: Objective = "reference",
    *,
    damping: Damping = "factored",
) -> float:
    r"""The $|W_{MAP}|^2$ under which a prior precision maximises an objective.

    The objective's derivative in $\log\lambda$ is $s(\lambda) - \frac{\lambda}{2}|W|^2$, where $s$ does not depend
    on $W$.  At the maximum it is zero, so that $|W|^2 = 2 s(\lambda) / \lambda$ exactly.  This recovers the norm of
    the projection from a published prior precision, without the weights of the model.

    Args:
        A: Input factor, `[in_features, in_features]`.
        B: Output factor, `[features, features]`.
        prior_precision: $\lambda$, as it was chosen.
        pseudo_data_count: $\tau$ that it was chosen for.
        objective: The objective that it was chosen by.
        damping: The damping that it was chosen for.

    Returns:
        The squared norm, a positive float.

    Raises:
        ValueError: If no norm makes this prior precision a maximum, for damaged factors, non-positive scalars,
            or an unknown objective or damping.

    Example:
        >>> import torch
        >>> A, B = torch.eye(3, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        >>> best = optimize_prior_precision(A, B, 6.0, 1.0, "evidence")
        >>> round(implied_weight_norm_squared(A, B, best, 1.0, "evidence"), 9)
        6.0
    """
    check_positive("prior_precision", prior_precision)
    check_positive("pseudo_data_count", pseudo_data_count)
    _check_choice(objective, damping)
    alpha, beta = _spectrum(A), _spectrum(B)
    slope = _objective_slope(alpha, beta, 0.0, float(pseudo_data_count), objective, damping)
    norm = 2.0 * slope(math.log(prior_precision)) / prior_precision
    if not norm > 0.0:
        raise ValueError(
            f"a prior precision of {prior_precision:g} at a pseudo-data count of {pseudo_data_count:g} "
            f"maximises the {objective} objective for no projection: it was not chosen by it. Give the norm "
            "of the projection"
        )
    return norm


def log_objective(
    A: Tensor,
    B: Tensor,
    weight_norm_squared: float | Tensor,
    pseudo_data_count: float,
    prior_precision: float,
    objective: Objective = "reference",
    *,
    damping: Damping = "factored",
) -> float:
    """Value of the objective at one prior precision, up to constants; arguments as above.

    Returns:
        The objective in nats.

    Raises:
        ValueError: As `optimize_prior_precision`.
    """
    weight_norm_squared = _checked_norm(weight_norm_squared, pseudo_data_count)
    check_positive("prior_precision", prior_precision)
    _check_choice(objective, damping)
    alpha, beta = _spectrum(A), _spectrum(B)
    in_features, features = alpha.numel(), beta.numel()
    size = in_features * features
    prior = 0.5 * (size * math.log(prior_precision) - prior_precision * weight_norm_squared)
    if damping == "exact":
        precision = pseudo_data_count * torch.outer(beta, alpha) + prior_precision
        return prior - 0.5 * precision.log().sum().item()
    root_tau, root_lam = math.sqrt(pseudo_data_count), math.sqrt(prior_precision)
    logdet_A = (root_tau * alpha + root_lam).log().sum().item()
    logdet_B = (root_tau * beta + root_lam).log().sum().item()
    if objective == "reference":
        return prior - (in_features * logdet_A + features * logdet_B)
    return prior - 0.5 * (features * logdet_A + in_features * logdet_B)


def _spectrum(matrix: Tensor) -> Tensor:
    """Eigenvalues of a factor, exactly 0 where they are within rounding of it."""
    return _without_rounding(symmetric_eigvalsh(matrix))


def _without_rounding(values: Tensor) -> Tensor:
    return torch.where(values > _RANK_TOLERANCE * values[-1], values, 0.0)


def _objective_slope(
    alpha: Tensor,
    beta: Tensor,
    weight_norm_squared: float,
    tau: float,
    objective: Objective,
    damping: Damping,
) -> Callable[[float], float]:
    """Derivative of the objective with respect to the logarithm of the prior precision."""
    in_features, features = alpha.numel(), beta.numel()
    half_size = 0.5 * in_features * features

    if damping == "exact":
        curvature = tau * torch.outer(beta, alpha)

        def exact(log_lam: float) -> float:
            lam = math.exp(log_lam)
            shrunk = lam * (curvature + lam).reciprocal_().sum().item()
            return half_size - 0.5 * (lam * weight_norm_squared + shrunk)

        return exact

    scaled_alpha, scaled_beta = math.sqrt(tau) * alpha, math.sqrt(tau) * beta
    if objective == "reference":
        weight_A, weight_B = 0.5 * in_features, 0.5 * features
    else:
        weight_A, weight_B = 0.25 * features, 0.25 * in_features

    def factored(log_lam: float) -> float:
        lam, root_lam = math.exp(log_lam), math.exp(0.5 * log_lam)
        shrunk_A = (root_lam / (scaled_alpha + root_lam)).sum().item()
        shrunk_B = (root_lam / (scaled_beta + root_lam)).sum().item()
        penalty = weight_A * shrunk_A + weight_B * shrunk_B
        return half_size - 0.5 * lam * weight_norm_squared - penalty

    return factored


def _falling_root(slope: Callable[[float], float]) -> float:
    """Root of a falling function on the log axis, to machine precision.

    Inverse quadratic interpolation in a bracket, bisection where that is not safe (Chandrupatla 1997):
    about 15 evaluations, where bisection alone needs 60.
    """
    a, b = -_LOG_BOUND, _LOG_BOUND
    f_a, f_b = slope(a), slope(b)
    step = 0.5
    while True:
        x = a + step * (b - a)
        f_x = slope(x)
        if (f_x > 0.0) == (f_a > 0.0):
            c, f_c, a, f_a = a, f_a, x, f_x
        else:
            c, f_c, b, f_b, a, f_a = b, f_b, a, f_a, x, f_x
        best = a if abs(f_a) < abs(f_b) else b
        resolution = 4.0 * math.ulp(max(abs(best), 1.0)) / abs(b - a) if a != b else 1.0
        if resolution >= 0.5 or f_a == 0.0:
            return best
        xi, phi = (a - b) / (c - b), (f_a - f_b) / (f_c - f_b)
        step = 0.5
        if 1.0 - math.sqrt(1.0 - xi) < phi < math.sqrt(xi):
            first = f_a / (f_b - f_a) * f_c / (f_b - f_c)
            second = (c - a) / (b - a) * f_a / (f_c - f_a) * f_b / (f_c - f_b)
            step = first + second
        step = min(max(step, resolution), 1.0 - resolution)


def _checked_norm(weight_norm_squared: float | Tensor, pseudo_data_count: float) -> float:
    weight_norm_squared = _as_float(weight_norm_squared)
    check_positive("weight_norm_squared", weight_norm_squared)
    check_positive("pseudo_data_count", pseudo_data_count)
    return weight_norm_squared


def _check_choice(objective: str, damping: str) -> None:
    if objective not in ("reference", "evidence"):
        raise ValueError(f"objective must be 'reference' or 'evidence', not {objective!r}")
    if damping not in ("factored", "exact"):
        raise ValueError(f"damping must be 'factored' or 'exact', not {damping!r}")
    if objective == "reference" and damping == "exact":
        raise ValueError(
            "the reference objective is defined for factored damping only: "
            "use objective='evidence' with damping='exact'"
        )

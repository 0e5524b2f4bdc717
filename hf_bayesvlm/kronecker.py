r"""A Gaussian over one projection with Kronecker structure, in the eigenbases of its factors.

With $A = U_A \mathrm{diag}(\alpha) U_A^\top$ and $B = U_B \mathrm{diag}(\beta) U_B^\top$, both ways of adding
the prior are diagonal in $U_A \otimes U_B$, so that one representation serves both:

$$ \mathrm{Var}\big[(U_B^\top W U_A)_{jk}\big] = V_{jk} =
   \begin{cases}
     \big[(\sqrt\tau \beta_j + \sqrt\lambda)(\sqrt\tau \alpha_k + \sqrt\lambda)\big]^{-1} & \text{factored} \\
     (\tau\, \alpha_k \beta_j + \lambda)^{-1} & \text{exact}
   \end{cases} $$

with the pseudo-data count $\tau$ and the prior precision $\lambda$ (arXiv:2412.06014; Ritter et al. 2018).
The factored variances are an outer product, which makes the covariance of every embedding a scalar
times one shared matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Damping = Literal["factored", "exact"]

# Published factors are symmetric to about 1e-6 of their largest entry; beyond this they are damaged.
SYMMETRY_TOLERANCE = 1e-3
# Relative to the largest eigenvalue.  Published output factors reach -5e-4 in absolute terms.
NEGATIVE_TOLERANCE = 1e-2


@dataclass(frozen=True)
class KroneckerGaussian:
    r"""Posterior covariance of one projection $W$ (`[features, in_features]`), in eigen-coordinates.

    Exactly one of (`in_variance`, `out_variance`) and `joint_variance` is set.

    Attributes:
        in_basis: Eigenvectors of `A` in columns, `[in_features, in_features]`.
        out_basis: Eigenvectors of `B` in columns, `[features, features]`.
        in_variance: Factored damping: eigenvalues of $\tilde A^{-1}$, `[in_features]`.
        out_variance: Factored damping: eigenvalues of $\tilde B^{-1}$, `[features]`.
        joint_variance: Exact damping: `V`, `[features, in_features]`.
    """

    in_basis: Tensor
    out_basis: Tensor
    in_variance: Tensor | None = None
    out_variance: Tensor | None = None
    joint_variance: Tensor | None = None

    def __post_init__(self) -> None:
        given = [v is not None for v in (self.in_variance, self.out_variance, self.joint_variance)]
        if given not in ([True, True, False], [False, False, True]):
            raise ValueError("give either in_variance and out_variance, or joint_variance")

    @property
    def damping(self) -> Damping:
        """`"factored"` or `"exact"`."""
        return "exact" if self.joint_variance is not None else "factored"

    def to(self, *args: Any, **kwargs: Any) -> KroneckerGaussian:
        """Move or cast every tensor, as `torch.Tensor.to`."""
        moved: dict[str, Any] = {
            name: None if value is None else value.to(*args, **kwargs)
            for name, value in vars(self).items()
        }
        return KroneckerGaussian(**moved)


@dataclass(frozen=True)
class FactorSpectra:
    """Eigendecompositions of the two factors of a projection: all that its posteriors are made of.

    Computed once (`factor_spectra`), they serve every pseudo-data count, prior precision and damping.

    Attributes:
        in_values: Eigenvalues of `A`, ascending and non-negative, `[in_features]`.
        in_basis: Eigenvectors of `A` in columns, `[in_features, in_features]`.
        out_values: Eigenvalues of `B`, `[features]`.
        out_basis: Eigenvectors of `B` in columns, `[features, features]`.
    """

    in_values: Tensor
    in_basis: Tensor
    out_values: Tensor
    out_basis: Tensor


def symmetric_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at 0) and eigenvectors of a symmetric positive semi-definite matrix.

    Args:
        matrix: `[n, n]`; symmetrised first, so that rounding in its making does no harm.

    Returns:
        Eigenvalues `[n]`, ascending and non-negative, and eigenvectors `[n, n]` in columns, float64.

    Raises:
        ValueError: If the matrix is not square, not finite, or clearly not symmetric or not positive
            semi-definite.
    """
    check_factor("matrix", matrix)
    values, vectors = torch.linalg.eigh(_symmetrised(matrix))
    return _clamped(values), vectors


def symmetric_eigvalsh(matrix: Tensor) -> Tensor:
    """Eigenvalues as in `symmetric_eigh`, without the eigenvectors, `[n]`."""
    check_factor("matrix", matrix)
    return _clamped(torch.linalg.eigvalsh(_symmetrised(matrix)))


def check_factor(name: str, matrix: Tensor) -> None:
    """Refuse what cannot be a Kronecker factor.

    Args:
        name: How to call the matrix in the error.
        matrix: The matrix to check.

    Raises:
        ValueError: If it is not a square matrix, is not finite, or is not symmetric to
            `SYMMETRY_TOLERANCE` of its largest entry.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ValueError(f"{name} must be a square matrix, not of shape {tuple(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        raise ValueError(
            f"{name} contains NaN or infinity: the factors are damaged, load them again"
        )
    asymmetry = (matrix - matrix.T).abs().max()
    if asymmetry > SYMMETRY_TOLERANCE * matrix.abs().max():
        raise ValueError(
            f"{name} is not symmetric (largest difference to its transpose {asymmetry.item():.3g}): "
            "it is not a curvature factor"
        )


def posterior_covariance(
    A: Tensor,
    B: Tensor,
    *,
    pseudo_data_count: float,
    prior_precision: float,
    damping: Damping = "factored",
) -> KroneckerGaussian:
    r"""The Laplace posterior covariance of one projection.

    Costs one `eigh` of each factor in float64; exact damping stores `features * in_features` variances
    where factored damping stores `features + in_features`.

    Args:
        A: Input factor, `[in_features, in_features]`.
        B: Output factor, `[features, features]`.
        pseudo_data_count: $\tau$, how often the proxy data are counted; positive.
        prior_precision: $\lambda$; positive.
        damping: `"factored"` (the paper's) or `"exact"`.

    Returns:
        The covariance, float64.

    Raises:
        ValueError: For a damaged factor, a non-positive hyperparameter or an unknown damping.
    """
    _check_hyperparameters(pseudo_data_count, prior_precision, damping)
    return damped_covariance(
        factor_spectra(A, B),
        pseudo_data_count=pseudo_data_count,
        prior_precision=prior_precision,
        damping=damping,
    )


def factor_spectra(A: Tensor, B: Tensor) -> FactorSpectra:
    """Decompose the factors of a projection once, for many posteriors.

    Args:
        A: Input factor, `[in_features, in_features]`.
        B: Output factor, `[features, features]`.

    Returns:
        The spectra, float64.

    Raises:
        ValueError: For a damaged factor.
    """
    return FactorSpectra(*symmetric_eigh(A), *symmetric_eigh(B))


def damped_covariance(
    spectra: FactorSpectra,
    *,
    pseudo_data_count: float,
    prior_precision: float,
    damping: Damping = "factored",
) -> KroneckerGaussian:
    r"""As `posterior_covariance`, from factors that are decomposed already.

    Args:
        spectra: From `factor_spectra`.
        pseudo_data_count: $\tau$; positive.
        prior_precision: $\lambda$; positive.
        damping: `"factored"` or `"exact"`.

    Returns:
        The covariance, in the dtype of the spectra, whose bases it shares.

    Raises:
        ValueError: For a non-positive hyperparameter or an unknown damping.
    """
    _check_hyperparameters(pseudo_data_count, prior_precision, damping)
    alpha, beta = spectra.in_values, spectra.out_values
    if damping == "factored":
        root_tau, root_lam = math.sqrt(pseudo_data_count), math.sqrt(prior_precision)
        return KroneckerGaussian(
            spectra.in_basis,
            spectra.out_basis,
            in_variance=1.0 / (root_tau * alpha + root_lam),
            out_variance=1.0 / (root_tau * beta + root_lam),
        )
    precision = pseudo_data_count * torch.outer(beta, alpha) + prior_precision
    return KroneckerGaussian(spectra.in_basis, spectra.out_basis, joint_variance=1.0 / precision)


def sample_weights(
    mean: Tensor, covariance: KroneckerGaussian, num_samples: int, *, generator: torch.Generator
) -> Tensor:
    r"""Draw whole projections, $W = W_{MAP} + U_B (\sqrt V \circ Z) U_A^\top$ (matrix normal).

    Args:
        mean: MAP weights (with the bias as last column where there is one), `[features, in_features]`.
        covariance: Their posterior covariance.
        num_samples: Number of samples `S`.
        generator: Source of randomness, on the CPU: the draws do not depend on the device.

    Returns:
        `[S, features, in_features]`, in the dtype and on the device of `mean`.

    Raises:
        ValueError: If `mean` does not fit the covariance.
    """
    shape = (covariance.out_basis.shape[0], covariance.in_basis.shape[0])
    if tuple(mean.shape) != shape:
        raise ValueError(f"weights have shape {tuple(mean.shape)}, the posterior is for {shape}")
    noise = torch.randn((num_samples, *shape), generator=generator, dtype=mean.dtype).to(
        mean.device
    )
    covariance = covariance.to(mean.device, mean.dtype)
    noise = (
        covariance.out_basis @ (noise * joint_variance(covariance).sqrt()) @ covariance.in_basis.T
    )
    return mean + noise


def joint_variance(covariance: KroneckerGaussian) -> Tensor:
    """The variances `V` of all eigen-coordinates, `[features, in_features]`, for either damping."""
    if covariance.joint_variance is not None:
        return covariance.joint_variance
    assert covariance.in_variance is not None and covariance.out_variance is not None
    return torch.outer(covariance.out_variance, covariance.in_variance)


def check_positive(name: str, value: float) -> None:
    """Raise `ValueError` unless `value` is a positive finite number."""
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"{name} must be positive and finite, not {value}")


def _check_hyperparameters(pseudo_data_count: float, prior_precision: float, damping: str) -> None:
    check_positive("pseudo_data_count", pseudo_data_count)
    check_positive("prior_precision", prior_precision)
    if damping not in ("factored", "exact"):
        raise ValueError(f"damping must be 'factored' or 'exact', not {damping!r}")


def _symmetrised(matrix: Tensor) -> Tensor:
    matrix = matrix.to(torch.float64)
    return 0.5 * (matrix + matrix.T)


def _clamped(values: Tensor) -> Tensor:
    if values[0] < -NEGATIVE_TOLERANCE * values[-1].abs():
        raise ValueError(
            f"smallest eigenvalue {values[0].item():.3g} against a largest of {values[-1].item():.3g}: "
            "a curvature factor is positive semi-definite up to rounding"
        )
    return values.clamp_min(0.0)

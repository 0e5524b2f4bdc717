"""Posterior of one of the two projections."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from .kronecker import Damping, check_factor, check_positive
from .laplace import Objective, optimize_prior_precision
from .posterior_files import PosteriorError


@dataclass(frozen=True, eq=False)
class ModalityPosterior:
    """Posterior of one projection.

    Attributes:
        A: Input factor, `[in_features (+1 with a bias), in_features (+1)]`, float32.
        B: Output factor, `[features, features]`, float32.
        pseudo_data_count: How often the proxy data are counted (tau).
        prior_precision: Precision of the Gaussian prior on the weights (lambda).
        weight_norm_squared: Sum of squares of the base's projection (and bias), if known; needed to
            choose the prior precision again.
    """

    A: Tensor = field(repr=False)
    B: Tensor = field(repr=False)
    pseudo_data_count: float
    prior_precision: float
    weight_norm_squared: float | None = None

    def __post_init__(self) -> None:
        for name in ("pseudo_data_count", "prior_precision"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise PosteriorError(f"{name} must be a number, not {value!r}")
            object.__setattr__(self, name, float(value))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the projection, `(features, in_features (+1))`."""
        return self.B.shape[0], self.A.shape[0]

    def check(self, name: str) -> None:
        """Refuse what cannot be a posterior.

        Args:
            name: How to call it in the error, `"image"` or `"text"`.

        Raises:
            PosteriorError: If a factor is damaged or a hyperparameter is not positive.
        """
        try:
            for letter in ("A", "B"):
                check_factor(f"{name}.{letter}", getattr(self, letter))
            check_positive(f"{name}.pseudo_data_count", self.pseudo_data_count)
            check_positive(f"{name}.prior_precision", self.prior_precision)
        except ValueError as error:
            raise PosteriorError(str(error)) from error

    def with_best_precision(
        self, name: str, objective: Objective, damping: Damping
    ) -> ModalityPosterior:
        """The same factors with the prior precision that maximises an objective.

        Args:
            name: How to call it in errors.
            objective: `"reference"` or `"evidence"`.
            damping: Which posterior the evidence is of.

        Returns:
            A new object.

        Raises:
            PosteriorError: If the norm of the base's projection is not known, or there is no maximum.
        """
        if self.weight_norm_squared is None:
            raise PosteriorError(
                f"{name}: the norm of the base's projection is not known, which the objective needs. "
                "Set the posterior on its model first and use model.posterior, or give the prior precision"
            )
        try:
            precision = optimize_prior_precision(
                self.A,
                self.B,
                self.weight_norm_squared,
                self.pseudo_data_count,
                objective,
                damping=damping,
            )
        except ValueError as error:
            raise PosteriorError(f"{name}: {error}") from error
        return replace(self, prior_precision=precision)

r"""Gauss-Newton curvature of the contrastive losses with respect to an unnormalised embedding.

For a source embedding $x$ with $\hat x = x / |x|$ and $J = (I - \hat x \hat x^\top) / |x|$, and the
normalised embeddings $Y$ of the other side held at their MAP, the generalised Gauss-Newton (GGN)
matrix of one row is (arXiv:2412.06014, section 4; arXiv:2104.04975 for the Kronecker sums)

$$ H = s^2 J M J, \qquad
   M = \begin{cases}
     \sum_j p_j (y_j - m)(y_j - m)^\top & \text{InfoNCE},\ p = \mathrm{softmax}(s\,Y \hat x),\ m = Y^\top p \\
     \sum_j w_j\, y_j y_j^\top & \text{sigmoid},\ w_j = \sigma(z_j)\,\sigma(-z_j),\ z = s\,Y \hat x + b
   \end{cases} $$

The sum over rows never builds a `[batch, features, features]` tensor.  Expanding the two projections
gives $J M J = |x|^{-2} (M - \hat x u^\top - u \hat x^\top + q\, \hat x \hat x^\top)$ with
$u = M \hat x$ and $q = \hat x^\top M \hat x$, so that three products with $Y$ per chunk of rows
and two weighted Gram matrices do the whole work: $O(C D)$ a row, memory $O(\text{chunk} \times C + D^2)$.

The covariance $M$ of a confident softmax is tiny while its textbook terms
$Y^\top \mathrm{diag}(p) Y$ and $m m^\top$ are not.  Every row is therefore centred on its most probable
candidate, for which all terms are of the order of the probability of the *other* candidates, after the
mean of all candidates was taken off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Likelihood = Literal["softmax", "sigmoid"]

# Elements of one [chunk, candidates] block: 8 M float32 values (32 MB) keep the GEMMs at full speed
# while the few temporaries of that shape stay below the size of a block's embeddings.
_CHUNK_ELEMENTS = 2**23


def info_nce_ggn(
    source: Tensor,
    target: Tensor,
    logit_scale: float | Tensor,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Sum over rows of the GGN of the InfoNCE loss with respect to each source embedding.

    Args:
        source: Unnormalised embeddings, `[batch, features]`.
        target: Embeddings of the other modality, `[candidates, features]`; normalised here.
        logit_scale: The multiplicative scale `s` (CLIP's `logit_scale.exp()`), positive.
        chunk_size: Rows handled at once; by default about 8 million logits.

    Returns:
        Symmetric positive semi-definite matrix `[features, features]`, in the dtype of `source`
        (at least float32).  Chunks are summed in float64.

    Raises:
        ValueError: If shapes disagree, an embedding is zero or not finite, or the scale is not positive.
    """
    total = _ggn_sum("softmax", source, target, _as_float(logit_scale), 0.0, chunk_size)
    return total.to(_compute_dtype(source))


def sigmoid_ggn(
    source: Tensor,
    target: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Sum over rows of the GGN of the pairwise sigmoid loss with respect to each source embedding.

    The curvature is even in the logit, so the +1/-1 pair labels do not matter.

    Args:
        source: Unnormalised embeddings, `[batch, features]`.
        target: Embeddings of the other modality, `[candidates, features]`; normalised here.
        logit_scale: The multiplicative scale `s` (SigLIP's `logit_scale.exp()`), positive.
        logit_bias: The additive bias `b`.
        chunk_size: Rows handled at once; by default about 8 million logits.

    Returns:
        Symmetric positive semi-definite matrix `[features, features]`, in the dtype of `source`
        (at least float32).  Chunks are summed in float64.

    Raises:
        ValueError: If shapes disagree, an embedding is zero or not finite, or the scale is not positive.
    """
    total = _ggn_sum(
        "sigmoid", source, target, _as_float(logit_scale), _as_float(logit_bias), chunk_size
    )
    return total.to(_compute_dtype(source))


@dataclass(frozen=True)
class KroneckerFactors:
    r"""The Kronecker factors of one projection, $A = \frac{1}{\sqrt n}\sum \phi\phi^\top$ and
    $B = \frac{1}{\sqrt n} \sum H$.

    Attributes:
        A: Input factor, `[in_features (+1 with a bias), in_features (+1)]`, float64.
        B: Output factor, `[features, features]`, float64.
        num_pairs: Number of pairs counted by both, `n`.
    """

    A: Tensor
    B: Tensor
    num_pairs: int


class CurvatureAccumulator:
    """Streams blocks of image-text pairs into the Kronecker factors of one projection.

    Memory does not grow with the number of pairs: each block is folded into two float64 sums and
    dropped.  `A`, `B` and the count always cover the same rows.

    Args:
        likelihood: `"softmax"` (InfoNCE, CLIP) or `"sigmoid"` (SigLIP).
        logit_scale: Multiplicative logit scale `s`.
        logit_bias: Additive logit bias `b`; must be 0 for the softmax likelihood.
        chunk_size: Rows handled at once inside a block.

    Example:
        >>> import torch
        >>> accumulator = CurvatureAccumulator("softmax", logit_scale=10.0)
        >>> generator = torch.Generator().manual_seed(0)
        >>> features, source, target = (torch.randn(8, d, generator=generator) for d in (5, 3, 3))
        >>> accumulator.update(features, source, target)
        >>> factors = accumulator.factors()
        >>> tuple(factors.A.shape), tuple(factors.B.shape), factors.num_pairs
        ((5, 5), (3, 3), 8)
    """

    def __init__(
        self,
        likelihood: Likelihood,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor = 0.0,
        *,
        chunk_size: int | None = None,
    ) -> None:
        if likelihood not in ("softmax", "sigmoid"):
            raise ValueError(f"likelihood must be 'softmax' or 'sigmoid', not {likelihood!r}")
        self.likelihood: Likelihood = likelihood
        self.logit_scale = _as_float(logit_scale)
        self.logit_bias = _as_float(logit_bias)
        if likelihood == "softmax" and self.logit_bias != 0.0:
            raise ValueError("a softmax is blind to a logit bias: pass logit_bias=0 for InfoNCE")
        _check_scalars(self.logit_scale, self.logit_bias, chunk_size)
        self.chunk_size = chunk_size
        self._sum_A: Tensor | None = None
        self._sum_B: Tensor | None = None
        self._num_pairs = 0

    @property
    def num_pairs(self) -> int:
        """Number of pairs folded in so far."""
        return self._num_pairs

    @torch.no_grad()
    def update(self, features: Tensor, source: Tensor, target: Tensor) -> None:
        """Fold one block of pairs into the sums.

        Args:
            features: Inputs of the projection, `[batch, in_features (+1)]`.
            source: Unnormalised embeddings of the same rows, `[batch, features]`.
            target: The other modality's embeddings, the candidates of this block,
                `[candidates, features]`.

        Raises:
            ValueError: If the block is inconsistent with itself or with earlier blocks; the sums
                are then unchanged.
        """
        if features.ndim != 2 or source.ndim != 2 or features.shape[0] != source.shape[0]:
            raise ValueError(
                f"features {tuple(features.shape)} and source {tuple(source.shape)} must be matrices "
                "with one row for each pair"
            )
        if not torch.isfinite(features).all():
            raise ValueError("features contain NaN or infinity")
        block_B = _ggn_sum(
            self.likelihood, source, target, self.logit_scale, self.logit_bias, self.chunk_size
        )
        block_A = features.T.to(torch.float64) @ features.to(torch.float64)
        self._add(block_A, block_B, features.shape[0])

    def sums(self) -> tuple[Tensor, Tensor] | None:
        """The sums over all pairs so far, `[in_features (+1)] * 2` and `[features] * 2` in float64, or None.

        They are the accumulator's own tensors, for saving them or adding those of other processes.
        """
        if self._sum_A is None or self._sum_B is None:
            return None
        return self._sum_A, self._sum_B

    def add_sums(self, sum_A: Tensor, sum_B: Tensor, num_pairs: int) -> None:
        """Add the sums of other pairs: of another process, or of a run that is resumed.

        Args:
            sum_A: Sum of the inputs' outer products, `[in_features (+1), in_features (+1)]`, float64.
            sum_B: Sum of the pairs' curvatures, `[features, features]`, float64.
            num_pairs: Number of pairs in both.

        Raises:
            ValueError: If they are not float64 or do not fit; the sums are then unchanged.
        """
        if sum_A.dtype != torch.float64 or sum_B.dtype != torch.float64:
            raise ValueError(f"sums must be float64, not {sum_A.dtype} and {sum_B.dtype}")
        self._add(sum_A.clone(), sum_B.clone(), num_pairs)

    def _add(self, block_A: Tensor, block_B: Tensor, num_pairs: int) -> None:
        if self._sum_A is None or self._sum_B is None:
            self._sum_A, self._sum_B = block_A, block_B
        elif self._sum_A.shape != block_A.shape or self._sum_B.shape != block_B.shape:
            raise ValueError(
                f"block has factors {tuple(block_A.shape)} and {tuple(block_B.shape)}, earlier blocks "
                f"{tuple(self._sum_A.shape)} and {tuple(self._sum_B.shape)}"
            )
        else:
            self._sum_A += block_A.to(self._sum_A.device)
            self._sum_B += block_B.to(self._sum_B.device)
        self._num_pairs += num_pairs

    def factors(self) -> KroneckerFactors:
        r"""The factors of all pairs so far, each sum divided by $\sqrt n$.

        Returns:
            A snapshot: later updates do not change it.

        Raises:
            ValueError: If no pair was folded in yet.
        """
        if self._sum_A is None or self._sum_B is None or self._num_pairs == 0:
            raise ValueError("no pairs yet: call update() with at least one block")
        root_n = math.sqrt(self._num_pairs)
        return KroneckerFactors(self._sum_A / root_n, self._sum_B / root_n, self._num_pairs)


@torch.no_grad()
def _ggn_sum(
    likelihood: Likelihood,
    source: Tensor,
    target: Tensor,
    logit_scale: float,
    logit_bias: float,
    chunk_size: int | None,
) -> Tensor:
    """Sum of the rows' GGNs in float64, `[features, features]`; an autocast around it does not count."""
    with torch.autocast(source.device.type, enabled=False):
        return _ggn_sum_in_full(likelihood, source, target, logit_scale, logit_bias, chunk_size)


def _ggn_sum_in_full(
    likelihood: Likelihood,
    source: Tensor,
    target: Tensor,
    logit_scale: float,
    logit_bias: float,
    chunk_size: int | None,
) -> Tensor:
    _check_scalars(logit_scale, logit_bias, chunk_size)
    _check_embeddings(source, target)
    dtype = _compute_dtype(source)
    targets = torch.nn.functional.normalize(target.to(dtype), dim=1, eps=0.0)
    if likelihood == "softmax":
        # A covariance does not see a shift of all candidates, and their common part (large for CLIP,
        # whose texts lie in a cone) would only be cancelled.
        targets -= targets.mean(dim=0)
    num_rows, num_features = source.shape
    if chunk_size is None:
        chunk_size = max(16, _CHUNK_ELEMENTS // targets.shape[0])

    candidate_weights = targets.new_zeros(targets.shape[0], dtype=torch.float64)
    rest = targets.new_zeros(num_features, num_features, dtype=torch.float64)
    chunk_terms = _softmax_terms if likelihood == "softmax" else _sigmoid_terms
    for start in range(0, num_rows, chunk_size):
        rows = source[start : start + chunk_size].to(dtype)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        directions = rows / norms
        weights = (logit_scale / norms) ** 2
        diagonal, gram, u, q = chunk_terms(directions, targets, weights, logit_scale, logit_bias)
        candidate_weights += diagonal
        # -xhat u' - u xhat' + q xhat xhat' is symmetric: one product serves both halves.
        half = _float64_product(directions, weights * (0.5 * q * directions - u))
        rest += half + half.T
        if gram is not None:
            rest += gram
    scaled = targets.to(torch.float64) * candidate_weights.sqrt()[:, None]
    total = scaled.T @ scaled + rest
    if not torch.isfinite(total).all():
        raise ValueError(
            f"the curvature overflows {dtype}: the source embeddings are too short for it, use float64"
        )
    return 0.5 * (total + total.T)


def _softmax_terms(
    directions: Tensor, targets: Tensor, weights: Tensor, scale: float, bias: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    r"""InfoNCE terms of one chunk, with every row centred on its most probable candidate $y_t$.

    With $p$ the probabilities of the candidates other than $t$ and $\delta = \sum p_j (y_j - y_t)$,
    $M = \sum_j p_j (y_j - y_t)(y_j - y_t)^\top - \delta\delta^\top$.

    Args:
        directions: Normalised rows, `[chunk, features]`.
        targets: Normalised candidates, `[candidates, features]`.
        weights: Row weights `(s / |x|)^2`, `[chunk, 1]`.
        scale: Logit scale.
        bias: Ignored: a softmax does not see it.

    Returns:
        The diagonal weights of the candidates (`[candidates]`, float64), the remaining weighted sum
        of `M` (`[features, features]`), `u` (`[chunk, features]`) and `q` (`[chunk, 1]`).
    """
    cosines = directions @ targets.T
    top_cosine, top = cosines.max(dim=1, keepdim=True)
    cosines -= top_cosine
    others = torch.exp(scale * cosines)
    others.scatter_(1, top, 0.0)
    other_sum = others.sum(dim=1, keepdim=True)
    others /= 1.0 + other_sum
    # 1 - p_top, exact where p_top rounds to 1.
    other_mass = other_sum / (1.0 + other_sum)

    top_targets = targets[top[:, 0]]
    pulled = others @ targets
    delta = pulled - other_mass * top_targets
    diagonal = (weights.T @ others)[0].to(torch.float64)
    diagonal.index_add_(0, top[:, 0], (weights * other_mass)[:, 0].to(torch.float64))
    cross = _float64_product(weights * pulled, top_targets)
    gram = -(cross + cross.T) - _float64_product(delta, weights * delta)

    others *= cosines
    shift = others.sum(dim=1, keepdim=True)
    u = others @ targets - shift * (top_targets + delta)
    others *= cosines
    q = others.sum(dim=1, keepdim=True) - shift**2
    return diagonal, gram, u, q


def _float64_product(left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right` summed over the rows in float64, so that the sum does not depend on how rows are split.

    These products are `[features, features]`: beside those with the candidates their cost vanishes.
    """
    return left.T.to(torch.float64) @ right.to(torch.float64)


def _sigmoid_terms(
    directions: Tensor, targets: Tensor, weights: Tensor, scale: float, bias: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Sigmoid terms of one chunk; shapes as in `_softmax_terms`, with no extra sum of `M`."""
    cosines = directions @ targets.T
    logits = scale * cosines + bias
    pair_weights = torch.sigmoid(logits) * torch.sigmoid(-logits)
    diagonal = (weights.T @ pair_weights)[0].to(torch.float64)
    pair_weights *= cosines
    u = pair_weights @ targets
    pair_weights *= cosines
    return diagonal, None, u, pair_weights.sum(dim=1, keepdim=True)


def _check_scalars(scale: float, bias: float, chunk_size: int | None) -> None:
    if not (math.isfinite(scale) and scale > 0.0 and math.isfinite(bias)):
        raise ValueError(
            f"logit_scale must be positive and finite (the exponentiated scale), not {scale}; "
            f"logit_bias must be finite, not {bias}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")


def _check_embeddings(source: Tensor, target: Tensor) -> None:
    if source.ndim != 2 or target.ndim != 2 or source.shape[1] != target.shape[1]:
        raise ValueError(
            "source and target must be [batch, features] and [candidates, features], not "
            f"{tuple(source.shape)} and {tuple(target.shape)}"
        )
    if source.shape[0] == 0 or target.shape[0] == 0:
        raise ValueError("source and target need at least one row each")
    for name, rows in (("source", source), ("target", target)):
        norms = torch.linalg.vector_norm(rows.to(_compute_dtype(rows)), dim=1)
        if not bool((torch.isfinite(norms) & (norms > 0)).all()):
            raise ValueError(
                f"{name} has a zero or non-finite embedding: a cosine similarity is not defined for it"
            )


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _as_float(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)

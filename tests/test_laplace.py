"""The prior precision against dense determinants, brute-force search and published values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_bayesvlm.kronecker import symmetric_eigvalsh
from hf_bayesvlm.laplace import (
    best_prior_precision,
    implied_weight_norm_squared,
    log_objective,
    optimize_prior_precision,
)

VARIANTS = [("reference", "factored"), ("evidence", "factored"), ("evidence", "exact")]
all_variants = pytest.mark.parametrize(("objective", "damping"), VARIANTS)
K, D = 6, 4


def psd(generator: torch.Generator, size: int, rank: int | None = None) -> Tensor:
    root = torch.randn(rank or 2 * size, size, generator=generator, dtype=torch.float64)
    return root.T @ root


def dense_objective(
    A: Tensor, B: Tensor, norm: float, tau: float, lam: float, objective: str, damping: str
) -> float:
    """The objectives as DESIGN.md has them, by determinants of dense matrices."""
    in_features, features = len(A), len(B)
    eye_A, eye_B = (torch.eye(len(M), dtype=torch.float64) for M in (A, B))
    tilde_A = math.sqrt(tau) * A + math.sqrt(lam) * eye_A
    tilde_B = math.sqrt(tau) * B + math.sqrt(lam) * eye_B
    value = -0.5 * lam * norm + 0.5 * in_features * features * math.log(lam)
    if objective == "reference":
        logdet_A, logdet_B = tilde_A.logdet().item(), tilde_B.logdet().item()
        return value - (in_features * logdet_A + features * logdet_B)
    if damping == "factored":
        return value - 0.5 * torch.kron(tilde_A, tilde_B).logdet().item()
    precision = tau * torch.kron(A, B) + lam * torch.eye(in_features * features).double()
    return value - 0.5 * precision.logdet().item()


def golden_section(function, low: float, high: float) -> float:
    """Maximiser of a unimodal function, by comparisons of values only."""
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    value_left, value_right = function(left), function(right)
    for _ in range(60):
        if value_left > value_right:
            high, right, value_right = right, left, value_left
            left = high - ratio * (high - low)
            value_left = function(left)
        else:
            low, left, value_left = left, right, value_right
            right = low + ratio * (high - low)
            value_right = function(right)
    return 0.5 * (low + high)


@all_variants
@pytest.mark.parametrize(("tau", "lam"), [(1.0, 1.0), (10.0, 0.01), (0.3, 500.0)])
def test_objective_agrees_with_dense_determinants(tau, lam, objective, damping, generator):
    A, B = psd(generator, K), psd(generator, D)
    expected = dense_objective(A, B, 7.0, tau, lam, objective, damping)
    actual = log_objective(A, B, 7.0, tau, lam, objective, damping=damping)
    assert actual == pytest.approx(expected, rel=1e-11, abs=1e-11)


def test_the_three_objectives_differ(generator):
    A, B = psd(generator, K), psd(generator, D)
    values = [log_objective(A, B, 7.0, 1.0, 2.0, o, damping=d) for o, d in VARIANTS]
    assert min(abs(values[i] - values[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1.0


@all_variants
@pytest.mark.parametrize("tau", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("rank", [None, 3])
def test_optimum_agrees_with_golden_section_on_dense_determinants(
    rank, tau, objective, damping, generator
):
    A, B = psd(generator, K), psd(generator, D, rank)
    best = optimize_prior_precision(A, B, 5.0, tau, objective, damping=damping)

    def dense(log_lam: float) -> float:
        return dense_objective(A, B, 5.0, tau, math.exp(log_lam), objective, damping)

    # Values near a maximum are flat to rounding over about sqrt(eps).
    assert math.log(best) == pytest.approx(golden_section(dense, -25.0, 15.0), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    lost=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    size_of_A=st.floats(-6, 6),
    size_of_B=st.floats(-6, 6),
    norm=st.floats(0.01, 1000.0),
    tau=st.floats(0.01, 100.0),
    variant=st.sampled_from(VARIANTS),
)
def test_optimum_beats_a_grid(seed, sizes, lost, size_of_A, size_of_B, norm, tau, variant):
    generator = torch.Generator().manual_seed(seed)
    objective, damping = variant
    ranks = [max(size - gone, 0) for size, gone in zip(sizes, lost, strict=True)]
    A, B = (
        math.exp(log_size) * psd(generator, size, rank)
        if rank
        else torch.zeros(size, size).double()
        for log_size, size, rank in zip((size_of_A, size_of_B), sizes, ranks, strict=True)
    )
    in_features, features = sizes
    # Half the number of weights against what an exactly zero prior precision leaves of the penalty.
    zeros_A, zeros_B = in_features - ranks[0], features - ranks[1]
    if objective == "reference":
        limit = in_features * features - in_features * zeros_A - features * zeros_B
    elif damping == "factored":
        limit = 2 * in_features * features - features * zeros_A - in_features * zeros_B
    else:
        limit = ranks[0] * ranks[1]
    if limit <= 0:
        with pytest.raises(ValueError, match="has no maximum"):
            optimize_prior_precision(A, B, norm, tau, objective, damping=damping)
        return
    best = optimize_prior_precision(A, B, norm, tau, objective, damping=damping)
    top = log_objective(A, B, norm, tau, best, objective, damping=damping)
    slack = 1e-10 * (1.0 + abs(top))
    for offset in (-20.0, -3.0, -0.5, -0.01, 0.01, 0.5, 3.0):
        other = best * math.exp(offset)
        assert log_objective(A, B, norm, tau, other, objective, damping=damping) <= top + slack


@all_variants
def test_objective_is_concave_in_the_logarithm(objective, damping, generator):
    A, B = psd(generator, K), psd(generator, D, 2)
    grid = torch.linspace(-15.0, 6.0, 85, dtype=torch.float64)
    values = torch.tensor(
        [log_objective(A, B, 3.0, 2.0, math.exp(x), objective, damping=damping) for x in grid],
        dtype=torch.float64,
    )
    assert (values.diff().diff() <= 1e-9 * values.abs()[1:-1]).all()


@all_variants
def test_autograd_of_the_dense_objective_vanishes_at_the_optimum(objective, damping, generator):
    A, B = psd(generator, K), psd(generator, D)
    best = optimize_prior_precision(A, B, 5.0, 2.0, objective, damping=damping)
    log_lam = torch.tensor(math.log(best), dtype=torch.float64, requires_grad=True)
    lam = log_lam.exp()
    eye_A, eye_B = torch.eye(K, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
    tilde_A = math.sqrt(2.0) * A + lam.sqrt() * eye_A
    tilde_B = math.sqrt(2.0) * B + lam.sqrt() * eye_B
    if damping == "exact":
        full = 2.0 * torch.kron(A, B) + lam * torch.eye(K * D, dtype=torch.float64)
        penalty = 0.5 * full.logdet()
    elif objective == "evidence":
        penalty = 0.5 * torch.kron(tilde_A, tilde_B).logdet()
    else:
        penalty = K * tilde_A.logdet() + D * tilde_B.logdet()
    (-0.5 * lam * 5.0 + 0.5 * K * D * log_lam - penalty).backward()
    assert abs(log_lam.grad.item()) < 1e-9 * K * D


def test_optimum_by_hand():
    # A = B = identity, one weight, exact: 1/2 - lam w / 2 - lam / (2 (tau + lam)) = 0 is quadratic.
    one = torch.ones(1, 1, dtype=torch.float64)
    norm, tau = 0.37, 2.9
    by_hand = 0.5 * (-tau + math.sqrt(tau**2 + 4.0 * tau / norm))
    best = optimize_prior_precision(one, one, norm, tau, "evidence", damping="exact")
    assert best == pytest.approx(by_hand, rel=1e-14)


@all_variants
def test_large_weights_want_a_small_precision(objective, damping, generator):
    A, B = psd(generator, K), psd(generator, D)
    precisions = [
        optimize_prior_precision(A, B, norm, 1.0, objective, damping=damping)
        for norm in (0.5, 5.0, 50.0)
    ]
    assert precisions[0] > precisions[1] > precisions[2]


def test_arguments_may_be_tensors_and_float32(generator):
    A, B = psd(generator, K), psd(generator, D)
    expected = optimize_prior_precision(A, B, 5.0, 2.0)
    norm = torch.nn.Parameter(torch.tensor(5.0))
    assert optimize_prior_precision(A, B, norm, 2.0) == expected
    assert optimize_prior_precision(A.float(), B.float(), 5.0, 2.0) == pytest.approx(
        expected, rel=1e-5
    )


@all_variants
def test_no_curvature_has_no_maximum(objective, damping):
    with pytest.raises(ValueError, match="has no maximum"):
        optimize_prior_precision(
            torch.zeros(K, K), torch.zeros(D, D), 1.0, 1.0, objective, damping=damping
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("rank", [5, 15, 20, 25, 28])
def test_rounding_of_a_deficient_factor_is_not_curvature(rank, size, dtype, generator):
    # The reference objective needs more than K - D = 28 of 40 directions.  Rounding fills the others
    # with eigenvalues of 1e-7 of the largest: counted, they gave a "maximum" near 1e-12.
    A, B = size * psd(generator, 40, rank), size * psd(generator, 12)
    with pytest.raises(ValueError, match="has no maximum"):
        optimize_prior_precision(A.to(dtype), B.to(dtype), 10.0, 1.0)


def test_enough_directions_have_a_maximum(generator):
    A, B = psd(generator, 40, 30), psd(generator, 12)
    double = optimize_prior_precision(A, B, 10.0, 1.0)
    assert 1e-3 < double < 1e3
    assert optimize_prior_precision(A.float(), B.float(), 10.0, 1.0) == pytest.approx(
        double, rel=1e-5
    )


def test_vanishing_weights_have_no_maximum():
    eye = torch.eye(3)
    with pytest.raises(ValueError, match="too small"):
        optimize_prior_precision(eye, eye, 1e-60, 1.0, "evidence")


EYE = torch.eye(2)
BAD_FACTORS = [
    (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
    (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), "NaN or infinity"),
    (torch.ones(2, 3), "square matrix"),
    (-torch.eye(2), "positive semi-definite"),
]


@pytest.mark.parametrize(("factor", "message"), BAD_FACTORS)
def test_damaged_factors_are_refused(factor, message):
    for pair in ((factor, EYE), (EYE, factor)):
        with pytest.raises(ValueError, match=message):
            optimize_prior_precision(*pair, 1.0, 1.0)
        with pytest.raises(ValueError, match=message):
            log_objective(*pair, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["weight_norm_squared", "pseudo_data_count"])
def test_scalars_must_be_positive(name, value):
    scalars = {"weight_norm_squared": 1.0, "pseudo_data_count": 1.0, name: value}
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        optimize_prior_precision(EYE, EYE, **scalars)
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        log_objective(EYE, EYE, **scalars, prior_precision=1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_the_prior_precision_must_be_positive(value):
    with pytest.raises(ValueError, match="prior_precision must be positive"):
        log_objective(EYE, EYE, 1.0, 1.0, value)


@pytest.mark.parametrize(
    ("objective", "damping", "message"),
    [
        ("map", "factored", "objective must be"),
        ("evidence", "none", "damping must be"),
        ("reference", "exact", "factored damping only"),
    ],
)
def test_unknown_choices_are_refused(objective, damping, message):
    with pytest.raises(ValueError, match=message):
        optimize_prior_precision(EYE, EYE, 1.0, 1.0, objective, damping=damping)
    with pytest.raises(ValueError, match=message):
        log_objective(EYE, EYE, 1.0, 1.0, 1.0, objective, damping=damping)


# |W|^2 of the published model's projections, and the values published with them.
IMAGE_NORM, TEXT_NORM = 63.658, 42.14


def published_factors(directory: Path, modality: str) -> list[Tensor]:
    return [
        torch.load(
            directory / f"{factor}_{modality}_analytic.pt", map_location="cpu", weights_only=True
        )
        for factor in "AB"
    ]


@pytest.mark.parametrize(
    ("modality", "norm", "tau", "published", "tolerance"),
    [
        ("img", IMAGE_NORM, 1.0, 1708.9451904296875, 2e-5),
        # Published with five digits: half a unit of the last is 1.7e-5.
        ("img", IMAGE_NORM, 10.0, 2997.9, 2e-5 + 0.05 / 2997.9),
        ("txt", TEXT_NORM, 1.0, 1255.334228515625, 5e-4),
        ("txt", TEXT_NORM, 10.0, 2538.1, 5e-4),
    ],
)
def test_published_prior_precisions_come_out(
    modality, norm, tau, published, tolerance, reference_dir
):
    A, B = published_factors(reference_dir, modality)
    best = optimize_prior_precision(A, B, norm, tau)
    assert best == pytest.approx(published, rel=tolerance)
    # The evidence is another objective: it must not pass for the published one.
    evidence = optimize_prior_precision(A, B, norm, tau, "evidence")
    assert abs(evidence / published - 1.0) > 0.01


@pytest.mark.parametrize(("modality", "norm"), [("img", IMAGE_NORM), ("txt", TEXT_NORM)])
def test_the_published_precision_implies_the_norm_of_the_projection(modality, norm, reference_dir):
    A, B = published_factors(reference_dir, modality)
    scalars = json.loads((reference_dir / "prior_precision_analytic.json").read_text())
    published, tau = scalars[f"lambda_{modality}"], scalars[f"n_{modality}"]
    implied = implied_weight_norm_squared(A, B, published, tau)
    assert implied == pytest.approx(norm, rel=1e-4)
    assert optimize_prior_precision(A, B, implied, tau) == pytest.approx(published, rel=1e-9)


# ---------------------------------------------------------------------------- the norm implied


@all_variants
@given(
    seed=st.integers(0, 1000),
    norm=st.floats(0.05, 500.0),
    tau=st.sampled_from([0.1, 1.0, 10.0, 1000.0]),
)
@settings(max_examples=25, deadline=None)
def test_the_implied_norm_inverts_the_choice(objective, damping, seed, norm, tau):
    generator = torch.Generator().manual_seed(seed)
    A, B = psd(generator, K), psd(generator, D)
    best = optimize_prior_precision(A, B, norm, tau, objective, damping=damping)
    implied = implied_weight_norm_squared(A, B, best, tau, objective, damping=damping)
    assert implied == pytest.approx(norm, rel=1e-9)


def test_a_precision_that_no_norm_explains(generator):
    # Beyond its balance with the curvature the reference objective only falls, whatever the norm.
    A, B = psd(generator, K, rank=1), psd(generator, D, rank=1)
    with pytest.raises(ValueError, match="maximises the reference objective for no projection"):
        implied_weight_norm_squared(A, B, 1.0, 1.0)
    with pytest.raises(ValueError, match="prior_precision must be positive"):
        implied_weight_norm_squared(A, B, 0.0, 1.0)


@all_variants
def test_eigenvalues_are_all_that_the_choice_needs(objective, damping, generator):
    A, B = psd(generator, K), psd(generator, D)
    known = best_prior_precision(
        symmetric_eigvalsh(A), symmetric_eigvalsh(B), 7.0, 3.0, objective, damping=damping
    )
    assert known == optimize_prior_precision(A, B, 7.0, 3.0, objective, damping=damping)

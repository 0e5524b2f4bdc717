"""The Kronecker posterior against dense matrices over vec(W), columns stacked."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_bayesvlm.kronecker import (
    KroneckerGaussian,
    check_factor,
    damped_covariance,
    factor_spectra,
    joint_variance,
    posterior_covariance,
    sample_weights,
    symmetric_eigh,
    symmetric_eigvalsh,
)

K, D = 5, 3
both_dampings = pytest.mark.parametrize("damping", ["factored", "exact"])


def psd(generator: torch.Generator, size: int, rank: int | None = None) -> Tensor:
    root = torch.randn(rank or size, size, generator=generator, dtype=torch.float64)
    return root.T @ root


def dense_precision(A: Tensor, B: Tensor, tau: float, lam: float, damping: str) -> Tensor:
    """Precision of vec(W), W of shape [D, K]: with stacked columns, A belongs on the left."""
    eye_A, eye_B = (torch.eye(len(M), dtype=torch.float64) for M in (A, B))
    if damping == "exact":
        return tau * torch.kron(A, B) + lam * torch.eye(len(A) * len(B), dtype=torch.float64)
    root_tau, root_lam = math.sqrt(tau), math.sqrt(lam)
    return torch.kron(root_tau * A + root_lam * eye_A, root_tau * B + root_lam * eye_B)


def dense_covariance(covariance: KroneckerGaussian) -> Tensor:
    """Covariance of vec(W) that the eigen-coordinates stand for."""
    basis = torch.kron(covariance.in_basis, covariance.out_basis)
    return basis @ torch.diag(joint_variance(covariance).T.flatten()) @ basis.T


@both_dampings
@pytest.mark.parametrize(("tau", "lam"), [(1.0, 1.0), (10.0, 0.03), (0.2, 1700.0)])
@pytest.mark.parametrize("rank", [None, 1])
def test_is_the_inverse_of_the_dense_precision(rank, tau, lam, damping, generator):
    A, B = psd(generator, K, rank), psd(generator, D, rank)
    covariance = posterior_covariance(
        A, B, pseudo_data_count=tau, prior_precision=lam, damping=damping
    )
    assert covariance.damping == damping
    expected = torch.linalg.inv(dense_precision(A, B, tau, lam, damping))
    torch.testing.assert_close(dense_covariance(covariance), expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    log_tau=st.floats(-3, 3),
    log_lam=st.floats(-3, 3),
    damping=st.sampled_from(["factored", "exact"]),
)
def test_times_the_dense_precision_is_the_identity(seed, sizes, ranks, log_tau, log_lam, damping):
    generator = torch.Generator().manual_seed(seed)
    A, B = psd(generator, sizes[0], ranks[0]), psd(generator, sizes[1], ranks[1])
    tau, lam = math.exp(log_tau), math.exp(log_lam)
    covariance = posterior_covariance(
        A, B, pseudo_data_count=tau, prior_precision=lam, damping=damping
    )
    dense = dense_covariance(covariance)
    product = dense @ dense_precision(A, B, tau, lam, damping)
    identity = torch.eye(len(product), dtype=torch.float64)
    torch.testing.assert_close(product, identity, rtol=0, atol=1e-9)
    # A prior is a bound: data never make the posterior wider than 1 / lam in any direction.
    assert torch.linalg.eigvalsh(dense)[-1].item() <= 1.0 / lam * (1 + 1e-9)


@both_dampings
def test_covariance_of_an_embedding(damping, generator):
    A, B = psd(generator, K), psd(generator, D)
    phi = torch.randn(K, generator=generator, dtype=torch.float64)
    covariance = posterior_covariance(
        A, B, pseudo_data_count=2.0, prior_precision=0.5, damping=damping
    )
    sigma = torch.linalg.inv(dense_precision(A, B, 2.0, 0.5, damping))
    lift = torch.kron(phi[:, None], torch.eye(D, dtype=torch.float64))  # g = lift' vec(W)
    expected = lift.T @ sigma @ lift
    spectrum = joint_variance(covariance) @ (covariance.in_basis.T @ phi).square()
    actual = covariance.out_basis @ torch.diag(spectrum) @ covariance.out_basis.T
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)
    if damping == "factored":
        root_tau, root_lam = math.sqrt(2.0), math.sqrt(0.5)
        scale = phi @ torch.linalg.solve(root_tau * A + root_lam * torch.eye(K).double(), phi)
        rank_one = scale * torch.linalg.inv(root_tau * B + root_lam * torch.eye(D).double())
        torch.testing.assert_close(actual, rank_one, rtol=1e-10, atol=1e-13)


@both_dampings
def test_the_two_dampings_agree_without_data(damping):
    zero_A, zero_B = torch.zeros(K, K), torch.zeros(D, D)
    covariance = posterior_covariance(
        zero_A, zero_B, pseudo_data_count=1.0, prior_precision=4.0, damping=damping
    )
    assert torch.equal(joint_variance(covariance), torch.full((D, K), 0.25, dtype=torch.float64))


def test_exact_damping_is_wider_than_factored_in_every_direction(generator):
    # (sqrt(tau) a + sqrt(lam))(sqrt(tau) b + sqrt(lam)) has cross terms that tau a b + lam has not.
    A, B = psd(generator, K), psd(generator, D)
    factored, exact = (
        posterior_covariance(A, B, pseudo_data_count=3.0, prior_precision=0.7, damping=damping)
        for damping in ("factored", "exact")
    )
    assert (joint_variance(exact) > joint_variance(factored)).all()


@both_dampings
def test_sampled_weights_have_the_dense_covariance(damping, generator):
    A, B = psd(generator, 3) / 3, psd(generator, 2)
    mean = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    covariance = posterior_covariance(
        A, B, pseudo_data_count=2.0, prior_precision=0.5, damping=damping
    )
    count = 200_000
    samples = sample_weights(mean, covariance, count, generator=generator)
    assert samples.shape == (count, 2, 3)
    vectors = (samples - mean).mT.flatten(1)  # stacked columns
    expected = torch.linalg.inv(dense_precision(A, B, 2.0, 0.5, damping))
    variances = expected.diagonal()
    # 5 standard errors of a Gaussian's empirical mean and covariance.
    assert (vectors.mean(dim=0).abs() < 5 * (variances / count).sqrt()).all()
    error = (vectors.T @ vectors / count - expected).abs()
    standard_error = ((torch.outer(variances, variances) + expected.square()) / count).sqrt()
    assert (error < 5 * standard_error).all()
    # The test would see a transposed convention or a missing factor.
    transposed = torch.linalg.inv(torch.kron(B, A) + torch.eye(6, dtype=torch.float64))
    assert ((expected - transposed).abs() > 5 * standard_error).any()


def test_sampled_weights_depend_on_the_generator_only(generator):
    A, B = psd(generator, K), psd(generator, D)
    covariance = posterior_covariance(A, B, pseudo_data_count=1.0, prior_precision=1.0)
    mean = torch.zeros(D, K)
    first, again, other = (
        sample_weights(mean, covariance, 4, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("shape", [(K, D), (D,), (D, K + 1)])
def test_weights_of_another_shape_are_refused(shape, generator):
    covariance = posterior_covariance(
        torch.eye(K), torch.eye(D), pseudo_data_count=1.0, prior_precision=1.0
    )
    with pytest.raises(ValueError, match="weights have shape"):
        sample_weights(torch.zeros(shape), covariance, 1, generator=generator)


@both_dampings
def test_to_casts_every_tensor(damping, generator):
    covariance = posterior_covariance(
        psd(generator, K),
        psd(generator, D),
        pseudo_data_count=1.0,
        prior_precision=1.0,
        damping=damping,
    )
    cast = covariance.to(torch.float32)
    assert cast.damping == damping
    kinds = {tensor.dtype for tensor in vars(cast).values() if tensor is not None}
    assert kinds == {torch.float32}
    assert joint_variance(covariance).dtype == torch.float64
    torch.testing.assert_close(joint_variance(cast).double(), joint_variance(covariance))


@pytest.mark.parametrize(
    "given_fields",
    [
        (),
        ("in_variance",),
        ("out_variance",),
        ("in_variance", "joint_variance"),
        ("out_variance", "joint_variance"),
        ("in_variance", "out_variance", "joint_variance"),
    ],
)
def test_exactly_one_parametrisation_is_held(given_fields):
    values = {
        "in_variance": torch.ones(K),
        "out_variance": torch.ones(D),
        "joint_variance": torch.ones(D, K),
    }
    with pytest.raises(ValueError, match="give either"):
        KroneckerGaussian(
            torch.eye(K), torch.eye(D), **{name: values[name] for name in given_fields}
        )


def test_eigendecomposition_of_a_float32_factor_is_done_in_float64(generator):
    matrix = psd(generator, 6).float()
    values, vectors = symmetric_eigh(matrix)
    assert values.dtype == vectors.dtype == torch.float64
    rebuilt = vectors @ torch.diag(values) @ vectors.T
    torch.testing.assert_close(rebuilt, matrix.double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(symmetric_eigvalsh(matrix), values, rtol=1e-10, atol=1e-12)


def test_rounding_asymmetry_and_negativity_are_repaired(generator):
    basis = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    matrix = basis @ torch.diag(torch.tensor([400.0, 3.0, 1e-5, -5e-4]).double()) @ basis.T
    matrix[0, 1] += 1e-4
    values = symmetric_eigvalsh(matrix)
    assert (values >= 0).all()
    assert values[0].item() == 0.0
    expected = torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)).clamp_min(0)
    torch.testing.assert_close(values, expected)


NOT_SYMMETRIC = torch.tensor([[2.0, 1.0], [0.5, 2.0]])
INDEFINITE = torch.tensor([[1.0, 2.0], [2.0, 1.0]])


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (NOT_SYMMETRIC, "not symmetric"),
        (INDEFINITE, "positive semi-definite up to rounding"),
        (-torch.eye(2), "positive semi-definite up to rounding"),
        (torch.tensor([[-1.0]]), "positive semi-definite up to rounding"),
        (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), "NaN or infinity"),
        (torch.tensor([[math.inf]]), "NaN or infinity"),
        (torch.ones(2, 3), "must be a square matrix"),
        (torch.ones(2), "must be a square matrix"),
        (torch.ones(0, 0), "must be a square matrix"),
        (torch.ones(2, 2, 2), "must be a square matrix"),
    ],
)
def test_damaged_factors_are_refused(matrix, message):
    for function in (symmetric_eigh, symmetric_eigvalsh):
        with pytest.raises(ValueError, match=message):
            function(matrix)
    for pair in ((matrix, torch.eye(2)), (torch.eye(2), matrix)):
        with pytest.raises(ValueError, match=message):
            posterior_covariance(*pair, pseudo_data_count=1.0, prior_precision=1.0)


def test_the_error_names_the_factor():
    with pytest.raises(ValueError, match=r"image\.B is not symmetric"):
        check_factor("image.B", NOT_SYMMETRIC)


@pytest.mark.parametrize("name", ["pseudo_data_count", "prior_precision"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_hyperparameters_must_be_positive(value, name):
    hyperparameters = {"pseudo_data_count": 1.0, "prior_precision": 1.0, name: value}
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        posterior_covariance(torch.eye(K), torch.eye(D), **hyperparameters)


def test_an_unknown_damping_is_refused():
    with pytest.raises(ValueError, match="damping must be"):
        posterior_covariance(
            torch.eye(K),
            torch.eye(D),
            pseudo_data_count=1.0,
            prior_precision=1.0,
            damping="diagonal",
        )


@both_dampings
def test_one_decomposition_serves_every_posterior(damping, generator):
    A, B = psd(generator, K), psd(generator, D)
    spectra = factor_spectra(A, B)
    for tau, lam in ((1.0, 1.0), (50.0, 0.2)):
        options = {"pseudo_data_count": tau, "prior_precision": lam, "damping": damping}
        shared, fresh = damped_covariance(spectra, **options), posterior_covariance(A, B, **options)
        assert shared.in_basis is spectra.in_basis
        for name, value in vars(fresh).items():
            other = getattr(shared, name)
            assert (value is None and other is None) or torch.equal(value, other)
    with pytest.raises(ValueError, match="damping must be"):
        damped_covariance(spectra, pseudo_data_count=1.0, prior_precision=1.0, damping="none")
    with pytest.raises(ValueError, match="pseudo_data_count must be positive"):
        damped_covariance(spectra, pseudo_data_count=0.0, prior_precision=1.0)

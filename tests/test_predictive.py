"""Predictive probabilities against quadrature and against brute-force sampled weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_bayesvlm.cosine import GaussianEmbedding, gaussian_embedding
from hf_bayesvlm.kronecker import KroneckerGaussian, posterior_covariance
from hf_bayesvlm.predictive import (
    monte_carlo_probs,
    predictive_probs,
    probit_logits,
    sample_embeddings,
    sample_logits,
    sample_text_directions,
)

D = 4
TAU, LAM = 2.0, 3.0
both_dampings = pytest.mark.parametrize("damping", ["factored", "exact"])


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Tower:
    """One projection with a posterior, and the dense covariance of its vec(W), columns stacked."""

    def __init__(
        self, generator: torch.Generator, rows: int, width: int, damping: str = "factored"
    ) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        A, B = ((root.T @ root) / len(root) for root in (normal(9, width), normal(9, D)))
        B = B + 3.0
        self.weights, self.features = normal(D, width), normal(rows, width)
        self.posterior = posterior_covariance(
            A, B, pseudo_data_count=TAU, prior_precision=LAM, damping=damping
        )
        eye_A, eye_B = (torch.eye(size, dtype=torch.float64) for size in (width, D))
        if damping == "exact":
            precision = TAU * torch.kron(A, B) + LAM * torch.kron(eye_A, eye_B)
        else:
            root_tau, root_lam = math.sqrt(TAU), math.sqrt(LAM)
            precision = torch.kron(root_tau * A + root_lam * eye_A, root_tau * B + root_lam * eye_B)
        self.dense = torch.linalg.inv(precision)

    @property
    def embedding(self) -> GaussianEmbedding:
        return gaussian_embedding(self.features @ self.weights.T, self.features, self.posterior)

    def brute_force(self, count: int, generator: torch.Generator) -> Tensor:
        """Embeddings of all rows under weights drawn from the dense covariance, `[count, rows, D]`."""
        root = torch.linalg.cholesky(self.dense)
        noise = torch.randn(count, len(root), generator=generator, dtype=torch.float64)
        columns = (noise @ root.T).unflatten(1, (self.weights.shape[1], D))
        return self.features @ (self.weights + columns.mT).mT

    def joint_covariance(self) -> Tensor:
        """Covariance of all embeddings, rows one after another, `[rows * D, rows * D]`."""
        rows = torch.kron(self.features, torch.eye(D, dtype=torch.float64))
        return rows @ self.dense @ rows.T


def expected_sigmoid(mean: float, var: float) -> float:
    """E sigmoid(z) for z ~ N(mean, var), by the trapezoid rule over 12 standard deviations."""
    nodes = torch.linspace(-12.0, 12.0, 20001, dtype=torch.float64)
    density = torch.exp(-0.5 * nodes.square()) / math.sqrt(2.0 * math.pi)
    values = torch.sigmoid(mean + math.sqrt(var) * nodes) * density
    return torch.trapezoid(values, nodes).item()


@pytest.mark.parametrize("var", [0.0, 0.1, 1.0, 4.0, 25.0, 100.0, 2500.0])
@pytest.mark.parametrize("mean", [-20.0, -5.0, -1.0, -0.2, 0.0, 0.7, 3.0, 12.0])
def test_probit_is_close_to_the_expected_sigmoid(mean, var):
    logits = probit_logits(*torch.tensor([[mean], [var]], dtype=torch.float64))
    # The probit and the logistic with the same slope at 0 differ by at most 0.0177.
    assert logits.sigmoid().item() == pytest.approx(expected_sigmoid(mean, var), abs=0.019)
    if var == 0.0:
        assert logits.item() == mean
    if mean == 0.0:
        assert expected_sigmoid(mean, var) == pytest.approx(0.5, abs=1e-12)
        assert logits.item() == 0.0


def test_probit_matters_and_pulls_towards_ignorance():
    mean = torch.tensor([4.0, -4.0])
    scaled = probit_logits(mean, torch.tensor([50.0, 50.0]))
    assert abs(torch.sigmoid(torch.tensor(4.0)).item() - expected_sigmoid(4.0, 50.0)) > 0.2
    assert (scaled.abs() < mean.abs()).all()
    assert torch.equal(scaled.sign(), mean.sign())


def test_predictive_probs():
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    torch.testing.assert_close(
        predictive_probs(logits, "softmax"), torch.tensor([[0.25, 0.75]]).double()
    )
    torch.testing.assert_close(
        predictive_probs(logits, "sigmoid"), torch.tensor([[0.5, 0.75]]).double()
    )
    with pytest.raises(ValueError, match="likelihood must be"):
        predictive_probs(logits, "hinge")


def standard_error_of_covariance(covariance: Tensor, count: int) -> Tensor:
    variances = covariance.diagonal()
    return ((torch.outer(variances, variances) + covariance.square()) / count).sqrt()


@both_dampings
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (2, 5), (3, 3), (6, 3)])
def test_sampled_embeddings_have_the_dense_joint_covariance(rows, width, damping, generator):
    side = Tower(generator, rows, width, damping)
    side.features[1:] += side.features[0]  # rows that are clearly correlated
    count = 60_000
    samples = sample_embeddings(side.embedding, side.posterior, count, generator=seeded())
    assert samples.shape == (count, rows, D)
    deviation = (samples - side.embedding.mean).flatten(1)
    expected = side.joint_covariance()
    if rows > 1:  # by more than this test's noise
        assert expected[:D, D:].abs().max() > 20 * expected.diagonal().max() / math.sqrt(count)
    mean_error = deviation.mean(dim=0).abs() / (expected.diagonal() / count).sqrt()
    assert mean_error.max() < 5
    error = (deviation.T @ deviation / count - expected).abs()
    assert (error < 5.5 * standard_error_of_covariance(expected, count)).all()


@both_dampings
def test_repeated_rows_have_the_same_samples(damping, generator):
    side = Tower(generator, 2, 5, damping)
    rows = side.embedding[torch.tensor([0, 1, 0, 1, 1])]
    samples = sample_embeddings(rows, side.posterior, 50, generator=seeded())
    assert torch.isfinite(samples).all()
    torch.testing.assert_close(samples[:, 0], samples[:, 2], rtol=0, atol=1e-12)
    torch.testing.assert_close(samples[:, 1], samples[:, 3], rtol=0, atol=1e-12)
    assert (samples[:, 0] - samples[:, 1]).abs().min() > 1e-6


@both_dampings
def test_all_zero_features_have_no_variance(damping, generator):
    side = Tower(generator, 2, 5, damping)
    side.features[1] = 0.0
    samples = sample_embeddings(side.embedding, side.posterior, 9, generator=seeded())
    assert torch.equal(samples[:, 1], torch.zeros(9, D, dtype=torch.float64))
    assert samples[:, 0].var(dim=0).min() > 0


def test_without_posterior_samples_are_the_mean(generator):
    embedding = gaussian_embedding(
        torch.randn(3, D, generator=generator), torch.randn(3, 6, generator=generator), None
    )
    samples = sample_embeddings(embedding, None, 5, generator=generator)
    assert torch.equal(samples, embedding.mean.expand(5, 3, D))


@both_dampings
def test_text_directions_are_unit_vectors_in_the_image_eigenbasis(damping, generator):
    image, text = Tower(generator, 2, 5, damping), Tower(generator, 3, 6, damping)
    directions, plain = (
        sample_text_directions(text.embedding, text.posterior, basis, 8, generator=seeded())
        for basis in (image.posterior, None)
    )
    assert directions.shape == (8, 3, D)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(8, 3).double())
    torch.testing.assert_close(directions @ image.posterior.out_basis.T, plain)
    samples = sample_embeddings(text.embedding, text.posterior, 8, generator=seeded())
    torch.testing.assert_close(plain, F.normalize(samples, dim=-1))


def brute_force_logits(
    image: Tower,
    text: Tower,
    modalities: str,
    count: int,
    scale: float,
    bias: float,
    generator: torch.Generator,
) -> Tensor:
    g, h = image.brute_force(count, generator), text.brute_force(count, generator)
    if modalities == "image":
        h = text.embedding.mean.expand_as(h)
    if modalities == "text":
        g = image.embedding.mean.expand_as(g)
    return scale * F.normalize(g, dim=-1) @ F.normalize(h, dim=-1).mT + bias


@both_dampings
@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid"])
@pytest.mark.parametrize("modalities", ["both", "image", "text"])
def test_monte_carlo_agrees_with_brute_force_weights(modalities, likelihood, damping, generator):
    image, text = Tower(generator, 3, 5, damping), Tower(generator, 4, 3, damping)
    scale, bias = 6.0, -2.0 if likelihood == "sigmoid" else 0.0
    count = 30_000
    probs = monte_carlo_probs(
        image.embedding,
        text.embedding,
        image.posterior,
        text.posterior,
        likelihood=likelihood,
        logit_scale=scale,
        logit_bias=bias,
        num_samples=count,
        generator=seeded(),
        modalities=modalities,
    )
    assert probs.shape == (3, count, 4)
    logits = brute_force_logits(image, text, modalities, count, scale, bias, generator)
    expected = logits.softmax(-1) if likelihood == "softmax" else logits.sigmoid()
    expected = expected.transpose(0, 1)
    # First moments, and second moments with the correlations between labels.
    for one, other in (
        (probs, expected),
        (
            probs[..., :, None] * probs[..., None, :],
            expected[..., :, None] * expected[..., None, :],
        ),
    ):
        noise = ((one.var(dim=1) + other.var(dim=1)) / count).sqrt()
        assert ((one.mean(dim=1) - other.mean(dim=1)).abs() < 5.5 * noise + 1e-12).all()
    # Labels are not independent given the image: sampling logit by logit would be seen above.
    correlation = torch.stack([torch.corrcoef(samples.T) for samples in probs])
    assert (correlation - torch.eye(4, dtype=torch.float64)).abs().max() > 0.1


@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_without_posterior_monte_carlo_is_the_plain_model(bias, generator):
    image, text = Tower(generator, 3, 5).embedding, Tower(generator, 4, 3).embedding
    probs = monte_carlo_probs(
        image,
        text,
        None,
        None,
        likelihood="sigmoid",
        logit_scale=torch.tensor(6.0),
        logit_bias=torch.tensor(bias),
        num_samples=5,
        generator=generator,
    )
    cosines = F.cosine_similarity(image.mean[:, None], text.mean, dim=-1)
    plain = torch.sigmoid(6.0 * cosines + bias)
    torch.testing.assert_close(probs, plain[:, None].expand(3, 5, 4))


def draw(image: Tower, text: Tower, rows: Tensor, seed: int = 3) -> Tensor:
    source = seeded(seed)
    directions = sample_text_directions(
        text.embedding, text.posterior, image.posterior, 11, generator=source
    )
    return sample_logits(
        image.embedding[rows], image.posterior, directions, 20.0, -1.0, generator=source
    )


@both_dampings
def test_logits_of_an_image_do_not_depend_on_its_batch(damping, generator):
    image, text = Tower(generator, 5, 6, damping), Tower(generator, 3, 4, damping)
    everything = draw(image, text, torch.arange(5))
    for rows in (torch.tensor([2]), torch.tensor([4, 0]), torch.tensor([3, 3, 1, 0, 2, 4, 4])):
        torch.testing.assert_close(
            draw(image, text, rows), everything[rows], rtol=1e-11, atol=1e-11
        )


@both_dampings
def test_draws_come_from_the_generator_alone(damping, generator):
    image, text = Tower(generator, 5, 6, damping), Tower(generator, 3, 4, damping)
    rows = torch.arange(5)
    state = torch.get_rng_state()
    first = draw(image, text, rows)
    assert torch.equal(first, draw(image, text, rows))
    assert not torch.equal(first, draw(image, text, rows, seed=4))
    assert torch.equal(torch.get_rng_state(), state)
    # One generator goes on: a second batch has other noise.
    source = seeded()
    one, two = (
        sample_embeddings(image.embedding, image.posterior, 2, generator=source) for _ in range(2)
    )
    assert not torch.equal(one, two)


def test_the_modalities_argument_drops_a_posterior(generator):
    image, text = Tower(generator, 5, 6), Tower(generator, 3, 4)

    def probs(
        modalities: str, image_side: KroneckerGaussian | None, text_side: KroneckerGaussian | None
    ) -> Tensor:
        return monte_carlo_probs(
            image.embedding,
            text.embedding,
            image_side,
            text_side,
            likelihood="softmax",
            logit_scale=6.0,
            num_samples=8,
            generator=seeded(),
            modalities=modalities,
        )

    both = probs("both", image.posterior, text.posterior)
    only_image = probs("image", image.posterior, text.posterior)
    only_text = probs("text", image.posterior, text.posterior)
    assert torch.equal(only_image, probs("both", image.posterior, None))
    assert torch.equal(only_text, probs("both", None, text.posterior))
    for one, other in ((both, only_image), (both, only_text), (only_image, only_text)):
        assert (one - other).abs().max() > 1e-3
    for modalities in ("audio", ""):
        with pytest.raises(ValueError, match="modalities must be"):
            probs(modalities, image.posterior, text.posterior)


def test_an_unknown_likelihood_is_refused(generator):
    image, text = Tower(generator, 2, 6), Tower(generator, 3, 4)
    with pytest.raises(ValueError, match="likelihood must be"):
        monte_carlo_probs(
            image.embedding,
            text.embedding,
            image.posterior,
            text.posterior,
            likelihood="hinge",
            logit_scale=6.0,
            generator=generator,
        )


@both_dampings
def test_float32_stays_float32_and_finite(damping, generator):
    image, text = Tower(generator, 5, 6, damping), Tower(generator, 3, 4, damping)
    probs = monte_carlo_probs(
        image.embedding.to(torch.float32),
        text.embedding.to(torch.float32),
        image.posterior.to(torch.float32),
        text.posterior.to(torch.float32),
        likelihood="softmax",
        logit_scale=100.0,
        num_samples=20,
        generator=generator,
    )
    assert probs.dtype == torch.float32
    assert torch.isfinite(probs).all()
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(5, 20))

"""ProbCosine against dense covariances of every pair and against sampled weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_bayesvlm.cosine import (
    GaussianEmbedding,
    cosine_frame,
    cosine_geometry,
    framed_geometry,
    fuse_templates,
    gaussian_embedding,
    pair_products,
    prob_cosine,
)
from hf_bayesvlm.kronecker import KroneckerGaussian, posterior_covariance

N, C, D = 4, 3, 5
forms = pytest.mark.parametrize("form", ["diagonal", "full"])
both_dampings = pytest.mark.parametrize("damping", ["factored", "exact"])
all_modalities = pytest.mark.parametrize("modalities", ["both", "image", "text"])


@dataclass(frozen=True)
class Tower:
    """One projection with a posterior, and the dense covariance of its vec(W), columns stacked."""

    weights: Tensor
    features: Tensor
    posterior: KroneckerGaussian
    dense: Tensor

    @property
    def embedding(self) -> GaussianEmbedding:
        return gaussian_embedding(self.features @ self.weights.T, self.features, self.posterior)

    def covariances(self, features: Tensor) -> Tensor:
        """Dense covariance of the embedding of every row, `[rows, D, D]`."""
        eye = torch.eye(self.weights.shape[0], dtype=torch.float64)
        lifts = [torch.kron(phi[:, None], eye) for phi in features]
        return torch.stack([lift.T @ self.dense @ lift for lift in lifts])

    def sampled(self, count: int, generator: torch.Generator) -> Tensor:
        """Weights from the dense covariance's Cholesky factor, `[count, D, K]`."""
        root = torch.linalg.cholesky(self.dense)
        noise = torch.randn(count, len(root), generator=generator, dtype=torch.float64)
        columns = (noise @ root.T).unflatten(1, (self.weights.shape[1], self.weights.shape[0]))
        return self.weights + columns.mT


def tower(
    generator: torch.Generator,
    rows: int,
    in_features: int,
    *,
    damping: str = "factored",
    features: int = D,
    tau: float = 2.0,
    lam: float = 4.0,
    bias: bool = False,
) -> Tower:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = in_features + bias
    A, B = ((root.T @ root) / len(root) for root in (normal(9, width), normal(9, features)))
    B = B + 3.0 * torch.ones(features, features, dtype=torch.float64)  # far from diagonal
    weights, inputs = normal(features, width), normal(rows, in_features)
    if bias:
        inputs = torch.cat([inputs, torch.ones(rows, 1, dtype=torch.float64)], dim=1)
    posterior = posterior_covariance(
        A, B, pseudo_data_count=tau, prior_precision=lam, damping=damping
    )
    if damping == "exact":
        precision = tau * torch.kron(A, B) + lam * torch.eye(width * features).double()
    else:
        root_tau, root_lam = math.sqrt(tau), math.sqrt(lam)
        precision = torch.kron(
            root_tau * A + root_lam * torch.eye(width).double(),
            root_tau * B + root_lam * torch.eye(features).double(),
        )
    return Tower(weights, inputs, posterior, torch.linalg.inv(precision))


def dense_moments(
    image: Tower, text: Tower, form: str, modalities: str = "both"
) -> tuple[Tensor, Tensor]:
    """The formulas pair by pair, with whole matrices."""
    image_S, text_T = image.covariances(image.features), text.covariances(text.features)
    if modalities == "image":
        text_T = torch.zeros_like(text_T)
    if modalities == "text":
        image_S = torch.zeros_like(image_S)
    if form == "diagonal":
        image_S, text_T = (torch.diag_embed(V.diagonal(dim1=1, dim2=2)) for V in (image_S, text_T))
    mean = torch.zeros(len(image_S), len(text_T), dtype=torch.float64)
    var = torch.zeros_like(mean)
    for i, (mu, S) in enumerate(zip(image.features @ image.weights.T, image_S, strict=True)):
        for j, (nu, T) in enumerate(zip(text.features @ text.weights.T, text_T, strict=True)):
            product = (mu @ mu + S.trace()) * (nu @ nu + T.trace())
            mean[i, j] = mu @ nu / product.sqrt()
            var[i, j] = ((S @ T).trace() + mu @ T @ mu + nu @ S @ nu) / product
    return mean, var


@forms
@both_dampings
@all_modalities
def test_agrees_with_dense_matrices(modalities, damping, form, generator):
    image = tower(generator, N, 7, damping=damping, lam=3.0)
    text = tower(generator, C, 6, damping=damping, lam=0.5, tau=9.0)
    geometry = cosine_geometry(image.posterior, text.posterior, form)
    mean, var = prob_cosine(image.embedding, text.embedding, geometry, modalities=modalities)
    expected_mean, expected_var = dense_moments(image, text, form, modalities)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(var, expected_var, rtol=1e-10, atol=1e-15)


@both_dampings
def test_diagonal_is_the_default_and_is_not_full(damping, generator):
    image, text = (tower(generator, rows, 6, damping=damping) for rows in (N, C))
    default, diagonal, full = (
        prob_cosine(
            image.embedding, text.embedding, cosine_geometry(image.posterior, text.posterior, *form)
        )
        for form in ((), ("diagonal",), ("full",))
    )
    assert torch.equal(default[1], diagonal[1])
    # Traces are the same in any basis, variances are not.
    torch.testing.assert_close(full[0], diagonal[0], rtol=1e-12, atol=0)
    assert ((full[1] / diagonal[1] - 1.0).abs() > 0.02).any()


@forms
def test_forms_agree_where_eigenvectors_are_coordinates(form, generator):
    image, text = (tower(generator, rows, 6) for rows in (N, C))
    swap = torch.eye(D, dtype=torch.float64)[torch.randperm(D, generator=generator)]
    flat_image, flat_text = (
        replace(side.posterior, out_basis=basis)
        for side, basis in ((image, swap), (text, torch.eye(D, dtype=torch.float64)))
    )
    one, other = (
        prob_cosine(image.embedding, text.embedding, cosine_geometry(flat_image, flat_text, f))
        for f in (form, "full")
    )
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@both_dampings
def test_embedding_covariance_is_the_dense_one(damping, generator):
    side = tower(generator, N, 7, damping=damping)
    embedding = side.embedding
    if damping == "factored":
        assert embedding.spectrum is None
        spectrum = embedding.scale[:, None] * side.posterior.out_variance
    else:
        spectrum = embedding.spectrum
        torch.testing.assert_close(embedding.scale, spectrum.mean(dim=1))
    basis = side.posterior.out_basis
    actual = basis @ torch.diag_embed(spectrum) @ basis.T
    torch.testing.assert_close(actual, side.covariances(side.features), rtol=1e-10, atol=1e-13)


@both_dampings
def test_numerator_and_denominator_are_moments_of_sampled_weights(damping, generator):
    # The formula is var(g.h) / (E|g|^2 E|h|^2), each factor of which is exact at any variance.
    image = tower(generator, 2, 4, damping=damping, lam=0.5)
    text = tower(generator, 2, 3, damping=damping, lam=0.5)
    count = 200_000
    g = image.features @ image.sampled(count, generator).mT
    h = text.features @ text.sampled(count, generator).mT
    products = g @ h.mT
    size = (g.square().sum(-1).mean(0))[:, None] * h.square().sum(-1).mean(0)
    geometry = cosine_geometry(image.posterior, text.posterior, "full")
    mean, var = prob_cosine(image.embedding, text.embedding, geometry)
    assert (var > 0.02).all()
    torch.testing.assert_close(products.var(dim=0) / size, var, rtol=0.02, atol=0)
    torch.testing.assert_close(products.mean(dim=0) / size.sqrt(), mean, rtol=0.02, atol=2e-3)


@both_dampings
def test_full_form_beats_diagonal_on_the_cosine_itself(damping, generator):
    # At nearly orthogonal means and small relative variance.  Elsewhere the formula over-counts: a cosine
    # does not see the variance along the mean.
    image = tower(generator, 1, 4, damping=damping, tau=3e3, lam=3e2)
    text = tower(generator, 1, 3, damping=damping, tau=3e3, lam=3e2)
    mu = image.features @ image.weights.T
    nu = text.features @ text.weights.T
    rejected = nu - (nu @ mu.T) / (mu @ mu.T) * mu + 0.05 * mu
    shift = (rejected - nu).T @ text.features / (text.features @ text.features.T)
    text = replace(text, weights=text.weights + shift)
    count = 200_000
    g = image.features @ image.sampled(count, generator).mT
    h = text.features @ text.sampled(count, generator).mT
    cosines = F.cosine_similarity(g, h, dim=-1)
    truth = cosines.var().item()
    results = {
        form: prob_cosine(
            image.embedding, text.embedding, cosine_geometry(image.posterior, text.posterior, form)
        )
        for form in ("diagonal", "full")
    }
    assert results["full"][1].item() == pytest.approx(truth, rel=0.03)
    assert abs(results["diagonal"][1].item() / truth - 1.0) > 0.06
    assert results["full"][0].item() == pytest.approx(cosines.mean().item(), abs=2e-3)


@forms
@both_dampings
def test_without_variance_it_is_the_plain_cosine(damping, form, generator):
    image, text = (tower(generator, rows, 6, damping=damping) for rows in (N, C))
    geometry = cosine_geometry(image.posterior, text.posterior, form)
    plain = F.cosine_similarity(image.embedding.mean[:, None], text.embedding.mean, dim=-1)
    sure_image, sure_text = (side.embedding.without_variance() for side in (image, text))
    for mean, var in (
        prob_cosine(sure_image, sure_text, geometry),
        prob_cosine(image.embedding, text.embedding, None),
        prob_cosine(sure_image, text.embedding, geometry, modalities="image"),
        prob_cosine(image.embedding, sure_text, geometry, modalities="text"),
    ):
        torch.testing.assert_close(mean, plain, rtol=1e-12, atol=1e-14)
        assert torch.equal(var, torch.zeros(N, C, dtype=torch.float64))
    assert image.embedding.scale.min() > 0


def test_an_embedding_without_posterior_has_no_scale(generator):
    side = tower(generator, N, 6)
    embedding = gaussian_embedding(side.embedding.mean, side.features, None)
    assert torch.equal(embedding.scale, torch.zeros(N, dtype=torch.float64))
    assert embedding.spectrum is None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
    form=st.sampled_from(["diagonal", "full"]),
    damping=st.sampled_from(["factored", "exact"]),
    modalities=st.sampled_from(["both", "image", "text"]),
    log_lam=st.floats(-4, 9),
    log_length=st.floats(-6, 6),
)
def test_invariances(seed, sizes, form, damping, modalities, log_lam, log_length):
    generator = torch.Generator().manual_seed(seed)
    rows, labels, features = sizes
    options = {"damping": damping, "features": features, "lam": math.exp(log_lam)}
    image = tower(generator, rows, 4, **options)
    text = tower(generator, labels, 3, **options)
    geometry = cosine_geometry(image.posterior, text.posterior, form)
    mean, var = prob_cosine(image.embedding, text.embedding, geometry, modalities=modalities)
    assert mean.shape == var.shape == (rows, labels)
    assert (var >= 0).all()
    # Uncertainty shrinks the mean, and a second moment of a cosine is at most 1.
    plain = F.cosine_similarity(image.embedding.mean[:, None], text.embedding.mean, dim=-1)
    assert (mean.abs() <= plain.abs() + 1e-14).all()
    assert (mean.square() + var <= 1 + 1e-12).all()
    # The two towers play the same role.
    swapped = {"both": "both", "image": "text", "text": "image"}[modalities]
    mirrored = prob_cosine(
        text.embedding,
        image.embedding,
        cosine_geometry(text.posterior, image.posterior, form),
        modalities=swapped,
    )
    torch.testing.assert_close(mirrored[0].T, mean, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(mirrored[1].T, var, rtol=1e-10, atol=1e-15)
    # W -> c W with its covariance changes the length of the image embedding only.
    c = math.exp(log_length)
    fields = {
        name: getattr(image.posterior, name) * c**2
        for name in (("out_variance",) if damping == "factored" else ("joint_variance",))
    }
    longer = replace(image.posterior, **fields)
    embedding = gaussian_embedding(c * image.embedding.mean, image.features, longer)
    scaled = prob_cosine(
        embedding,
        text.embedding,
        cosine_geometry(longer, text.posterior, form),
        modalities=modalities,
    )
    torch.testing.assert_close(scaled[0], mean, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(scaled[1], var, rtol=1e-9, atol=1e-15)


@forms
@both_dampings
def test_float32_agrees_with_float64(damping, form, generator):
    image = tower(generator, 16, 12, damping=damping, features=24, lam=1700.0)
    text = tower(generator, 10, 12, damping=damping, features=24, lam=1200.0)
    double = prob_cosine(
        image.embedding, text.embedding, cosine_geometry(image.posterior, text.posterior, form)
    )
    single = prob_cosine(
        *(
            gaussian_embedding(
                side.embedding.mean.float(),
                side.features.float(),
                side.posterior.to(torch.float32),
            )
            for side in (image, text)
        ),
        cosine_geometry(image.posterior.to(torch.float32), text.posterior.to(torch.float32), form),
    )
    assert single[0].dtype == single[1].dtype == torch.float32
    torch.testing.assert_close(single[0].double(), double[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(single[1].double(), double[1], rtol=1e-5, atol=0)


@both_dampings
@pytest.mark.parametrize(
    "rows",
    [slice(1, 3), torch.tensor([3, 0, 0]), torch.tensor([True, False, False, True])],
    ids=["slice", "index", "mask"],
)
def test_rows_can_be_picked(rows, damping, generator):
    image, text = (tower(generator, count, 6, damping=damping) for count in (N, C))
    geometry = cosine_geometry(image.posterior, text.posterior)
    mean, var = prob_cosine(image.embedding, text.embedding, geometry)
    picked = image.embedding[rows]
    assert len(picked) == len(mean[rows])
    torch.testing.assert_close(picked.features, image.features[rows])
    picked_mean, picked_var = prob_cosine(picked, text.embedding, geometry)
    torch.testing.assert_close(picked_mean, mean[rows], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(picked_var, var[rows], rtol=1e-13, atol=0)


@both_dampings
def test_to_casts_every_tensor(damping, generator):
    embedding = tower(generator, N, 6, damping=damping).embedding
    cast = embedding.to(torch.float32)
    kinds = {value.dtype for value in vars(cast).values() if value is not None}
    assert kinds == {torch.float32}
    assert (cast.spectrum is None) == (damping == "factored")
    assert len(cast) == N


@both_dampings
@pytest.mark.parametrize("bias", [False, True])
def test_fused_templates_have_the_covariance_of_the_average(bias, damping, generator):
    templates, labels = 3, 2
    text = tower(generator, templates * labels, 4, damping=damping, bias=bias)
    fused = fuse_templates(text.embedding, templates, text.posterior)
    assert len(fused) == labels
    # The average of the prompts' embeddings, each divided by the length of its MAP.
    lengths = (text.features @ text.weights.T).norm(dim=1)
    directions = (text.features @ text.weights.T) / lengths[:, None]
    expected_mean = directions.reshape(labels, templates, D).mean(dim=1)
    torch.testing.assert_close(fused.mean, expected_mean)
    # Exactly: a weighted sum of correlated Gaussians, with all cross-covariances of the prompts.
    eye = torch.eye(D, dtype=torch.float64)
    lifts = [
        torch.kron(phi[:, None], eye) / length / templates
        for phi, length in zip(text.features, lengths, strict=True)
    ]
    spectrum = fused.spectrum
    if spectrum is None:
        spectrum = fused.scale[:, None] * text.posterior.out_variance
    basis = text.posterior.out_basis
    actual = basis @ torch.diag_embed(spectrum) @ basis.T
    # And by brute force.
    count = 50_000
    prompts = text.features @ text.sampled(count, generator).mT / lengths[:, None]
    averages = prompts.reshape(count, labels, templates, D).mean(dim=2)
    for label in range(labels):
        mine = lifts[label * templates : (label + 1) * templates]
        expected = sum(a.T @ text.dense @ b for a in mine for b in mine)
        torch.testing.assert_close(actual[label], expected, rtol=1e-9, atol=1e-12)
        independent = sum(a.T @ text.dense @ a for a in mine)
        assert (expected - independent).norm() > 0.05 * expected.norm()
        deviation = averages[:, label] - expected_mean[label]
        error = (deviation.T @ deviation / count - expected).norm() / expected.norm()
        assert error.item() < 0.04


def test_one_template_is_left_alone(generator):
    embedding = tower(generator, 4, 6).embedding
    assert fuse_templates(embedding, 1, None) is embedding


def test_a_prompt_repeated_is_the_prompt_alone(generator):
    text = tower(generator, 2, 6)
    image = tower(generator, N, 5)
    repeated = text.embedding[torch.tensor([0, 0, 0, 1, 1, 1])]
    geometry = cosine_geometry(image.posterior, text.posterior, "full")
    fused = fuse_templates(repeated, 3, text.posterior)
    alone = prob_cosine(image.embedding, text.embedding, geometry)
    again = prob_cosine(image.embedding, fused, geometry)
    torch.testing.assert_close(again, alone, rtol=1e-11, atol=1e-14)


def test_fused_templates_without_posterior_have_no_variance(generator):
    text = tower(generator, 6, 4)
    fused = fuse_templates(text.embedding, 2, None)
    assert torch.equal(fused.scale, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("num_templates", [4, 0, -1, 7])
def test_prompts_must_divide_into_labels(num_templates, generator):
    with pytest.raises(ValueError, match="6 prompts are not"):
        fuse_templates(tower(generator, 6, 4).embedding, num_templates, None)


def test_posteriors_that_do_not_fit_are_refused(generator):
    factored, exact = (tower(generator, 1, 4, damping=d).posterior for d in ("factored", "exact"))
    narrow = tower(generator, 1, 4, features=D - 1).posterior
    with pytest.raises(ValueError, match="covariance must be"):
        cosine_geometry(factored, factored, "dense")
    with pytest.raises(ValueError, match="factored damping, text exact"):
        cosine_geometry(factored, exact)
    with pytest.raises(ValueError, match="different sizes"):
        cosine_geometry(factored, narrow)


def test_unknown_modalities_are_refused(generator):
    side = tower(generator, 1, 4)
    for geometry in (None, cosine_geometry(side.posterior, side.posterior)):
        with pytest.raises(ValueError, match="modalities must be"):
            prob_cosine(side.embedding, side.embedding, geometry, modalities="audio")


def test_an_embedding_of_another_damping_is_refused(generator: torch.Generator) -> None:
    factors = [torch.eye(3, dtype=torch.float64) * (1 + i) for i in range(2)]
    covariances = {
        damping: posterior_covariance(
            *factors, pseudo_data_count=1.0, prior_precision=1.0, damping=damping
        )
        for damping in ("factored", "exact")
    }
    rows = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    for encoded, other in (("factored", "exact"), ("exact", "factored")):
        embedding = gaussian_embedding(rows, rows, covariances[encoded])
        geometry = cosine_geometry(covariances[other], covariances[other])
        with pytest.raises(ValueError, match="different dampings"):
            prob_cosine(embedding, embedding, geometry)


@forms
@both_dampings
@all_modalities
def test_what_is_known_already_is_not_needed_again(form, damping, modalities, generator):
    image, text = tower(generator, N, 6, damping=damping), tower(generator, C, 4, damping=damping)
    frame = cosine_frame(image.posterior.out_basis, text.posterior.out_basis, form)
    products = pair_products(image.embedding, text.embedding, frame)
    geometry = framed_geometry(frame, image.posterior, text.posterior)
    squared = (image.features @ image.posterior.in_basis).square()
    known = gaussian_embedding(
        image.embedding.mean, image.features, image.posterior, squared_coordinates=squared
    )
    shared = prob_cosine(known, text.embedding, geometry, modalities=modalities, products=products)
    fresh = prob_cosine(
        image.embedding,
        text.embedding,
        cosine_geometry(image.posterior, text.posterior, form),
        modalities=modalities,
    )
    for one, other in zip(shared, fresh, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_frame_refuses_what_does_not_fit(generator):
    image, other = tower(generator, N, 6), tower(generator, C, 4, damping="exact")
    frame = cosine_frame(image.posterior.out_basis, other.posterior.out_basis)
    with pytest.raises(ValueError, match="use one for both"):
        framed_geometry(frame, image.posterior, other.posterior)
    with pytest.raises(ValueError, match="covariance must be"):
        cosine_frame(image.posterior.out_basis, other.posterior.out_basis, "none")

"""Entropies against their definitions in Python floats, and the laws they must keep."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_bayesvlm.acquisition import bald, entropy, expected_entropy

both_likelihoods = pytest.mark.parametrize("likelihood", ["softmax", "sigmoid"])


def plogp(p: float) -> float:
    return -p * math.log(p) if p > 0.0 else 0.0


def by_definition(probs: list[float], likelihood: str) -> float:
    if likelihood == "softmax":
        return math.fsum(plogp(p) for p in probs)
    # The second term with log1p: 1 - p has lost the digits of a small p.
    return math.fsum(plogp(p) - ((1.0 - p) * math.log1p(-p) if p < 1.0 else 0.0) for p in probs)


def distributions(seed: int, *shape: int, likelihood: str, sharpness: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return logits.softmax(dim=-1) if likelihood == "softmax" else logits.sigmoid()


@both_likelihoods
def test_entropy_is_its_definition(likelihood):
    probs = distributions(0, 3, 4, 5, likelihood=likelihood)
    actual = entropy(probs, likelihood=likelihood)
    assert actual.shape == (3, 4)
    for row, value in zip(probs.flatten(0, 1).tolist(), actual.flatten().tolist(), strict=True):
        assert value == pytest.approx(by_definition(row, likelihood), rel=1e-12)


def test_entropy_of_known_distributions():
    uniform = torch.full((7,), 1.0 / 7.0, dtype=torch.float64)
    assert entropy(uniform).item() == pytest.approx(math.log(7.0), rel=1e-14)
    coins = torch.full((7,), 0.5, dtype=torch.float64)
    assert entropy(coins, likelihood="sigmoid").item() == pytest.approx(
        7 * math.log(2.0), rel=1e-14
    )


@both_likelihoods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_certainty_has_exactly_no_entropy(dtype, likelihood):
    probs = torch.eye(4, dtype=dtype)
    assert torch.equal(entropy(probs, likelihood=likelihood), torch.zeros(4, dtype=dtype))
    samples = probs[:, None].expand(4, 6, 4)
    assert torch.equal(
        expected_entropy(samples, likelihood=likelihood), torch.zeros(4, dtype=dtype)
    )
    assert torch.equal(bald(samples, likelihood=likelihood), torch.zeros(4, dtype=dtype))


def test_a_bernoulli_is_a_categorical_of_two():
    p = distributions(1, 50, 1, likelihood="sigmoid")
    both = torch.cat([p, 1.0 - p], dim=1)
    torch.testing.assert_close(entropy(p, likelihood="sigmoid"), entropy(both))


@pytest.mark.parametrize("p", [1e-12, 1e-9, 1e-7, 1e-3, 0.3])
def test_small_bernoulli_probabilities_keep_their_digits_in_float32(p):
    probs = torch.tensor([p], dtype=torch.float32)
    expected = by_definition([probs.double().item()], "sigmoid")
    assert entropy(probs, likelihood="sigmoid").item() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    sharpness=st.sampled_from([0.0, 0.01, 1.0, 10.0, 1000.0]),
    likelihood=st.sampled_from(["softmax", "sigmoid"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_laws(seed, shape, sharpness, likelihood, dtype):
    batch, num_samples, classes = shape
    probs = distributions(seed, *shape, likelihood=likelihood, sharpness=sharpness).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    total = entropy(probs.mean(dim=1), likelihood=likelihood)
    aleatoric = expected_entropy(probs, likelihood=likelihood)
    epistemic = bald(probs, likelihood=likelihood)
    assert total.shape == aleatoric.shape == epistemic.shape == (batch,)
    for value in (total, aleatoric, epistemic):
        assert torch.isfinite(value).all()
    most = math.log(classes) if likelihood == "softmax" else classes * math.log(2.0)
    assert (total <= most + tolerance).all()
    assert (aleatoric >= -tolerance).all()
    assert (epistemic >= 0).all()
    # The weights are one of S draws: a variable tells about them at most log S each.
    variables = 1 if likelihood == "softmax" else classes
    assert (epistemic <= min(most, variables * math.log(num_samples)) + tolerance).all()
    torch.testing.assert_close(epistemic, total - aleatoric, rtol=0, atol=tolerance)
    generator = torch.Generator().manual_seed(seed)
    shuffled = probs[:, torch.randperm(num_samples, generator=generator)]
    shuffled = shuffled[..., torch.randperm(classes, generator=generator)]
    torch.testing.assert_close(
        bald(shuffled, likelihood=likelihood), epistemic, rtol=0, atol=tolerance
    )


@both_likelihoods
def test_mutual_information_is_the_mean_divergence_from_the_mean(likelihood):
    # The same quantity by another formula: E_w KL(p_w || mean p).
    probs = distributions(2, 5, 7, 4, likelihood=likelihood)
    mean = probs.mean(dim=1, keepdim=True)
    divergence = probs * (probs / mean).log()
    if likelihood == "sigmoid":
        divergence += (1.0 - probs) * ((1.0 - probs) / (1.0 - mean)).log()
    expected = divergence.sum(dim=-1).mean(dim=1)
    assert (expected > 0.01).all()
    torch.testing.assert_close(bald(probs, likelihood=likelihood), expected, rtol=1e-11, atol=0)


@both_likelihoods
def test_identical_samples_tell_nothing(likelihood):
    probs = distributions(3, 6, 1, 5, likelihood=likelihood).expand(6, 9, 5)
    assert bald(probs, likelihood=likelihood).max() < 1e-14
    torch.testing.assert_close(
        expected_entropy(probs, likelihood=likelihood), entropy(probs[:, 0], likelihood=likelihood)
    )


def test_contradicting_certainties_tell_everything():
    probs = torch.eye(5, dtype=torch.float64)[None]  # five samples, each sure of another class
    assert bald(probs).item() == pytest.approx(math.log(5.0), rel=1e-14)
    assert expected_entropy(probs).item() == 0.0


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3, 1)])
def test_samples_must_have_three_dimensions(shape):
    probs = torch.full(shape, 0.5)
    for function in (bald, expected_entropy):
        with pytest.raises(ValueError, match=r"\[batch, samples, classes\]"):
            function(probs)


@pytest.mark.parametrize("function", [entropy, expected_entropy, bald])
def test_an_unknown_likelihood_is_refused(function):
    with pytest.raises(ValueError, match="likelihood must be"):
        function(torch.full((2, 3, 4), 0.25), likelihood="hinge")

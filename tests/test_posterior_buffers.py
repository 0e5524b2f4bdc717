"""The posterior inside of a model: derived tensors, dtypes, completeness."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from hf_bayesvlm import PosteriorError
from hf_bayesvlm.cosine import cosine_geometry
from hf_bayesvlm.kronecker import posterior_covariance
from hf_bayesvlm.posterior_buffers import PosteriorBuffers

FORMS = [("factored", "diagonal"), ("factored", "full"), ("exact", "diagonal"), ("exact", "full")]


def buffers_of(posterior) -> PosteriorBuffers:
    buffers = PosteriorBuffers(posterior.to_config())
    buffers.load(posterior)
    return buffers


@pytest.mark.parametrize(("damping", "covariance"), FORMS)
def test_derived_tensors_are_those_of_the_numerics(damping, covariance):
    posterior = tiny.fitted("altclip").posterior.with_hyperparameters(
        damping=damping, covariance=covariance
    )
    buffers = buffers_of(posterior)
    expected = {
        name: posterior_covariance(
            part.A,
            part.B,
            pseudo_data_count=part.pseudo_data_count,
            prior_precision=part.prior_precision,
            damping=damping,
        )
        for name, part in (("image", posterior.image), ("text", posterior.text))
    }
    pairs = [(buffers.covariance(name), expected[name]) for name in expected]
    pairs.append((buffers.geometry(), cosine_geometry(*expected.values(), covariance)))
    for actual, wanted in pairs:
        for field, value in vars(wanted).items():
            found = getattr(actual, field)
            assert (found is None) == (value is None), field
            if value is not None:
                torch.testing.assert_close(found, value.float())


@pytest.mark.parametrize(("damping", "covariance"), FORMS)
def test_only_the_factors_are_saved(damping, covariance):
    posterior = tiny.fitted("clip").posterior.with_hyperparameters(
        damping=damping, covariance=covariance
    )
    assert set(buffers_of(posterior).state_dict()) == {"image_A", "image_B", "text_A", "text_B"}


def test_not_loaded_is_not_complete():
    posterior = tiny.fitted("clip").posterior
    buffers = PosteriorBuffers(posterior.to_config())
    assert not buffers.is_complete()
    buffers.load(posterior)
    assert buffers.is_complete()
    buffers.text_B[0, 0] = torch.nan
    buffers.refresh()
    assert not buffers.is_complete()


def test_damaged_factor_is_refused():
    buffers = buffers_of(tiny.fitted("clip").posterior)
    buffers.image_A[0, 1] += 100.0
    with pytest.raises(PosteriorError, match="the model's posterior is damaged"):
        buffers.refresh()


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casts_are_ignored(cast):
    buffers = buffers_of(tiny.fitted("clip").posterior)
    before = copy.deepcopy(buffers.state_dict())
    getattr(buffers, cast)()
    buffers.to(torch.float16)
    for name, value in buffers.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


def test_moves_are_not_ignored():
    buffers = buffers_of(tiny.fitted("clip").posterior).to("meta", torch.bfloat16)
    assert buffers.device.type == "meta"
    assert all(value.dtype == torch.float32 for value in buffers.buffers())
    buffers.refresh()  # nothing to derive from


def test_dtype_to_compute_with():
    buffers = buffers_of(tiny.fitted("clip").posterior)
    assert buffers.covariance("image", torch.float64).in_basis.dtype == torch.float64
    assert buffers.geometry(torch.float64).image_variance.dtype == torch.float64
    assert buffers.covariance("image").in_basis is buffers.image_in_basis


def test_load_state_dict_derives_again():
    first, second = (buffers_of(tiny.fitted("clip", seed=seed).posterior) for seed in (0, 1))
    assert not torch.equal(first.image_in_variance, second.image_in_variance)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.image_in_variance, second.image_in_variance)

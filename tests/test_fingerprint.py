"""Fingerprints survive a change of precision and nothing else."""

from __future__ import annotations

import pytest
import torch

from hf_bayesvlm.fingerprint import fingerprint_projections, fingerprints_match, tensor_digest

W = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
BIAS = torch.randn(5, generator=torch.Generator().manual_seed(1))
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("loaded", DTYPES)
def test_cast_weights_match(stored, loaded):
    source = W.to(stored)
    first = fingerprint_projections(source, BIAS.to(stored), source.T)
    cast = source.to(loaded)
    second = fingerprint_projections(cast, BIAS.to(stored).to(loaded), cast.T)
    assert fingerprints_match(first, second)
    assert fingerprints_match(second, first)


def test_precision_is_the_coarsest_that_is_exact():
    assert fingerprint_projections(W)["precision"] == "float32"
    assert fingerprint_projections(W.half().float())["precision"] == "float16"
    assert fingerprint_projections(W.bfloat16().float())["precision"] == "bfloat16"
    assert set(fingerprint_projections(W)) == {"precision", "float32", "float16", "bfloat16"}


@pytest.mark.parametrize(
    "other", [(W + 1e-2, BIAS), (W, BIAS + 1e-2), (W.T, BIAS), (BIAS, W), (W, None)]
)
def test_other_weights_do_not_match(other):
    assert not fingerprints_match(fingerprint_projections(W, BIAS), fingerprint_projections(*other))


def test_none_is_skipped():
    assert fingerprint_projections(W, None, BIAS) == fingerprint_projections(W, BIAS)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite(value):
    bad = W.clone()
    bad[0, 0] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        fingerprint_projections(bad)


@pytest.mark.parametrize("other", [{}, {"precision": "int8"}, {"precision": "float32"}])
def test_damaged_fingerprint_matches_nothing(other):
    assert not fingerprints_match(fingerprint_projections(W), other)
    assert not fingerprints_match(other, other)


def test_overflow_of_half_precision_is_no_error():
    large = torch.tensor([[1e6, 1.0]])
    first = fingerprint_projections(large)
    assert fingerprints_match(first, fingerprint_projections(large))
    assert not fingerprints_match(first, fingerprint_projections(large * 2))


def test_digest_sees_names_types_and_shapes():
    values = [
        {"a": W},
        {"b": W},
        {"a": W.reshape(7, 5)},
        {"a": W.view(torch.int32)},
        {"a": W, "b": BIAS},
    ]
    assert len({tensor_digest(value) for value in values}) == len(values)
    assert tensor_digest({"a": W.T}) == tensor_digest({"a": W.T.contiguous()})
    assert tensor_digest({"a": torch.zeros(0)}) != tensor_digest({"a": torch.zeros(())})

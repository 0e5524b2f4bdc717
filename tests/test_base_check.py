"""Whether a posterior belongs to a base."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from hf_bayesvlm import BayesVLMForZeroShot, PosteriorError


def model_called(name: str, seed: int = 0) -> BayesVLMForZeroShot:
    model = BayesVLMForZeroShot.from_vlm(tiny.tiny_vlm(seed=seed))
    model.config.vlm_config.name_or_path = name
    return model


def test_a_posterior_without_a_fingerprint_is_not_for_a_base_of_another_name() -> None:
    model = model_called("user/other")
    posterior = tiny.random_posterior(model, base_model="user/base")
    with pytest.raises(PosteriorError, match="user/base"):
        model.set_posterior(posterior)
    assert not model.is_fitted


def test_a_posterior_is_certified_only_where_something_says_that_it_belongs() -> None:
    named, unnamed = model_called("user/base"), model_called("")
    posterior = tiny.random_posterior(named, base_model="user/base")
    named.set_posterior(posterior)
    unnamed.set_posterior(posterior)
    assert named.posterior is not None
    assert named.posterior.fingerprint == named.base_fingerprint()
    assert unnamed.posterior is not None
    assert unnamed.posterior.fingerprint is None
    assert unnamed.posterior.base_model == "user/base"


def test_after_an_override_the_model_takes_its_own_posterior_again() -> None:
    base, other = model_called("user/base"), model_called("user/other", seed=1)
    base.set_posterior(tiny.random_posterior(base))
    foreign = base.posterior
    assert foreign is not None
    other.set_posterior(foreign, strict_base=False)
    own = other.posterior
    assert own is not None
    assert own.fingerprint == other.base_fingerprint()
    assert own.base_model == "user/other"
    assert own.provenance["estimated_for"]["base_model"] == "user/base"
    other.set_posterior(own.with_hyperparameters(pseudo_data_count=3.0))
    with pytest.raises(PosteriorError, match="other weights"):
        base.set_posterior(replace(own, base_model="user/base"))


def test_a_bundle_whose_projections_have_changed_says_so(tmp_path, caplog) -> None:  # type: ignore[no-untyped-def]
    model = model_called("user/base")
    model.set_posterior(tiny.random_posterior(model))
    model.save_pretrained(tmp_path / "same")
    BayesVLMForZeroShot.from_pretrained(tmp_path / "same")
    BayesVLMForZeroShot.from_pretrained(tmp_path / "same", dtype=torch.bfloat16)
    assert "have changed" not in caplog.text
    with torch.no_grad():
        model.image_projection.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "changed")
    BayesVLMForZeroShot.from_pretrained(tmp_path / "changed")
    assert "have changed" in caplog.text


def test_a_fitted_configuration_without_factors_gives_no_numbers() -> None:
    fitted = tiny.fitted()
    empty = BayesVLMForZeroShot(fitted.config)
    with pytest.raises(PosteriorError, match="no factors were loaded"):
        empty(**tiny.tiny_inputs("clip"))

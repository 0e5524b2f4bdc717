"""Checks of a posterior's config on its own; the files are tested in test_posterior.py."""

from __future__ import annotations

import copy

import pytest
import tiny

from hf_bayesvlm import PosteriorError
from hf_bayesvlm.posterior_files import check_config, library_versions

GOOD = tiny.fitted("clip").posterior.to_config()


def test_a_good_config_passes():
    check_config(GOOD)
    # Options have defaults.
    check_config({key: GOOD[key] for key in ("format_version", "likelihood", "image", "text")})


@pytest.mark.parametrize("config", [None, [], "x", 1, {}])
def test_not_a_config(config):
    with pytest.raises(PosteriorError, match=r"JSON object|format_version"):
        check_config(config)


@pytest.mark.parametrize("version", [0, -1, 1.0, True, None, "1"])
def test_bad_version(version):
    with pytest.raises(PosteriorError, match="format_version must be 1 or more"):
        check_config(GOOD | {"format_version": version})


@pytest.mark.parametrize("key", ["features", "in_features", "pseudo_data_count", "prior_precision"])
@pytest.mark.parametrize("value", [0, -1, "1", None, True, float("nan")])
def test_bad_number(key, value):
    config = copy.deepcopy(GOOD)
    config["text"][key] = value
    with pytest.raises(PosteriorError, match=f"text.{key} must be a positive"):
        check_config(config)


def test_versions_are_strings():
    assert all(isinstance(version, str) for version in library_versions().values())

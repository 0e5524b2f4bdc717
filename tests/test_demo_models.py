"""The demo's models: the operator's names, shared loading, second posteriors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny import fitted, save_bundle, tiny_vlm

from hf_bayesvlm.demo_hub import DemoError
from hf_bayesvlm.demo_models import (
    EMBEDDED_NAME,
    OWN_POSTERIOR,
    Hyperparameters,
    ModelStore,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    model = fitted()
    assert model.posterior is not None
    save_bundle(model, folder / "bundle")
    save_bundle(tiny_vlm(), folder / "plain")
    model.posterior.save_pretrained(folder / "posterior")
    fitted(seed=5).posterior.save_pretrained(folder / "stranger")  # type: ignore[union-attr]
    return folder


def store(folder: Path, **options: bool) -> ModelStore:
    return ModelStore(
        {"mine": folder / "bundle", "bare": folder / "plain"},
        {"extra": folder / "posterior", "stranger": folder / "stranger"},
        **options,  # type: ignore[arg-type]
    )


def test_the_first_model_is_the_default(folder: Path) -> None:
    mine = store(folder)
    assert mine.load() is mine.load("mine") is mine.load(" mine ")
    assert ModelStore().default_model == EMBEDDED_NAME
    with pytest.raises(ValueError, match="empty"):
        ModelStore({})


def test_paths_of_the_server_are_no_names(folder: Path) -> None:
    for name in (str(folder / "bundle"), "bundle", "../bundle"):
        with pytest.raises(DemoError, match="not a Hub id"):
            store(folder).load(name)
        mine = store(folder)
        with pytest.raises(DemoError, match="not a Hub id"):
            mine.variants(mine.load(), name)


def test_an_operator_can_close_the_list(folder: Path) -> None:
    closed = store(folder, allow_hub=False)
    with pytest.raises(DemoError, match="choose one from the list"):
        closed.load("openai/clip-vit-base-patch32")
    with pytest.raises(DemoError, match="choose one from the list"):
        closed.variants(closed.load(), "me/posterior")
    assert len(closed.variants(closed.load(), "extra")) == 2


def test_many_visitors_load_a_model_once(folder: Path) -> None:
    mine = store(folder)
    with ThreadPoolExecutor(8) as pool:
        loaded = set(pool.map(lambda name: mine.load(name), ["mine", "bare"] * 8))
        variants = list(pool.map(lambda _: mine.variants(mine.load("bare"), "extra"), range(8)))
    assert len(loaded) == 2
    assert len({id(bayes.model) for _, bayes in variants}) == 1


def test_variants_share_the_base_and_differ_in_the_posterior(folder: Path) -> None:
    mine = store(folder)
    loaded = mine.load()
    changes = Hyperparameters(pseudo_data_count=7.0, covariance="full", modalities="image")
    plain, bayes, second = mine.variants(loaded, OWN_POSTERIOR, (None, changes))
    assert plain.model.vlm is bayes.model.vlm is second.model.vlm
    assert (plain.model.is_fitted, bayes.model.is_fitted) == (False, True)
    posterior = second.model.posterior
    assert posterior is not None
    assert (posterior.covariance, posterior.image.pseudo_data_count) == ("full", 7.0)
    assert "image tower, full" in second.detail
    assert "× 7" in second.detail
    assert loaded.pipe.bayes_model.posterior.covariance == "diagonal"  # type: ignore[union-attr]
    assert mine.variants(loaded, None, (None, changes))[2].model is second.model
    named = mine.variants(loaded, "extra")[1].model
    assert torch.equal(named.posterior.image.A, bayes.model.posterior.image.A)  # type: ignore[union-attr]


def test_a_model_without_posterior_says_so(folder: Path) -> None:
    mine = store(folder)
    bare = mine.load("bare")
    _, bayes = mine.variants(bare)
    assert bayes.detail == "no posterior: the same as plain"
    with pytest.raises(DemoError, match="no posterior of its own"):
        mine.variants(bare, None, (None, Hyperparameters(pseudo_data_count=2.0)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"pseudo_data_count": 0.0}, "count"), ({"pseudo_data_count": float("nan")}, "count"),
     ({"pseudo_data_count": 1e9}, "count"), ({"covariance": "round"}, "ovariance"),
     ({"damping": "x"}, "amping"), ({"modalities": "x"}, "odalities"), ({"objective": "x"}, "bjective")],
)  # fmt: skip
def test_impossible_hyperparameters_are_refused(folder: Path, changes: dict, words: str) -> None:
    mine = store(folder)
    with pytest.raises(DemoError, match=words):
        mine.variants(mine.load(), None, (None, Hyperparameters(**changes)))


def test_a_posterior_of_other_weights_is_refused(folder: Path) -> None:
    mine = store(folder)
    with pytest.raises(DemoError, match="weights"):
        mine.variants(mine.load(), "stranger")

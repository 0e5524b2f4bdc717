"""Posteriors: immutable, saved and loaded, damaged files refused, the published factors imported."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from hf_bayesvlm import BayesVLMPosterior, ModalityPosterior, PosteriorError
from hf_bayesvlm.laplace import optimize_prior_precision

WEIGHTS, CONFIG = "posterior.safetensors", "posterior_config.json"
# Chosen by the reference objective at these pseudo-data counts (DESIGN 1).
PUBLISHED = {
    ("image", 1.0): 1708.945,
    ("image", 10.0): 2997.9,
    ("text", 1.0): 1255.33,
    ("text", 10.0): 2538.1,
}
PUBLISHED_NORMS = {"image": 63.658, "text": 42.14}


@pytest.fixture
def posterior() -> BayesVLMPosterior:
    return tiny.fitted("clip", dataset="toy", num_pairs=12, provenance={"note": "a test"}).posterior


@pytest.fixture
def folder(posterior, tmp_path) -> Path:
    posterior.save_pretrained(tmp_path / "posterior")
    return tmp_path / "posterior"


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        if value is ...:
            del place[key]
        else:
            place[key] = value
    (folder / CONFIG).write_text(json.dumps(config))


# ---------------------------------------------------------------------------- values


def test_is_frozen(posterior):
    for thing, name in ((posterior, "covariance"), (posterior.image, "prior_precision")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, 1)


def test_is_hashable_comparable_and_short_to_print(posterior):
    assert posterior == posterior
    assert posterior != dataclasses.replace(posterior)
    assert len({posterior, posterior}) == 1
    assert "tensor(" not in repr(posterior)


def test_with_hyperparameters_leaves_the_original(posterior):
    before = posterior.to_config()
    other = posterior.with_hyperparameters(
        image_pseudo_data_count=5,
        text_pseudo_data_count=6,
        image_prior_precision=7,
        text_prior_precision=8,
        covariance="full",
        damping="exact",
        modalities="image",
    )
    assert posterior.to_config() == before
    assert (other.image.pseudo_data_count, other.text.pseudo_data_count) == (5.0, 6.0)
    assert (other.image.prior_precision, other.text.prior_precision) == (7.0, 8.0)
    assert (other.covariance, other.damping, other.modalities) == ("full", "exact", "image")
    assert other.objective == "manual"
    assert other.image.A is posterior.image.A
    assert other.fingerprint == posterior.fingerprint


def test_both_modalities_at_once_and_one_wins(posterior):
    other = posterior.with_hyperparameters(
        pseudo_data_count=3, prior_precision=4, text_pseudo_data_count=9, image_prior_precision=2
    )
    assert (other.image.pseudo_data_count, other.text.pseudo_data_count) == (3.0, 9.0)
    assert (other.image.prior_precision, other.text.prior_precision) == (2.0, 4.0)


def test_nothing_changed_is_the_same(posterior):
    assert posterior.with_hyperparameters().to_config() == posterior.to_config()
    # A pseudo-data count alone keeps prior precision and objective.
    other = posterior.with_hyperparameters(pseudo_data_count=4)
    assert other.image.prior_precision == posterior.image.prior_precision
    assert other.objective == posterior.objective


@pytest.mark.parametrize(
    ("objective", "damping"), [("reference", None), ("evidence", None), ("evidence", "exact")]
)
def test_objective_chooses_the_prior_precision_again(posterior, objective, damping):
    other = posterior.with_hyperparameters(
        objective=objective, damping=damping, image_pseudo_data_count=5.0
    )
    for part in (other.image, other.text):
        assert part.prior_precision == optimize_prior_precision(
            part.A,
            part.B,
            part.weight_norm_squared,
            part.pseudo_data_count,
            objective,
            damping=damping or "factored",
        )
    assert other.objective == objective
    # A precision that is given is kept.
    given = posterior.with_hyperparameters(objective="evidence", text_prior_precision=11.0)
    assert given.text.prior_precision == 11.0
    assert given.image.prior_precision != posterior.image.prior_precision


def test_objective_needs_the_norm_of_the_weights(posterior):
    part = dataclasses.replace(posterior.image, weight_norm_squared=None)
    with pytest.raises(PosteriorError, match="norm of the base's projection is not known"):
        dataclasses.replace(posterior, image=part).with_hyperparameters(objective="evidence")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pseudo_data_count": 0}, "pseudo_data_count must be positive"),
        ({"image_prior_precision": -1.0}, "image.prior_precision must be positive"),
        ({"text_prior_precision": float("nan")}, "text.prior_precision must be positive"),
        ({"prior_precision": "1"}, "prior_precision must be a number"),
        ({"covariance": "half"}, "covariance must be one of diagonal, full"),
        ({"damping": "none"}, "damping must be one of"),
        ({"modalities": "audio"}, "modalities must be one of"),
        ({"objective": "best"}, "objective must be one of"),
        ({"objective": "reference", "damping": "exact"}, "factored damping only"),
    ],
)
def test_impossible_hyperparameters(posterior, options, message):
    with pytest.raises(PosteriorError, match=message):
        posterior.with_hyperparameters(**options)


@pytest.mark.parametrize("letter", ["A", "B"])
@pytest.mark.parametrize("damage", ["nan", "asymmetric", "not square"])
def test_impossible_factors(posterior, letter, damage):
    matrix = getattr(posterior.text, letter).clone()
    if damage == "nan":
        matrix[0, 0] = torch.nan
    elif damage == "asymmetric":
        matrix[0, 1] += 100.0
    else:
        matrix = matrix[:, :-1]
    with pytest.raises(PosteriorError, match=rf"text\.{letter}"):
        dataclasses.replace(posterior, text=dataclasses.replace(posterior.text, **{letter: matrix}))


def test_two_embedding_sizes(posterior):
    other = ModalityPosterior(posterior.text.A, torch.eye(3), 1.0, 1.0)
    with pytest.raises(PosteriorError, match="embed into one space"):
        dataclasses.replace(posterior, text=other)


def test_to_a_device(posterior):
    assert posterior.to("cpu").image.A.device.type == "cpu"


# ---------------------------------------------------------------------------- files


def test_round_trip(posterior, folder):
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, CONFIG}
    loaded = BayesVLMPosterior.from_pretrained(folder)
    for name, factor in posterior.factors().items():
        assert torch.equal(loaded.factors()[name], factor)
    assert loaded.to_config() == posterior.to_config()
    config = json.loads((folder / CONFIG).read_text())
    assert config["format_version"] == 1
    assert config["likelihood"] == "softmax"
    assert config["dataset"] == "toy"
    assert set(config["library_versions"]) >= {"torch", "transformers", "hf_bayesvlm"}
    assert set(load_file(folder / WEIGHTS)) == {"image.A", "image.B", "text.A", "text.B"}


def test_unknown_keys_are_kept(folder, tmp_path):
    edit(folder, from_the_future={"a": 1})
    loaded = BayesVLMPosterior.from_pretrained(folder)
    assert loaded.extra["from_the_future"] == {"a": 1}
    loaded.save_pretrained(tmp_path / "again")
    again = BayesVLMPosterior.from_pretrained(tmp_path / "again")
    assert again.extra["from_the_future"] == {"a": 1}


def test_subfolder(folder):
    loaded = BayesVLMPosterior.from_pretrained(folder.parent, subfolder="posterior")
    assert loaded.num_pairs == 12


def test_save_over_a_file(posterior, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PosteriorError, match="is a file"):
        posterior.save_pretrained(tmp_path / "file")


def test_half_precision_factors_are_saved_as_float32(posterior, tmp_path):
    part = dataclasses.replace(posterior.image, A=posterior.image.A.double())
    dataclasses.replace(posterior, image=part).save_pretrained(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}


@pytest.mark.parametrize("keep", [0, 4, 100, 2000])
def test_truncated_factors(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(PosteriorError, match="truncated or not a safetensors file"):
        BayesVLMPosterior.from_pretrained(folder)


def test_tampered_factors(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["image.A"][0, 0] += 1e-3
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(PosteriorError, match="one of the files was changed"):
        BayesVLMPosterior.from_pretrained(folder)


@pytest.mark.parametrize("damage", ["nan", "asymmetric", "missing", "shape", "integer"])
def test_damaged_factors_without_a_checksum(folder, damage):
    edit(folder, factors_sha256=...)
    tensors = load_file(folder / WEIGHTS)
    if damage == "nan":
        tensors["text.B"][0, 0] = torch.nan
    elif damage == "asymmetric":
        tensors["text.B"][0, 1] += 100.0
    elif damage == "shape":
        tensors["text.B"] = torch.eye(5)
    elif damage == "integer":
        tensors["text.B"] = tensors["text.B"].to(torch.int32)
    else:
        del tensors["text.B"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(PosteriorError):
        BayesVLMPosterior.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "upgrade with `pip install -U hf_bayesvlm`"),
        ({"format_version": "1"}, "format_version must be"),
        ({"format_version": ...}, "format_version must be"),
        ({"likelihood": ...}, "likelihood is missing"),
        ({"likelihood": "poisson"}, "likelihood is 'poisson'"),
        ({"image": ...}, "section 'image' is missing"),
        ({"image": 3}, "section 'image' is missing"),
        ({"text__prior_precision": -1}, "text.prior_precision must be a positive"),
        ({"text__prior_precision": None}, "text.prior_precision must be a positive"),
        ({"text__pseudo_data_count": True}, "text.pseudo_data_count must be a positive"),
        ({"image__in_features": 7}, "the config states a projection of"),
        ({"image__in_features": 32.5}, "must be a positive whole number"),
        ({"image__weight_norm_squared": "big"}, "weight_norm_squared"),
        ({"covariance": "round"}, "covariance is 'round'"),
        ({"fingerprint": "abc"}, "fingerprint"),
        ({"provenance": [1]}, "provenance"),
    ],
)
def test_damaged_config(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(PosteriorError, match=message):
        BayesVLMPosterior.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '"posterior"', "null"])
def test_config_that_is_not_an_object(folder, text):
    (folder / CONFIG).write_text(text)
    with pytest.raises(PosteriorError, match=r"not valid JSON|JSON object"):
        BayesVLMPosterior.from_pretrained(folder)


def test_nan_in_the_config(folder):
    edit(folder, image__prior_precision=float("nan"))
    with pytest.raises(PosteriorError, match="prior_precision"):
        BayesVLMPosterior.from_pretrained(folder)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        BayesVLMPosterior.from_pretrained(folder)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nothing", "a/b/c", "nothing", ""])
def test_missing_folder(path):
    with pytest.raises(FileNotFoundError, match="not a Hub id"):
        BayesVLMPosterior.from_pretrained(path)


def test_hub_id_that_is_not_cached():
    with pytest.raises(FileNotFoundError, match="no-such-user/nothing"):
        BayesVLMPosterior.from_pretrained("no-such-user/nothing", local_files_only=True)


# ---------------------------------------------------------------------------- published factors


def test_published_factors(reference_dir):
    posterior = BayesVLMPosterior.from_reference(reference_dir, base_model="laion/a-clip")
    assert posterior.likelihood == "softmax"
    assert posterior.base_model == "laion/a-clip"
    assert posterior.image.shape == (512, 768)
    assert posterior.text.shape == (512, 512)
    assert posterior.fingerprint is None
    assert posterior.covariance == "diagonal"
    scalars = json.loads((reference_dir / "prior_precision_analytic.json").read_text())
    assert posterior.image.prior_precision == scalars["lambda_img"]
    assert posterior.text.pseudo_data_count == scalars["n_txt"]


def test_published_prior_precisions_are_chosen_again(reference_dir):
    posterior = BayesVLMPosterior.from_reference(reference_dir)
    image, text = (
        dataclasses.replace(getattr(posterior, name), weight_norm_squared=norm)
        for name, norm in PUBLISHED_NORMS.items()
    )
    posterior = dataclasses.replace(posterior, image=image, text=text)
    for count in (1.0, 10.0):
        other = posterior.with_hyperparameters(pseudo_data_count=count, objective="reference")
        assert other.image.prior_precision == pytest.approx(PUBLISHED["image", count], rel=2e-5)
        assert other.text.prior_precision == pytest.approx(PUBLISHED["text", count], rel=5e-4)


def test_published_factors_with_hyperparameters_round_trip(reference_dir, tmp_path):
    posterior = BayesVLMPosterior.from_reference(
        reference_dir, pseudo_data_count=10, covariance="full", likelihood="softmax"
    )
    assert posterior.image.pseudo_data_count == 10.0
    posterior.save_pretrained(tmp_path)
    loaded = BayesVLMPosterior.from_pretrained(tmp_path)
    assert torch.equal(loaded.text.B, posterior.text.B)
    assert loaded.covariance == "full"


def small_reference(folder: Path) -> Path:
    for letter in "AB":
        for name in ("img", "txt"):
            torch.save(torch.eye(4), folder / f"{letter}_{name}_analytic.pt")
    scalars = {"lambda_img": 2.0, "n_img": 1.0, "lambda_txt": 3.0, "n_txt": 1.0}
    (folder / "prior_precision_analytic.json").write_text(json.dumps(scalars))
    return folder


def test_reference_of_a_siglip(tmp_path):
    small_reference(tmp_path)
    assert BayesVLMPosterior.from_reference(tmp_path, "google/SigLIP-base").likelihood == "sigmoid"
    assert BayesVLMPosterior.from_reference(tmp_path, likelihood="sigmoid").likelihood == "sigmoid"


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_malicious_pickle_is_not_executed(how, tmp_path):
    small_reference(tmp_path)
    marker, file = tmp_path / "executed", tmp_path / "B_txt_analytic.pt"
    if how == "torch":
        torch.save(Payload(marker), file)
    else:
        file.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(PosteriorError, match=r"B_txt_analytic\.pt"):
        BayesVLMPosterior.from_reference(tmp_path)
    assert not marker.exists()
    # The payload would have worked.
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.eye(4)},
        [1, 2],
        torch.eye(4, dtype=torch.int64),
        torch.full((4, 4), torch.nan),
        torch.ones(4),
        torch.arange(16.0).reshape(4, 4),
        -torch.eye(4),
    ],
    ids=["dict", "list", "integers", "nan", "vector", "asymmetric", "negative"],
)
def test_reference_that_is_not_a_factor(content, tmp_path):
    small_reference(tmp_path)
    torch.save(content, tmp_path / "A_img_analytic.pt")
    with pytest.raises(PosteriorError, match=r"A_img_analytic\.pt"):
        BayesVLMPosterior.from_reference(tmp_path)


def test_reference_truncated(tmp_path):
    small_reference(tmp_path)
    file = tmp_path / "A_img_analytic.pt"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(PosteriorError, match="not a plain tensor file"):
        BayesVLMPosterior.from_reference(tmp_path)


def test_reference_with_code_in_it_is_refused_and_not_run(tmp_path):
    small_reference(tmp_path)
    witness = tmp_path / "witness"

    class Malicious:
        def __reduce__(self):
            return Path.touch, (witness,)

    file = tmp_path / "B_txt_analytic.pt"
    for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))):
        save(Malicious(), file)
        with pytest.raises(PosteriorError, match="could run code") as caught:
            BayesVLMPosterior.from_reference(tmp_path)
        assert "weights_only" not in str(caught.value)
        assert not witness.exists()


@pytest.mark.parametrize("content", [torch.eye(4).to_sparse(), torch.empty(4, 4, device="meta")])
def test_reference_without_values(content, tmp_path):
    small_reference(tmp_path)
    torch.save(content, tmp_path / "A_img_analytic.pt")
    with pytest.raises(PosteriorError, match=r"A_img_analytic\.pt"):
        BayesVLMPosterior.from_reference(tmp_path)


@pytest.mark.parametrize("name", ["A_txt_analytic.pt", "prior_precision_analytic.json"])
def test_reference_file_missing(name, tmp_path):
    (small_reference(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        BayesVLMPosterior.from_reference(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"lambda_img": "x"}'])
def test_reference_scalars_damaged(text, tmp_path):
    small_reference(tmp_path)
    (tmp_path / "prior_precision_analytic.json").write_text(text)
    with pytest.raises(PosteriorError, match="lacks lambda_img"):
        BayesVLMPosterior.from_reference(tmp_path)


def test_reference_folder_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder of published factors"):
        BayesVLMPosterior.from_reference(tmp_path / "nothing")
    shutil.rmtree(tmp_path)

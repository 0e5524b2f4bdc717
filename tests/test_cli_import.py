"""`bayesvlm import-reference`: published files in, a posterior of ours out."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import fitted, save_bundle, tiny_vlm
from typer.testing import CliRunner

from hf_bayesvlm import BayesVLMForZeroShot, BayesVLMPosterior
from hf_bayesvlm.cli import app
from hf_bayesvlm.laplace import optimize_prior_precision

BASE = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
runner = CliRunner()


def run(*arguments: Any) -> Any:
    """Run the command in this process."""
    return runner.invoke(app, ["import-reference", *map(str, arguments)], catch_exceptions=False)


def publish(folder: Path, family: str = "clip", *, norm_factor: float = 1.0) -> Path:
    """Factors of a tiny model in the authors' files, prior precisions by their objective."""
    model = fitted(family)
    scalars: dict[str, float] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, short in (("image", "img"), ("text", "txt")):
        part = getattr(model.posterior, name)
        for letter in "AB":
            torch.save(getattr(part, letter), folder / f"{letter}_{short}_analytic.pt")
        norm = part.weight_norm_squared * norm_factor
        scalars[f"lambda_{short}"] = optimize_prior_precision(part.A, part.B, norm, 1.0)
        scalars[f"n_{short}"] = 1.0
    (folder / "prior_precision_analytic.json").write_text(json.dumps(scalars))
    return folder


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_factors_come_through_certified_by_the_base(family, tmp_path):
    publish(tmp_path / "published", family)
    base = save_bundle(tiny_vlm(family), tmp_path / "base", family)
    done = run(tmp_path / "published", "--base-model", base, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "norms of the base model" in done.stdout
    assert "warning" not in done.stderr
    posterior = BayesVLMPosterior.from_pretrained(tmp_path / "out")
    model = BayesVLMForZeroShot.from_pretrained(base)
    assert posterior.likelihood == model.likelihood
    assert posterior.fingerprint == model.base_fingerprint()
    assert str(tmp_path) not in json.dumps(posterior.to_config())
    scalars = json.loads((tmp_path / "published" / "prior_precision_analytic.json").read_text())
    assert posterior.text.prior_precision == scalars["lambda_txt"]
    for name, weight in model.projection_weights().items():
        part = getattr(posterior, name)
        assert part.shape == tuple(weight.shape)
        assert part.weight_norm_squared == pytest.approx(weight.double().square().sum().item())
        assert torch.equal(part.A, getattr(fitted(family).posterior, name).A)
    model.set_posterior(posterior)


@pytest.mark.parametrize("objective", ["reference", "evidence"])
def test_prior_precisions_chosen_again_with_and_without_the_base(objective, tmp_path):
    publish(tmp_path / "published")
    base = save_bundle(tiny_vlm(), tmp_path / "base")
    expected = fitted().posterior.with_hyperparameters(pseudo_data_count=7.0, objective=objective)
    options = ["--objective", objective, "--pseudo-data-count", "7", "--base-model", base]
    norms = [getattr(expected, name).weight_norm_squared for name in ("image", "text")]
    given = ["--image-weight-norm", norms[0], "--text-weight-norm", norms[1]]
    for i, more in enumerate(([], ["--no-check-base"], ["--no-check-base", *given])):
        done = run(tmp_path / "published", *options, *more, "--out", tmp_path / str(i))
        assert done.exit_code == 0, done.output
        posterior = BayesVLMPosterior.from_pretrained(tmp_path / str(i))
        assert posterior.objective == objective
        for name in ("image", "text"):
            part = getattr(posterior, name)
            assert part.pseudo_data_count == 7.0
            assert part.prior_precision == pytest.approx(
                getattr(expected, name).prior_precision, rel=1e-9
            )


def test_a_count_without_an_objective_keeps_the_precision_and_says_so(tmp_path):
    publish(tmp_path / "published")
    done = run(
        tmp_path / "published", "--base-model", BASE, "--no-check-base",
        "--pseudo-data-count", "10", "--out", tmp_path / "out",
    )  # fmt: skip
    assert "--objective chooses them for this one" in done.stderr
    posterior = BayesVLMPosterior.from_pretrained(tmp_path / "out")
    assert posterior.base_model == BASE
    assert posterior.fingerprint is None
    assert posterior.image.pseudo_data_count == 10.0


def test_factors_of_another_model_are_pointed_out(tmp_path):
    publish(tmp_path / "published", norm_factor=1.2)
    base = save_bundle(tiny_vlm(), tmp_path / "base")
    done = run(tmp_path / "published", "--base-model", base, "--out", tmp_path / "out")
    assert done.exit_code == 0
    assert "these may be the factors of another model" in done.stderr


def test_factors_of_other_shapes_and_likelihoods_are_refused(tmp_path):
    publish(tmp_path / "published")
    base = save_bundle(tiny_vlm("siglip"), tmp_path / "base", "siglip")
    done = run(tmp_path / "published", "--base-model", base, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "is for a projection of shape" in done.stderr
    done = run(
        tmp_path / "published", "--base-model", base, "--likelihood", "softmax", "--out", tmp_path
    )
    assert "is for a softmax likelihood" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say where the posterior goes"),
        (["--out", "x", "--likelihood", "probit"], "--likelihood must be"),
        (["--out", "x", "--objective", "best"], "--objective must be"),
        (["--out", "x", "--image-weight-norm", "3"], "give both"),
        (
            ["--out", "x", "--image-weight-norm", "3", "--text-weight-norm", "-1"],
            "--text-weight-norm must be positive",
        ),
        (["--out", "x", "--pseudo-data-count", "-1", "--no-check-base"], "must be positive"),
        (["--out", "x"], "Pass --no-check-base"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish(tmp_path / "published")
    done = run(tmp_path / "published", "--base-model", tmp_path / "missing", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_an_objective_that_nothing_gives_the_norms_for(tmp_path):
    folder = publish(tmp_path / "published")
    for short in ("img", "txt"):
        for letter in "AB":
            factor = torch.load(folder / f"{letter}_{short}_analytic.pt", weights_only=True)
            low = torch.zeros_like(factor)
            low[0, 0] = 1e-3
            torch.save(low, folder / f"{letter}_{short}_analytic.pt")
    done = run(
        folder,
        "--base-model",
        BASE,
        "--no-check-base",
        "--objective",
        "evidence",
        "--out",
        tmp_path,
    )
    assert done.exit_code == 2
    assert "--image-weight-norm" in done.stderr


# ---------------------------------------------------------------------------- damaged files


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def saved(content: Any) -> Any:
    return lambda file: torch.save(content, file)


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        lambda file: file.write_bytes(b""),
        lambda file: file.unlink(),
        saved(torch.full((24, 24), torch.nan)),
        saved(torch.arange(576.0).reshape(24, 24)),
        saved(torch.eye(24)[:, :20]),
        saved(torch.eye(20)),
        saved(-torch.eye(24)),
        saved({"B": torch.eye(24)}),
        saved(torch.eye(24, dtype=torch.int64)),
    ],
    ids=["truncated", "empty", "missing", "nan", "asymmetric", "oblong", "other size", "negative",
         "dictionary", "integers"],
)  # fmt: skip
def test_damaged_files_are_refused(damage, tmp_path):
    folder = publish(tmp_path / "published")
    damage(folder / "B_img_analytic.pt")
    done = run(folder, "--base-model", BASE, "--no-check-base", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert re.search("B_img_analytic|image.B", done.stderr)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(plain_pickle, tmp_path):
    folder, witness = publish(tmp_path / "published"), tmp_path / "witness"
    file = folder / "A_txt_analytic.pt"
    if plain_pickle:
        file.write_bytes(pickle.dumps(Malicious(witness), 2))
    else:
        torch.save(Malicious(witness), file)
    done = run(folder, "--base-model", BASE, "--no-check-base", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "could run code" in done.stderr
    assert not witness.exists()
    assert not (tmp_path / "out").exists()
    # The file is what it is taken for: whoever does run it sees the witness.
    if plain_pickle:
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert witness.exists()


# ---------------------------------------------------------------------------- the published files


@pytest.mark.parametrize(
    ("count", "image", "text", "tolerance"),
    [
        (None, 1708.945, 1255.33, 1e-5),
        # Published with fewer digits, and by gradient steps: half a unit, and a little for those.
        (10, 2997.9, 2538.1, 5e-4),
    ],
)
def test_published_numbers_come_out_offline(count, image, text, tolerance, reference_dir, tmp_path):
    options = [] if count is None else ["--pseudo-data-count", count, "--objective", "reference"]
    done = run(
        reference_dir, "--base-model", BASE, "--no-check-base", "--out", tmp_path / "out", *options
    )
    assert done.exit_code == 0, done.output
    assert "768 x 768" in done.stdout
    assert "63.6577" in done.stdout
    posterior = BayesVLMPosterior.from_pretrained(tmp_path / "out")
    assert posterior.image.prior_precision == pytest.approx(image, rel=tolerance)
    assert posterior.text.prior_precision == pytest.approx(text, rel=tolerance)
    assert posterior.image.weight_norm_squared == pytest.approx(63.658, abs=1e-3)
    assert posterior.text.weight_norm_squared == pytest.approx(42.14, abs=1e-2)

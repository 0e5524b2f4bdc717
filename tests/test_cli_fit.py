"""`bayesvlm fit`, as a user types it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from test_estimation import pairs
from tiny import save_bundle, tiny_vlm
from transformers import AutoProcessor
from typer.testing import CliRunner

from hf_bayesvlm import EMBEDDED_MODEL, BayesVLMForZeroShot, BayesVLMPosterior, estimate_posterior
from hf_bayesvlm.cli import app

ROOT = Path(__file__).resolve().parents[1]
FILES = {"posterior.safetensors", "posterior_config.json"}
runner = CliRunner()


@pytest.fixture(autouse=True)
def _cache_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_bundle(tiny_vlm(), tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A table of paths beside its images."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "pairs.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image_path", "caption"])
        for i, row in enumerate(pairs(12)):
            row["image"].save(folder / f"{i}.png")
            writer.writerow([f"{i}.png", row["text"]])
    return str(folder / "pairs.csv")


@pytest.fixture(scope="module")
def bad_data(data: str) -> str:
    """The same with two rows that are no pairs."""
    bad = Path(data).with_name("bad.csv")
    (bad.parent / "broken.png").write_bytes(b"junk")
    bad.write_text(Path(data).read_text() + "broken.png,a cat\nmissing.png,a dog\n")
    return str(bad)


def run(*arguments: str | Path) -> Any:
    """Run the command in this process."""
    command = ["fit", *map(str, arguments), "--device", "cpu"]
    return runner.invoke(app, command, catch_exceptions=False)


def run_process(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", **environment},
        check=False,
        timeout=300,
    )


def refused(done: Any, message: str) -> None:
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def same(one: BayesVLMPosterior, other: BayesVLMPosterior) -> None:
    for name in ("image", "text"):
        first, second = getattr(one, name), getattr(other, name)
        assert torch.equal(first.A, second.A)
        assert torch.equal(first.B, second.B)
        assert first.prior_precision == second.prior_precision


def test_both_files_and_a_summary(model: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "posterior"
    done = run(model, data, "--out", out, "--contrast-size", "5")
    assert done.exit_code == 0, done.stderr
    assert {path.name for path in out.iterdir()} >= FILES
    assert f"wrote {out}" in done.stderr.replace("\n", "")
    summary = " ".join(done.stdout.split())
    for part in ("12 in 3 blocks of 5", "0 of 12 rows", "24 x 32, prior precision", "factored"):
        assert part in summary
    config = json.loads((out / "posterior_config.json").read_text())
    assert config["dataset"] == "pairs.csv"
    assert config["num_pairs"] == 12


@pytest.mark.parametrize("source", ["tiny", "embedded"])
def test_the_numbers_are_those_of_the_function(
    source: str, model: str, data: str, tmp_path: Path
) -> None:
    name = model if source == "tiny" else EMBEDDED_MODEL
    options = ["--contrast-size", "6", "--pseudo-data-count", "4", "--modalities", "image"]
    done = run(name, data, "--out", tmp_path, *options, "--damping", "exact", "--seed", "3")
    assert done.exit_code == 0, done.stderr
    expected = estimate_posterior(
        BayesVLMForZeroShot.from_vlm(name),
        AutoProcessor.from_pretrained(name),
        pairs(12),
        contrast_size=6,
        pseudo_data_count=4.0,
        modalities="image",
        damping="exact",
        seed=3,
        progress=False,
    )
    found = BayesVLMPosterior.from_pretrained(tmp_path)
    same(found, expected)
    for setting in ("modalities", "damping", "objective", "covariance", "contrast_size"):
        assert getattr(found, setting) == getattr(expected, setting)
    assert found.image.pseudo_data_count == 4.0
    assert found.fingerprint == expected.fingerprint


def test_the_posterior_can_be_used(model: str, data: str, tmp_path: Path) -> None:
    assert run(model, data, "--out", tmp_path).exit_code == 0
    image = str(Path(data).with_name("0.png"))
    command = ["classify", image, "--model", model, "--posterior", str(tmp_path)]
    done = runner.invoke(app, [*command, "--labels", "cat,dog", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)[0]["predictions"][0]["logit_std"] > 0


def test_several_captions(model: str, tmp_path: Path) -> None:
    rows = [row | {"text": [f"{row['text']} {j}" for j in range(3)]} for row in pairs(6)]
    features = Features({"image": ImageFeature(), "text": List(Value("string"))})
    Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "data"))
    for mode, count in (("sample", 6), ("expand", 18)):
        out = tmp_path / mode
        done = run(model, tmp_path / "data", "--out", out, "--captions", mode)
        assert done.exit_code == 0, done.stderr
        assert BayesVLMPosterior.from_pretrained(out).num_pairs == count


def test_streaming_gives_the_same(model: str, data: str, tmp_path: Path) -> None:
    for name in ("whole", "stream"):
        more = ["--streaming"] if name == "stream" else ["--num-workers", "0"]
        done = run(model, data, "--out", tmp_path / name, *more, "--max-pairs", "9")
        assert done.exit_code == 0, done.stderr
    whole, stream = (BayesVLMPosterior.from_pretrained(tmp_path / n) for n in ("whole", "stream"))
    same(whole, stream)
    assert whole.num_pairs == 9


# Where it is written to


def test_a_posterior_is_replaced_when_asked_only(model: str, data: str, tmp_path: Path) -> None:
    assert run(model, data, "--out", tmp_path).exit_code == 0
    before = (tmp_path / "posterior_config.json").read_bytes()
    refused(run(model, data, "--out", tmp_path), "give --overwrite to replace it")
    assert (tmp_path / "posterior_config.json").read_bytes() == before
    assert run(model, data, "--out", tmp_path, "--overwrite", "--max-pairs", "6").exit_code == 0
    assert BayesVLMPosterior.from_pretrained(tmp_path).num_pairs == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --out FOLDER, --push USER/NAME, or both"),
        (["--push", "name"], "not a Hub id of the form user/name"),
        (["--push", "./user/name"], "not a Hub id"),
        (["--out", "{file}"], "is a file; give a folder"),
        (["--out", "{file}/inside"], "inside"),
    ],
)
def test_targets_are_refused_before_any_work(
    options: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    options = [option.format(file=tmp_path / "file") for option in options]
    # Neither the model nor the data set exists, which would be the error otherwise.
    refused(run("no/model/here", "no/data/here", *options), message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused(run("no/model/here", "no/data/here", "--out", tmp_path), "cannot be written to")


# What is wrong with the input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "missing.csv"], "no file 'missing.csv'"),
        (["{model}", "./missing"], "no data set './missing'"),
        (["{model}", "{data}", "--split", "test"], "no split 'test'"),
        (["{model}", "{data}", "--config", "en"], "no configuration"),
        (["{model}", "{data}", "--dataset-revision", "v1"], "no revision"),
        (["{model}", "{data}", "--image-column", "img"], "no column 'img'; it has image_path"),
        (["{model}", "{data}", "--image-root", "/missing"], "row 0: no image file '/missing/0.png'"),
        (["{model}", "{bad}"], "row 12: "),
        (["./missing", "{data}"], "missing"),
        (["{data}", "{data}"], "pairs.csv"),
        (["{model}", "{data}", "--objective", "reference", "--damping", "exact"], "use objective="),
        (["{model}", "{data}", "--pseudo-data-count", "0"], "pseudo_data_count"),
        (["{model}", "{data}", "--objective", "reference", "--max-pairs", "3"], "no maximum"),
    ],
)  # fmt: skip
def test_errors_have_no_traceback(
    arguments: list[str], message: str, model: str, data: str, bad_data: str, tmp_path: Path
) -> None:
    arguments = [a.format(model=model, data=data, bad=bad_data) for a in arguments]
    refused(run(*arguments, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_devices_that_are_not_there(device: str, model: str, data: str, tmp_path: Path) -> None:
    command = ["fit", model, data, "--out", str(tmp_path), "--device", device]
    refused(runner.invoke(app, command), f"--device {device} cannot be used")


def test_texts_alone(model: str, tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("caption,label\na cat,0\na dog,1\n")
    source, out = tmp_path / "texts.csv", tmp_path / "out"
    refused(run(model, source, "--out", out), "which column holds the images?")
    named = run(model, source, "--out", out, "--image-column", "image")
    refused(named, "It holds texts and no images: a posterior needs image-text pairs")


def test_a_stream_of_a_damaged_archive(model: str, data: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as target:
        for i in range(9):
            text = tmp_path / f"{i}.txt"
            text.write_text(f"a cat {i}")
            target.add(Path(data).with_name(f"{i}.png"), f"{i}.png")
            target.add(text, f"{i}.txt")
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2 + 700])
    done = run(model, tmp_path / "a.tar", "--streaming", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "error:" in done.stderr


# Bad rows


def test_bad_rows_are_skipped_and_counted(
    model: str, bad_data: str, data: str, tmp_path: Path
) -> None:
    skip = ["--on-error", "skip"]
    done = run(model, bad_data, "--out", tmp_path / "bad", *skip, "--max-skipped-share", "0.2")
    assert done.exit_code == 0, done.stderr
    assert "2 of 14 rows" in " ".join(done.stdout.split())
    found = BayesVLMPosterior.from_pretrained(tmp_path / "bad")
    assert found.num_pairs == 12
    first, second = found.provenance["skipped"]
    assert first.startswith("row 12: ")
    assert "broken.png" in first
    assert "missing.png" in second
    assert run(model, data, "--out", tmp_path / "good").exit_code == 0
    same(found, BayesVLMPosterior.from_pretrained(tmp_path / "good"))


def test_too_many_bad_rows(model: str, bad_data: str, tmp_path: Path) -> None:
    done = run(model, bad_data, "--out", tmp_path, "--on-error", "skip")
    refused(done, "2 of 14 rows cannot be used, more than the share of 0.05")
    assert "row 12: " in done.stderr


# Processes of their own


def test_a_run_goes_on_from_its_checkpoint(model: str, data: str, tmp_path: Path) -> None:
    command = ["-m", "hf_bayesvlm.cli", "fit", model, data, "--device", "cpu"]
    kept = ["--checkpoint-dir", tmp_path / "kept", "--contrast-size", "4"]
    first = run_process(*command, "--out", tmp_path / "a", *kept, HF_HOME=str(tmp_path / "hf"))
    assert first.returncode == 0, first.stderr
    again = run_process(*command, "--out", tmp_path / "b", *kept, HF_HOME=str(tmp_path / "hf"))
    assert again.returncode == 0, again.stderr
    assert "is complete: 12 pairs of 3 blocks are done" in " ".join(again.stderr.split())
    same(*(BayesVLMPosterior.from_pretrained(tmp_path / name) for name in "ab"))
    other = run(model, data, "--out", tmp_path / "c", *kept[:2], "--contrast-size", "6")
    refused(other, "settings.contrast_size was 4 and is 6")


def test_the_script(model: str, data: str, tmp_path: Path) -> None:
    script = ROOT / "scripts" / "estimate_posterior.py"
    shown = run_process(script, "--help", NO_COLOR="1")
    assert shown.returncode == 0, shown.stderr
    assert "--contrast-size" in shown.stdout
    done = run_process(script, model, data, "--out", tmp_path / "out", HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} >= FILES
    wrong = run_process(script, model, data, "--out", tmp_path / "out")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    assert "--overwrite" in wrong.stderr

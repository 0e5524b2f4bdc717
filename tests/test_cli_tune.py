"""`bayesvlm tune`, as a user types it, on small data made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from tiny import fitted, random_posterior, save_bundle, tiny_vlm
from typer.testing import CliRunner

from hf_bayesvlm import BayesVLMForZeroShot, BayesVLMPosterior
from hf_bayesvlm.cli import app
from hf_bayesvlm.cli_tune import refuse_test_data

NAMES = ["cat", "dog", "car"]
runner = CliRunner()


def pictures(count: int = 12) -> list[tuple[str, Image.Image]]:
    generator = np.random.default_rng(0)
    return [
        (
            NAMES[i % 3],
            Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, a plain model with a posterior beside it, and one data set in four forms."""
    folder = tmp_path_factory.mktemp("tuning")
    save_bundle(fitted(), folder / "bundle")
    save_bundle(tiny_vlm(), folder / "plain")
    plain = BayesVLMForZeroShot.from_vlm(tiny_vlm())
    random_posterior(plain).save_pretrained(folder / "posterior")
    rows = [{"image": image, "label": NAMES.index(name)} for name, image in pictures()]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    data = Dataset.from_list(rows, features=features)
    data.to_parquet(folder / "val.parquet")
    data.save_to_disk(folder / "saved")
    DatasetDict({"validation": data}).save_to_disk(folder / "splits")
    DatasetDict({"test": data}).save_to_disk(folder / "only-test")
    for i, (name, image) in enumerate(pictures()):
        target = folder / "images" / "validation" / name
        target.mkdir(parents=True, exist_ok=True)
        image.save(target / f"{i:03}.png")
    return folder


def run(*arguments: Any) -> Any:
    """Run the command in this process."""
    return runner.invoke(app, ["tune", *map(str, arguments)], catch_exceptions=False)


FREE = ("--max-accuracy-loss", "1", "--counts", "1,10,100")


def test_everything_is_written(folder, tmp_path):
    done = run(
        folder / "bundle",
        folder / "val.parquet",
        *FREE,
        "--out",
        tmp_path / "chosen",
        "--plot",
        tmp_path / "tuning.png",
        "--json",
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert {trial["pseudo_data_count"] for trial in report["trials"]} == {1.0, 10.0, 100.0}
    assert report["best"]["nlpd"] == min(trial["nlpd"] for trial in report["trials"])
    assert "left out: reference objective, exact damping" in done.stderr.replace("\n", " ")
    chosen = BayesVLMPosterior.from_pretrained(tmp_path / "chosen")
    assert chosen.image.pseudo_data_count == report["best"]["pseudo_data_count"]
    assert chosen.image.prior_precision == report["best"]["image_prior_precision"]
    record = chosen.provenance["tuning"]
    assert (record["dataset"], record["split"]) == ("val.parquet", "train")
    assert str(folder) not in json.dumps(chosen.to_config())
    with Image.open(tmp_path / "tuning.png") as picture:
        assert picture.width > 600
    # What was written goes on the model it was tuned for.
    model = BayesVLMForZeroShot.from_vlm(folder / "bundle", tmp_path / "chosen")
    assert model.posterior.damping == report["best"]["damping"]


def test_table_has_the_plain_model_first(folder):
    done = run(folder / "bundle", folder / "val.parquet", *FREE)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("36 candidates on 12 images of 3 classes")
    assert "NLPD" in lines[1]
    assert "plain model" in lines[2]
    assert "factored" in done.stdout


@pytest.mark.parametrize("form", ["images", "saved", "splits"])
def test_forms_of_a_data_set(folder, form):
    reports = [
        json.loads(
            run(folder / "bundle", folder / name, *FREE, "--labels", labels, "--json").stdout
        )
        for name, labels in (
            (form, ",".join(sorted(NAMES) if form == "images" else NAMES)),
            ("val.parquet", ",".join(NAMES)),
        )
    ]
    nlpds = [report["plain"]["nlpd"] for report in reports]
    assert nlpds[0] == pytest.approx(nlpds[1], rel=1e-4)


def test_a_posterior_beside_the_model(folder):
    done = run(folder / "plain", folder / "val.parquet", "--posterior", folder / "posterior", *FREE)
    assert done.exit_code == 0, done.output
    bare = run(folder / "plain", folder / "val.parquet", *FREE)
    assert bare.exit_code == 2
    assert "no posterior to tune" in bare.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "test"], "the split 'test' holds test data"),
        (["--counts", "1,x"], "--counts takes numbers"),
        (["--counts", "0"], "--counts must be positive"),
        (["--criterion", "loss"], "--criterion must be nlpd"),
        (["--template", "a photo"], "has no {}"),
        (["--labels", "cat,cat"], "more than once"),
        (["--labels", "cat,dog"], "2 class names were given"),
        (["--label-column", "class"], "no column 'class'"),
        (["--plot", "picture.xyz"], "the name must end in"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
    ],
)
def test_errors_are_one_line(folder, arguments, message):
    done = run(folder / "bundle", folder / "val.parquet", *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_data_and_splits(folder, tmp_path):
    missing = run(folder / "bundle", folder / "splits", "--split", "train", *FREE)
    assert missing.exit_code == 2
    assert "the data set has validation" in missing.stderr
    images = run(folder / "bundle", folder / "images", "--split", "train", *FREE)
    assert images.exit_code == 2
    (tmp_path / "file").write_text("")
    out = run(folder / "bundle", folder / "val.parquet", "--out", tmp_path / "file")
    assert "is a file; give a folder" in out.stderr


@pytest.mark.parametrize(
    "split", ["test", "TEST", "test[:10%]", "validation+test", "test_1", "all", "val[:5]+test[5:]"]
)
def test_test_splits_are_refused(split):
    with pytest.raises(ValueError, match="--allow-test-split"):
        refuse_test_data("user/data", split)


@pytest.mark.parametrize("split", ["validation", "val[:10%]", "train[90%:]", "latest", "contest"])
def test_other_splits_are_not(split):
    refuse_test_data("user/test-of-time", split)


def test_files_and_folders_called_test_are_refused(tmp_path):
    (tmp_path / "test-00000.parquet").touch()
    (tmp_path / "test").mkdir()
    (tmp_path / "testimony.parquet").touch()
    for name in ("test-00000.parquet", "test"):
        with pytest.raises(ValueError, match="is called a test set"):
            refuse_test_data(str(tmp_path / name), "train")
    refuse_test_data(str(tmp_path / "testimony.parquet"), "train")


@pytest.mark.parametrize(
    "source",
    [
        "https://host/data/test-00000-of-00001.parquet",
        "test-{000..127}.tar",
        "hf://datasets/user/name/test.parquet",
        "cifar10_test.parquet",
        "data/test/part-0.parquet",
        "data/test/*.parquet",
    ],
)
def test_files_that_are_called_test_are_refused(source):
    with pytest.raises(ValueError, match="is called a test set"):
        refuse_test_data(source, None)
    refuse_test_data(source.replace("test", "latest"), None)


def test_a_posterior_is_not_replaced_unasked(folder, tmp_path):
    (tmp_path / "posterior_config.json").write_text("{}")
    done = run(folder / "bundle", folder / "val.parquet", "--out", tmp_path)
    assert done.exit_code == 2
    assert "--overwrite" in done.stderr


def test_a_test_split_on_demand(folder):
    # Also where the test split is not named but is all there is.
    refused = run(folder / "bundle", folder / "only-test", *FREE)
    assert "the split 'test' holds test data" in refused.stderr
    done = run(folder / "bundle", folder / "only-test", "--allow-test-split", *FREE)
    assert done.exit_code == 0, done.output

"""Progress on disk: kill -9 at any moment, resume, bit-identical."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from estimation_worker import OPTIONS, Processor, pairs
from safetensors.torch import load_file, save_file
from tiny import tiny_vlm

from hf_bayesvlm import BayesVLMPosterior, estimate_posterior
from hf_bayesvlm.checkpoint import CHECKPOINT_NAME, Checkpoint, CheckpointError, Progress
from hf_bayesvlm.pair_blocks import TooManyBadRowsError

SCRIPT = Path(__file__).parent / "kill_and_resume.py"
SUMS = {"image.A": torch.eye(3, dtype=torch.float64), "text.B": torch.ones(2, 2).double() / 3}


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_and_resumed_is_bit_identical(tmp_path: Path, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(seed)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 2
    resumed, uninterrupted = (
        BayesVLMPosterior.from_pretrained(tmp_path / name) for name in ("resumed", "uninterrupted")
    )
    assert resumed.num_pairs == uninterrupted.num_pairs == 240
    for name, factor in uninterrupted.factors().items():
        assert torch.equal(resumed.factors()[name], factor), name
    assert resumed.image.prior_precision == uninterrupted.image.prior_precision
    assert [file.name for file in (tmp_path / "checkpoint").iterdir()] == [CHECKPOINT_NAME]


def fit(folder: Path | None, **changes: Any) -> BayesVLMPosterior:
    """A small estimation with a checkpoint."""
    options = {
        "model": tiny_vlm(),
        "processor": Processor(),
        "dataset": Dataset.from_list(pairs(24)),
        "contrast_size": 8,
        "checkpoint_dir": folder,
    }
    return estimate_posterior(**options | OPTIONS | changes)


def other_tower() -> Any:
    """The same projections after another tower."""
    model = tiny_vlm()
    with torch.no_grad():
        model.vision_model.post_layernorm.weight.mul_(1.01)
    return model


def other_image() -> Dataset:
    """The same captions with another last image."""
    rows = pairs(24)
    rows[-1]["image"] = rows[0]["image"]
    return Dataset.from_list(rows)


def upside_down() -> Any:
    """A processor that normalises differently."""
    processor = Processor()
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    return processor


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: {"model": other_tower()}, "model.weights"),
        (lambda: {"model": tiny_vlm("metaclip_2")}, "model.class"),
        (lambda: {"dataset": Dataset.from_list(pairs(25))}, "dataset.rows"),
        (lambda: {"dataset": other_image()}, "dataset.sample"),
        (lambda: {"processor": upside_down()}, "processor"),
        (lambda: {"contrast_size": 6}, "settings.contrast_size was 8 and is 6"),
        (lambda: {"batch_size": 3}, "settings.batch_size"),
        (lambda: {"seed": 1}, "settings.seed"),
        (lambda: {"max_pairs": 12}, "settings.max_pairs"),
        (lambda: {"dtype": "bfloat16"}, "settings.tower_dtype"),
        (lambda: {"on_error": "skip"}, "settings.on_error"),
    ],
)
def test_another_run_is_refused_and_the_difference_named(
    tmp_path: Path, change: Any, named: str
) -> None:
    fit(tmp_path)
    before = (tmp_path / CHECKPOINT_NAME).read_bytes()
    with pytest.raises(CheckpointError, match=named):
        fit(tmp_path, **change())
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == before


def test_a_finished_run_is_not_repeated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = fit(tmp_path)
    again = fit(tmp_path, num_workers=0)
    assert "complete" in caplog.text
    assert torch.equal(first.text.B, again.text.B)
    assert again.provenance["seconds"] == first.provenance["seconds"]


def test_hyperparameters_are_no_part_of_the_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path)
    again = fit(tmp_path, pseudo_data_count=5.0, covariance="full")
    assert (again.image.pseudo_data_count, again.covariance) == (5.0, "full")


def test_too_many_bad_rows_stay_too_many(tmp_path: Path) -> None:
    rows = pairs(24)
    for row in rows[:12]:
        row["text"] = ""
    for _ in range(2):
        with pytest.raises(TooManyBadRowsError, match="12 of 24 rows"):
            fit(tmp_path, dataset=Dataset.from_list(rows), on_error="skip")


def test_round_trip(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "new" / "folder", {"a": {"b": 1}, "c": None})
    assert checkpoint.load() is None
    progress = Progress(
        3, 24, 3, 25, 1, 1, ["row 3: bad"], [{"slot": 25, "state": {"x": [1]}}], 1.5
    )
    checkpoint.save(progress, SUMS)
    found = checkpoint.load()
    assert found is not None
    assert found[0] == progress
    assert all(torch.equal(found[1][name], value) for name, value in SUMS.items())
    assert [file.name for file in checkpoint.folder.iterdir()] == [CHECKPOINT_NAME]


def test_damage_is_seen(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {"a": 1})
    checkpoint.save(Progress(), SUMS)
    whole = checkpoint.file.read_bytes()
    for damaged in (whole[:-9], whole[:40], b"", whole[:-4] + b"\x01\x02\x03\x04"):
        checkpoint.file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="delete it to start again"):
            checkpoint.load()


def test_another_safetensors_file_is_no_checkpoint(tmp_path: Path) -> None:
    save_file(SUMS, str(tmp_path / CHECKPOINT_NAME))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        Checkpoint(tmp_path, {}).load()


def test_the_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoint(tmp_path / "file", {})


def test_the_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, {"a": 1})
    checkpoint.save(Progress(num_pairs=1), SUMS)
    inode = checkpoint.file.stat().st_ino
    checkpoint.save(Progress(num_pairs=2), SUMS)
    assert checkpoint.file.stat().st_ino != inode
    assert set(load_file(str(checkpoint.file))) == set(SUMS)


def test_an_iterator_that_hides_in_another_loses_no_rows(tmp_path: Path) -> None:
    class Wrapper:
        """As `tqdm` wraps an iterator."""

        def __init__(self) -> None:
            self.rows = iter(pairs(40))

        def __iter__(self) -> Any:
            yield from self.rows

    assert fit(tmp_path, dataset=Wrapper()).num_pairs == 40


def test_the_same_paths_to_other_images_are_other_data(tmp_path: Path) -> None:
    rows = pairs(16)
    for i, row in enumerate(rows):
        for folder, image in (("first", row["image"]), ("second", rows[-1 - i]["image"])):
            (tmp_path / folder).mkdir(exist_ok=True)
            image.save(tmp_path / folder / f"{i}.png")
    table = [{"image": f"{i}.png", "text": row["text"]} for i, row in enumerate(rows)]
    first = fit(tmp_path / "progress", dataset=table, image_root=tmp_path / "first")
    # Another way to the same files is the same data.
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    moved = fit(tmp_path / "progress", dataset=table, image_root=tmp_path / "moved")
    assert torch.equal(moved.image.B, first.image.B)
    with pytest.raises(CheckpointError, match=r"dataset\.sample"):
        fit(tmp_path / "progress", dataset=table, image_root=tmp_path / "second")

"""Estimation in several processes: real launches over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from estimation_worker import OPTIONS, UNEVEN_FILES, Processor, load, pairs, resumable
from safetensors import safe_open
from tiny import tiny_vlm

from hf_bayesvlm import BayesVLMPosterior, estimate_posterior
from hf_bayesvlm.checkpoint import CHECKPOINT_NAME
from hf_bayesvlm.distributed import Ranks
from hf_bayesvlm.pair_blocks import BlockPlan

WORKER = Path(__file__).parent / "estimation_worker.py"
# Far more than a launch takes: to be reached by a hang only.
TIMEOUT = 240


def launch(what: str, out: Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += [
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--main_process_port",
        "0",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(WORKER), what, str(out)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=TIMEOUT,
    )


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of two processes."""
    out = tmp_path_factory.mktemp("launched")
    done = launch("healthy", out)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def single(rows: Any, family: str = "clip", **options: Any) -> BayesVLMPosterior:
    """The same in this process."""
    return estimate_posterior(tiny_vlm(family), Processor(family), rows, **OPTIONS | options)


def assert_same_factors(
    found: BayesVLMPosterior, expected: BayesVLMPosterior, tolerance: float = 1e-6
) -> None:
    """Relative difference of every factor."""
    assert found.num_pairs == expected.num_pairs
    for name, factor in expected.factors().items():
        difference = (found.factors()[name].double() - factor.double()).norm()
        assert difference <= tolerance * factor.double().norm(), name


@pytest.mark.parametrize(("name", "size"), [("clip", 16), ("stream", 16), ("siglip", 45)])
def test_two_processes_give_the_result_of_one(launched: Path, name: str, size: int) -> None:
    family = "siglip" if name == "siglip" else "clip"
    expected = single(pairs(45), family, contrast_size=size)
    for rank in (0, 1):
        found = load(launched, name, rank)
        assert_same_factors(found, expected)
        assert found.image.prior_precision == pytest.approx(
            expected.image.prior_precision, rel=1e-5
        )
    assert load(launched, name).provenance["num_blocks"] == -(-45 // size)


def test_skipped_rows_of_all_processes_are_counted(launched: Path) -> None:
    rows = pairs(45)
    rows[3]["text"], rows[44]["image"] = "", b"broken"
    expected = single(rows, contrast_size=16, on_error="skip")
    found = load(launched, "skipped", 1)
    assert_same_factors(found, expected)
    assert found.provenance["num_skipped"] == 2
    assert found.provenance["skipped"] == expected.provenance["skipped"]
    assert [text.split(":")[0] for text in found.provenance["skipped"]] == ["row 3", "row 44"]


def test_one_process_has_the_result_that_two_have_saved(launched: Path) -> None:
    found = single(pairs(45), contrast_size=16, checkpoint_dir=launched / "checkpoint")
    assert_same_factors(found, load(launched, "checkpoint"), tolerance=0.0)


def test_uneven_files_come_to_an_end(launched: Path) -> None:
    found = load(launched, "files")
    assert found.num_pairs == sum(UNEVEN_FILES)
    assert found.provenance["sharding"] == "files"
    # The sum over inputs does not depend on the blocks.
    expected = single(pairs(sum(UNEVEN_FILES)), contrast_size=sum(UNEVEN_FILES))
    torch.testing.assert_close(found.image.A, expected.image.A, rtol=1e-5, atol=1e-6)


def test_a_process_without_data_comes_to_an_end(launched: Path) -> None:
    # Half of each block of four comes from the one process that has data.
    assert_same_factors(load(launched, "given", 1), single(pairs(10), contrast_size=2))
    assert load(launched, "given").provenance["num_dropped"] == 1


def test_a_process_without_data_of_a_float64_model(launched: Path) -> None:
    assert load(launched, "double", 1).num_pairs == 8


@pytest.mark.parametrize("processes", [1, 3])
def test_an_interrupted_run_is_finished_by_any_number_of_processes(
    tmp_path: Path, processes: int
) -> None:
    started = launch("interrupted", tmp_path)
    assert started.returncode == 0, started.stderr[-3000:]
    for name in ("numbered", "streamed"):
        done = json.loads(safe_open(tmp_path / name / CHECKPOINT_NAME, "pt").metadata()["progress"])
        assert (done["num_pairs"], done["complete"]) == (36, False)
    if processes == 1:
        found = resumable(tmp_path, None, pairs(45))
    else:
        finished = launch("resumed", tmp_path, processes)
        assert finished.returncode == 0, finished.stderr[-3000:]
        found = {name: load(tmp_path, name, processes - 1) for name in ("numbered", "streamed")}
    expected = single(pairs(45), contrast_size=9)
    for posterior in found.values():
        assert_same_factors(posterior, expected)


def test_a_failing_process_ends_all(tmp_path: Path) -> None:
    done = launch("failing", tmp_path)
    assert done.returncode != 0
    assert "row 38: the caption" in done.stderr
    assert "process 1 of 2 failed: PairError: row 38" in done.stderr


def test_a_killed_process_ends_all(tmp_path: Path) -> None:
    done = launch("killed", tmp_path)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr


def test_processes_with_different_data_are_refused(tmp_path: Path) -> None:
    done = launch("different", tmp_path)
    assert done.returncode != 0
    assert "process 1 was started with another dataset" in done.stderr
    assert "sharding='given'" in done.stderr


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("limit", [None, 1, 20, 23])
def test_rows_are_shared_without_gaps(world_size: int, limit: int | None) -> None:
    covered: list[int] = []
    for block in range(4):
        for rank in range(world_size):
            plan = BlockPlan(10, 4, limit, "rows", Ranks(rank, world_size))
            start, stop = plan.window(block)
            assert stop - start <= plan.capacity
            covered += range(start, stop)
    assert covered == list(range(40 if limit is None else limit))

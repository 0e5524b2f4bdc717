"""The scaling benchmark: that its arithmetic and its competitors are right, not how fast they are."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import benchmark_pass
import benchmark_prior
import benchmark_projection as projection
import benchmark_report
import benchmark_scaling
from benchmark_common import textbook_ggn

from hf_bayesvlm.curvature import CurvatureAccumulator
from hf_bayesvlm.laplace import log_objective, optimize_prior_precision


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the script writes at the smallest sizes."""
    folder = tmp_path_factory.mktemp("scaling")
    sizes = [
        "--contrasts",
        "24",
        "--features",
        "8",
        "--pairs",
        "40",
        "80",
        "--block",
        "16",
        "--growth-features",
        "8",
    ]
    files = ["--write", str(folder / "page.md"), "--json", str(folder / "numbers.json")]
    assert benchmark_scaling.main(["--quick", *sizes, *files]) == 0
    return folder


def test_the_page_the_plot_and_the_numbers_are_written(written: Path) -> None:
    scaling = json.loads((written / "numbers.json").read_text("utf-8"))["scaling"]
    (cell,), growth = scaling["throughput"], scaling["growth"]
    assert (cell["contrast"], cell["features"], cell["rows"]) == (24, 8, 24)
    assert cell["textbook_rows"] == 2 * cell["textbook_batch"] == 8
    assert growth["pairs"] == [40, 80]
    assert all(value > 0 for passes in growth["seconds"] for value in passes)
    # Below a page, the memory of so small blocks is nothing.
    assert all(value >= 0 for passes in growth["peak_mib"] for value in passes)
    with Image.open(written / "scaling.png") as plot:
        assert plot.size > (800, 400)
        assert len(plot.convert("L").getcolors()) > 10


def test_the_page_says_what_was_measured(written: Path) -> None:
    page = (written / "page.md").read_text("utf-8")
    scaling = json.loads((written / "numbers.json").read_text("utf-8"))["scaling"]
    measured, projected = page.split("## Projected: 400,000,000 pairs")
    (cell,) = scaling["throughput"]
    ratio = cell["pairs_per_second"] / cell["textbook_pairs_per_second"]
    assert f"**{ratio:,.0f} x**" in measured
    assert "numbers mean nothing" in measured
    assert f"{4e8 / cell['pairs_per_second'] / 3600:,.0f}" in projected
    best = [min(passes) for passes in scaling["growth"]["seconds"]]
    # Two points fix a line: its slope is the logarithm of the ratio to base 2.
    assert f"**{math.log2(best[1] / best[0]):.3f}**" in measured
    assert "{" not in page
    assert max(map(len, page.split("\n"))) < 260


def test_a_slope_needs_two_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark_scaling.main(["--quick", "--pairs", "100", "100"])
    assert "two different numbers" in capsys.readouterr().err
    with pytest.raises(ValueError, match="two different"):
        projection.log_log_slope([5], [1.0])


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_slope_of_a_power_law_is_its_power(power: float) -> None:
    sizes = [3, 10, 200, 7000]
    times = [0.2 * size**power for size in sizes]
    assert projection.log_log_slope(sizes, times) == pytest.approx(power)


def test_growth_takes_the_fastest_pass_and_the_highest_peak() -> None:
    growth = projection.Growth(
        contrast=8,
        features=2,
        in_features=3,
        pairs=(10, 20, 40),
        seconds=((1.0, 9.0, 1.5), (2.0, 2.5, 2.0), (4.0, 4.0, 8.0)),
        peak_mib=((1.0, 2.0, 1.0), (3.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
    )
    assert growth.best_seconds == (1.0, 2.0, 4.0)
    assert growth.highest_mib == (2.0, 3.0, 1.0)
    assert growth.slope == pytest.approx(1.0)
    assert growth.median_slope == pytest.approx(math.log(4.0 / 1.5) / math.log(4.0), abs=1e-12)
    assert growth.pairs_per_second == 10.0


def test_projection_arithmetic() -> None:
    assert projection.hours(400_000_000, 1e5) == pytest.approx(4000 / 3600)
    assert projection.hours_at(10**9, 3.6e6, 1.0) == pytest.approx(1.0)
    assert projection.curvature_share(30.0, 10.0) == pytest.approx(0.25)
    faster, slower = (projection.hours_at(7, 5.0, speed) for speed in (20.0, 10.0))
    assert slower == pytest.approx(2.0 * faster)


@pytest.mark.parametrize(("contrast", "features", "inputs"), [(64, 16, 24), (48, 32, 20)])
def test_operations_of_a_pair_are_those_that_torch_counts(
    contrast: int, features: int, inputs: int
) -> None:
    block = benchmark_pass.RandomPairs(contrast, features, inputs)
    with FlopCounterMode(display=False) as counter:
        benchmark_pass.fold(benchmark_pass.accumulators(), block)
    stated = projection.curvature_flops(contrast, features, inputs)
    assert counter.get_total_flops() / contrast == pytest.approx(stated, rel=1e-6)
    with FlopCounterMode(display=False) as counter:
        textbook_ggn(block.means["image"][:4], block.means["text"], 100.0)
    stated = projection.textbook_flops(contrast, features)
    assert 2 * counter.get_total_flops() / 4 == pytest.approx(stated, rel=1e-6)


def test_ratio_is_of_pairs_a_second() -> None:
    row = projection.Throughput(8, 4, 6, 8, 4, 300.0, 2.0, 1.0, 2, 1.0, 0.5)
    assert row.ratio == 150.0


def test_folded_rows_are_contrasted_with_the_whole_block() -> None:
    block = benchmark_pass.RandomPairs(12, 5, 7)
    sums = benchmark_pass.accumulators()
    benchmark_pass.fold(sums, block, 4)
    expected = CurvatureAccumulator("softmax", benchmark_pass.LOGIT_SCALE)
    expected.update(block.inputs["text"][:4], block.means["text"][:4], block.means["image"])
    torch.testing.assert_close(sums["text"].factors().B, expected.factors().B)
    torch.testing.assert_close(sums["text"].factors().A, expected.factors().A)
    assert sums["image"].num_pairs == 4


def test_a_refilled_block_is_another_one_in_the_same_memory() -> None:
    block, again = (benchmark_pass.RandomPairs(6, 5, 7) for _ in range(2))
    first, address = block.means["text"].clone(), block.means["text"].data_ptr()
    torch.testing.assert_close(first, again.means["text"])
    block.refill()
    assert block.means["text"].data_ptr() == address
    assert not torch.equal(block.means["text"], first)


def test_a_failing_pass_is_reported() -> None:
    with pytest.raises(RuntimeError, match="invalid choice"):
        benchmark_pass.run_pass("nothing", 4, 4, 4, 4)


def test_the_peak_of_a_pass_is_its_own_and_not_its_parents() -> None:
    # A process starts with the high-water mark of the one that started it in its resource usage.
    large = torch.ones(2**26)
    result = benchmark_pass.run_pass("ours", 32, 16, 8, 8)
    assert large.element_size() * len(large) / 2**20 == 256
    assert 0 <= result.peak_mib < 128
    assert len(result.block_seconds) == 2


def test_peak_memory_sees_what_a_pass_allocates() -> None:
    before = benchmark_pass.resident_bytes()
    assert before > 2**20
    block = torch.ones(2**24)
    assert benchmark_pass.resident_bytes() - before > 0.9 * 4 * len(block)
    assert benchmark_pass.peak_bytes() >= benchmark_pass.resident_bytes() - 2**20


def test_both_ways_to_the_prior_precision_maximise_the_same_objective() -> None:
    generator = torch.Generator().manual_seed(0)
    A = benchmark_prior.random_factor(9, 500.0, generator)
    B = benchmark_prior.random_factor(6, 80.0, generator)
    found = optimize_prior_precision(A, B, 20.0, 10.0)
    assert benchmark_prior.true_maximum(A, B, 20.0, 10.0) == pytest.approx(found, rel=1e-9)
    values = [
        benchmark_prior.reference_objective(
            torch.tensor(math.log(lam), dtype=torch.float64), A, B, 20.0, 10.0
        ).item()
        - log_objective(A, B, 20.0, 10.0, lam)
        for lam in (0.5, found, 40.0)
    ]
    assert values == pytest.approx([values[0]] * 3, abs=1e-8)
    adam = benchmark_prior.adam_precision(A, B, 20.0, 10.0, steps=1, rate=0.1)
    # The first step of Adam is as long as its learning rate.
    assert abs(math.log(adam / 1000.0)) == pytest.approx(0.1, rel=1e-3)


def test_exponents_are_measured_along_each_axis() -> None:
    def cell(contrast: int, features: int) -> projection.Throughput:
        speed = 1e6 / (contrast * features**2)
        return projection.Throughput(
            contrast, features, 8, 4, 4, speed, speed / 9, 1.0, 2, 1.0, 0.5
        )

    grid = [cell(contrast, features) for contrast in (10, 40) for features in (3, 6, 9)]
    text = benchmark_report._exponents(grid)
    assert "as `C` to the power 1.00" in text
    assert "as `D` to the power 2.00" in text
    assert "power" not in benchmark_report._exponents(grid[:1])

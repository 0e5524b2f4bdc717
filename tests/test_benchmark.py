"""The benchmark script: that its competitors compute the same, not how fast they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import benchmark

from hf_bayesvlm import BayesVLMForZeroShot
from hf_bayesvlm.curvature import info_nce_ggn


def test_the_textbook_formula_is_the_same_curvature(generator: torch.Generator) -> None:
    source = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    target = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    slow = benchmark.textbook_ggn(source, target, 8.0)
    torch.testing.assert_close(info_nce_ggn(source, target, 8.0), slow, rtol=1e-10, atol=1e-12)


def test_competitors_take_turns() -> None:
    calls: list[str] = []
    benchmark.interleaved(lambda: calls.append("a"), lambda: calls.append("b"), runs=3)
    assert calls == ["a", "b"] * 4


def test_curvature_comparison_reports_its_ratio() -> None:
    row = benchmark.bench_curvature(1, features=8, candidates=64)
    assert row.ratio == pytest.approx(row.baseline_seconds / row.seconds)
    benchmark.print_table([row])
    assert json.loads(json.dumps(benchmark.asdict(row)))["target"] == ">= 100"


def test_random_posterior_fits_the_random_model() -> None:
    from tiny import tiny_vlm

    model = BayesVLMForZeroShot.from_vlm(tiny_vlm())
    model.set_posterior(benchmark.random_posterior(model))
    assert model.is_fitted

"""Blocks into factors: precision, refusals, and the GPU against the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from estimation_worker import OPTIONS, Processor, pairs
from tiny import tiny_vlm

from hf_bayesvlm import BayesVLMForZeroShot, BayesVLMPosterior, estimate_posterior
from hf_bayesvlm.block_fold import BlockFolder, full_float32
from hf_bayesvlm.curvature import CurvatureAccumulator
from hf_bayesvlm.distributed import Ranks

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def rows(model: BayesVLMForZeroShot, count: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Random embeddings and inputs in the order of `BlockFolder.append`."""
    shapes = [model.projection_weights()[name].shape for name in ("image", "text")]
    widths = [width for shape in shapes for width in shape]
    return [torch.randn(count, width, generator=generator) for width in widths]


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_batches_of_a_block_are_contrasted_with_each_other(
    family: str, generator: torch.Generator
) -> None:
    model = BayesVLMForZeroShot.from_vlm(tiny_vlm(family))
    folder = BlockFolder(model, 10, Ranks())
    expected = CurvatureAccumulator(
        model.likelihood, model.logit_scale, model.logit_bias if family == "siglip" else 0.0
    )
    for _ in range(2):
        block = rows(model, 10, generator)
        for part in (slice(0, 4), slice(4, 10)):
            folder.append(*(tensor[part] for tensor in block))
        assert len(folder) == 10
        folder.fold([10])
        expected.update(block[1], block[0], block[2])
    assert (len(folder), folder.num_pairs) == (0, 20)
    torch.testing.assert_close(folder.factors()["image"].B, expected.factors().B)
    torch.testing.assert_close(folder.factors()["image"].A, expected.factors().A)


def test_sums_are_float64_and_restore_the_state(generator: torch.Generator) -> None:
    model = BayesVLMForZeroShot.from_vlm(tiny_vlm())
    first, second = BlockFolder(model, 8, Ranks()), BlockFolder(model, 8, Ranks())
    assert first.sums() == {}
    blocks = [rows(model, 8, generator) for _ in range(2)]
    first.append(*blocks[0])
    first.fold([8])
    saved = {name: value.clone() for name, value in first.sums().items()}
    assert {value.dtype for value in saved.values()} == {torch.float64}
    second.restore(saved, first.num_pairs)
    for folder in (first, second):
        folder.append(*blocks[1])
        folder.fold([8])
    for name, value in first.sums().items():
        assert torch.equal(value, second.sums()[name])


def test_discarded_pairs_leave_nothing(generator: torch.Generator) -> None:
    model = BayesVLMForZeroShot.from_vlm(tiny_vlm())
    folder = BlockFolder(model, 4, Ranks())
    folder.append(*rows(model, 1, generator))
    folder.discard()
    assert (len(folder), folder.num_pairs, folder.sums()) == (0, 0, {})


@pytest.mark.parametrize("which", range(4))
def test_towers_that_overflow_are_named(which: int, generator: torch.Generator) -> None:
    model = BayesVLMForZeroShot.from_vlm(tiny_vlm())
    block = rows(model, 3, generator)
    block[which][1, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        BlockFolder(model, 3, Ranks()).append(*block)


def test_precision_of_products_is_put_back() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with full_float32():
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == before

    def fail() -> None:
        with full_float32():
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.backends.cuda.matmul.fp32_precision == before


def fit(device: str, dtype: str) -> BayesVLMPosterior:
    """The same estimation on a device."""
    model: Any = tiny_vlm().to(device)
    return estimate_posterior(
        model, Processor(), pairs(96), contrast_size=48, dtype=dtype, **OPTIONS
    )


@needs_cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_the_gpu_agrees_with_the_cpu(dtype: str, tolerance: float) -> None:
    gpu, cpu = fit("cuda", dtype), fit("cpu", dtype)
    for name, factor in cpu.factors().items():
        assert (gpu.factors()[name] - factor).norm() <= tolerance * factor.norm(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.01), ("bfloat16", 0.05)])
def test_half_precision_towers_are_close_to_single_precision(dtype: str, tolerance: float) -> None:
    half, single = fit("cpu", dtype), fit("cpu", "float32")
    for name, factor in single.factors().items():
        assert 0 < (half.factors()[name] - factor).norm() <= tolerance * factor.norm(), name

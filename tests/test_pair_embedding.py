"""Decoding ahead in threads, and the towers' precision."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from test_estimation import Processor, pairs
from tiny import tiny_vlm

from hf_bayesvlm import BayesVLMForZeroShot
from hf_bayesvlm.pair_embedding import PairEmbedder, ahead, on_device, tower_dtype
from hf_bayesvlm.pairs import PairColumns, PairError, Slot

WORKERS = [0, 1, 2, 7]


def decoding_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("bayesvlm-decode")]


def collect(results: Iterator[Any], found: list[Any]) -> None:
    for result in results:
        found.append(result)


def slots(count: int = 5) -> list[Slot]:
    return [Slot(i, i, row["image"], row["text"]) for i, row in enumerate(pairs(count))]


def embedder(model: Any = None, **options: Any) -> PairEmbedder:
    model = BayesVLMForZeroShot.from_vlm(tiny_vlm()) if model is None else model
    return PairEmbedder(model, Processor(), PairColumns(), **options)


# Ahead


@pytest.mark.parametrize("workers", WORKERS)
def test_results_come_in_order(workers: int) -> None:
    def work(i: int) -> int:
        time.sleep(0.001 * (i * 7 % 5))
        return i * i

    assert list(ahead(work, range(40), workers)) == [i * i for i in range(40)]
    assert list(ahead(work, iter(()), workers)) == []
    assert not decoding_threads()


@pytest.mark.parametrize("workers", WORKERS)
def test_the_first_error_is_the_one_that_is_raised(workers: int) -> None:
    def work(i: int) -> int:
        if i == 6:
            time.sleep(0.02)
        if i >= 6:
            raise ValueError(f"item {i}")
        return i

    found: list[int] = []
    with pytest.raises(ValueError, match="item 6"):
        collect(ahead(work, range(40), workers), found)
    assert found == list(range(6))
    assert not decoding_threads()


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_of_the_items_comes_after_what_was_before_it(workers: int) -> None:
    def items() -> Iterator[int]:
        yield from range(9)
        raise OSError("no more")

    found: list[str] = []
    with pytest.raises(OSError, match="no more"):
        collect(ahead(str, items(), workers), found)
    assert found == [str(i) for i in range(9)]
    assert not decoding_threads()


@pytest.mark.parametrize("workers", WORKERS)
def test_it_never_runs_far_ahead(workers: int) -> None:
    drawn, most = 0, 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for i in range(60):
            drawn += 1
            yield i

    for taken, _ in enumerate(ahead(lambda i: i, items(), workers), start=1):
        most = max(most, drawn - taken)
    assert drawn == 60
    assert most <= workers


@pytest.mark.parametrize("workers", WORKERS)
def test_items_are_drawn_in_the_callers_thread(workers: int) -> None:
    threads = set()

    def items() -> Iterator[int]:
        for i in range(10):
            threads.add(threading.current_thread())
            yield i

    list(ahead(lambda i: i, items(), workers))
    assert threads == {threading.current_thread()}


def test_closing_it_early_stops_the_threads() -> None:
    results = ahead(lambda i: i, iter(range(10**9)), 3)
    assert next(results) == 0
    assert decoding_threads()
    results.close()  # type: ignore[attr-defined]
    assert not decoding_threads()


# Slots into batches


def test_bad_slots_are_left_out_and_named() -> None:
    good = slots()
    bad = [Slot(9, 9, None, "a"), Slot(10, 10, good[0].image, ""), Slot(11, 11, None, None, "why")]
    prepared = embedder(on_error="skip").prepare([good[0], *bad[:2], good[1], bad[2]])
    assert prepared.texts == [good[0].text, good[1].text]
    assert prepared.pixels["pixel_values"].shape[0] == 2
    assert [reason.split(":")[0] for reason in prepared.bad_rows] == ["row 9", "row 10", "row 11"]
    nothing = embedder(on_error="skip").prepare(bad)
    assert (nothing.texts, nothing.pixels, len(nothing.bad_rows)) == ([], None, 3)
    with pytest.raises(PairError, match="row 9"):
        embedder().prepare([good[0], *bad])


@pytest.mark.parametrize("size", [(1, 1), (20, 1), (1, 20), (20, 3), (3, 20), (3, 3), (200, 40)])
def test_images_of_every_shape_are_read_as_rows_of_pixels(size: tuple[int, int]) -> None:
    """An image three pixels high is no image of three channels."""
    red = Image.new("RGB", size, (255, 0, 0))
    pixels = embedder().prepare([Slot(0, 0, red, "a")]).pixels["pixel_values"]
    means = pixels.mean(dim=(0, 2, 3))
    whole = embedder().prepare([Slot(0, 0, Image.new("RGB", (40, 40), (255, 0, 0)), "a")]).pixels
    torch.testing.assert_close(means, whole["pixel_values"].mean(dim=(0, 2, 3)))


@pytest.mark.parametrize("lacking", ["tokenizer", "image_processor"])
def test_a_processor_that_lacks_a_part(lacking: str) -> None:
    processor = Processor()
    delattr(processor, lacking)
    model = BayesVLMForZeroShot.from_vlm(tiny_vlm())
    with pytest.raises(ValueError, match=f"Processor.* has no {lacking}: load it with AutoProcess"):
        PairEmbedder(model, processor, PairColumns())
    with pytest.raises(ValueError, match="has no tokenizer and no image_processor"):
        PairEmbedder(model, Processor().tokenizer, PairColumns())


def test_an_unknown_way_with_errors() -> None:
    with pytest.raises(ValueError, match="on_error must be"):
        embedder(on_error="ignore")


# Precision


def test_autocast_is_close_to_float32_and_is_not_float32() -> None:
    model = BayesVLMForZeroShot.from_vlm(tiny_vlm())
    exact, lower = embedder(model), embedder(model, dtype="bfloat16")
    batch = exact.prepare(slots())
    for one, other in zip(exact.embed(batch), lower.embed(batch), strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert not torch.equal(one, other)
        assert ((one - other).norm() / one.norm()).item() < 0.03
    assert model.dtype == torch.float32


def test_a_model_in_half_precision_runs_in_it() -> None:
    model = BayesVLMForZeroShot.from_vlm(tiny_vlm().to(torch.bfloat16))
    reader = embedder(model)
    assert reader.dtype == torch.bfloat16
    assert all(part.dtype == torch.float32 for part in reader.embed(reader.prepare(slots())))
    for dtype in ("float32", torch.float32, "float16"):
        with pytest.raises(ValueError, match=r"loaded in torch.bfloat16.*load it in float32"):
            embedder(model, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_precisions(dtype: Any, expected: torch.dtype) -> None:
    assert tower_dtype(dtype, tiny_vlm()) == expected


@pytest.mark.parametrize("dtype", ["half", "int8", torch.int8, torch.float64, "float64", 16, ""])
def test_unknown_precisions(dtype: Any) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16"):
        tower_dtype(dtype, tiny_vlm())


def test_a_double_model_stays_double() -> None:
    model = tiny_vlm().double()
    assert tower_dtype(None, model) == torch.float64
    assert tower_dtype(torch.float64, model) == torch.float64
    with pytest.raises(ValueError, match=r"loaded in torch.float64"):
        tower_dtype("float32", model)


# Device


def test_the_same_device_changes_nothing() -> None:
    model = tiny_vlm()
    before = [parameter.data_ptr() for parameter in model.parameters()]
    for device in (None, torch.device("cpu"), torch.device("cpu", 0)):
        with on_device(model, device):
            assert [parameter.data_ptr() for parameter in model.parameters()] == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_comes_back_from_a_device() -> None:
    model = tiny_vlm()

    def inside() -> None:
        with on_device(model, torch.device("cuda")):
            assert next(model.parameters()).device.type == "cuda"
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        inside()
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_spread_model_stays_where_it_is() -> None:
    model = tiny_vlm()
    model.hf_device_map = {"": "cpu"}
    with on_device(model, torch.device("meta")):
        assert next(model.parameters()).device.type == "cpu"

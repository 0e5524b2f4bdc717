"""The posterior of a model from image-text pairs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from tiny import FAMILIES, tiny_image_processor, tiny_tokenizer, tiny_vlm

from hf_bayesvlm import BayesVLMForZeroShot, BayesVLMPosterior, estimate_posterior
from hf_bayesvlm.curvature import info_nce_ggn, sigmoid_ggn
from hf_bayesvlm.laplace import optimize_prior_precision

CAPTIONS = ("a cat", "a dog", "the car", "a photo of a pizza", "an drawing")


class Processor:
    """Tokenizer and image processor, as a processor has them."""

    def __init__(self, family: str = "clip") -> None:
        self.tokenizer = tiny_tokenizer()
        self.image_processor = tiny_image_processor(family)


def pairs(count: int = 23) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)),
            "text": f"{CAPTIONS[i % len(CAPTIONS)]} {i}",
        }
        for i in range(count)
    ]


def by_hand(model: BayesVLMForZeroShot, rows: list[dict[str, Any]], size: int) -> dict[str, Any]:
    """A and B by one pass over all rows and the definition of the blocks."""
    processor = Processor()
    with torch.no_grad():
        padding = "max_length" if model.likelihood == "sigmoid" else True
        texts = [row["text"] for row in rows]
        tokens = processor.tokenizer(texts, padding=padding, max_length=64, return_tensors="pt")
        pixels = processor.image_processor([row["image"] for row in rows], return_tensors="pt")
        text = model.encode_text(**tokens)
        image = model.encode_image(**pixels)
    sums: dict[str, Any] = {}
    for name, own, other in (("image", image, text), ("text", text, image)):
        blocks = [slice(i, i + size) for i in range(0, len(rows), size)]
        blocks = [block for block in blocks if len(own.mean[block]) > 1]
        used = torch.cat([own.features[block] for block in blocks]).double()
        scale, bias = model.logit_scale.item(), model.logit_bias.item()
        curvature = [
            info_nce_ggn(own.mean[b].double(), other.mean[b].double(), scale)
            if model.likelihood == "softmax"
            else sigmoid_ggn(own.mean[b].double(), other.mean[b].double(), scale, bias)
            for b in blocks
        ]
        root = len(used) ** 0.5
        sums[name] = (used.T @ used / root, sum(curvature) / root)
    return sums


@pytest.mark.parametrize("size", [23, 8, 11])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_factors_are_those_of_the_definition(family: str, size: int) -> None:
    model = BayesVLMForZeroShot.from_vlm(tiny_vlm(family))
    rows = pairs()
    posterior = estimate_posterior(
        model, Processor(), rows, contrast_size=size, batch_size=5, progress=False
    )
    for name, (A, B) in by_hand(model, rows, size).items():
        part = getattr(posterior, name)
        torch.testing.assert_close(part.A.double(), A, rtol=2e-4, atol=1e-5)
        torch.testing.assert_close(part.B.double(), B, rtol=2e-4, atol=1e-4 * B.abs().max().item())
        expected = optimize_prior_precision(
            part.A,
            part.B,
            model.projection_weights()[name].square().sum(),
            1.0,
            posterior.objective,
        )
        assert part.prior_precision == pytest.approx(expected, rel=1e-4)
    # 23 pairs in blocks of 11 leave one alone, which contrasts with nothing.
    assert posterior.num_pairs == (22 if size == 11 else 23)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "siglip2"])
def test_every_family_can_be_fitted_and_used(family: str) -> None:
    model = BayesVLMForZeroShot.from_vlm(tiny_vlm(family))
    posterior = estimate_posterior(model, Processor(family), pairs(9), progress=False)
    assert not model.is_fitted
    model.set_posterior(posterior)
    assert model.is_fitted
    assert posterior.fingerprint == model.base_fingerprint()


def test_a_plain_model_is_taken_and_left_alone() -> None:
    vlm = tiny_vlm()
    before = {name: value.clone() for name, value in vlm.state_dict().items()}
    config = vlm.config.to_dict()
    posterior = estimate_posterior(vlm, Processor(), pairs(9), progress=False)
    assert posterior.num_pairs == 9
    assert vlm.config.to_dict() == config
    assert not any(module._forward_pre_hooks for module in vlm.modules())
    assert all(torch.equal(before[name], value) for name, value in vlm.state_dict().items())


def test_a_plain_model_is_left_alone_when_the_estimation_fails() -> None:
    vlm = tiny_vlm()
    with pytest.raises(ValueError, match="no column"):
        estimate_posterior(vlm, Processor(), pairs(4), text_column="missing", progress=False)
    assert not any(module._forward_pre_hooks for module in vlm.modules())


def test_a_model_that_shares_the_weights_goes_on_working() -> None:
    vlm = tiny_vlm()
    model = BayesVLMForZeroShot.from_vlm(vlm)
    model.set_posterior(estimate_posterior(vlm, Processor(), pairs(9), progress=False))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert len(model.encode_image(pixel_values=pixels)) == 2


def test_batch_size_does_not_matter() -> None:
    fits = [
        estimate_posterior(tiny_vlm(), Processor(), pairs(), batch_size=size, progress=False)
        for size in (1, 4, 64)
    ]
    for other in fits[1:]:
        torch.testing.assert_close(other.image.B, fits[0].image.B, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.text.A, fits[0].text.A, rtol=1e-4, atol=1e-5)


def test_datasets_and_streams_give_the_same(recwarn: pytest.WarningsRecorder) -> None:
    rows = pairs(8)
    table = Dataset.from_list([{"picture": row["image"], "name": row["text"]} for row in rows])

    def stream() -> Iterator[dict[str, Any]]:
        yield from ({"picture": row["image"], "name": row["text"]} for row in rows)

    options: dict[str, Any] = {"image_column": "picture", "text_column": "name", "progress": False}
    model = tiny_vlm()
    expected = estimate_posterior(model, Processor(), rows, progress=False)
    for source in (
        table,
        table.to_iterable_dataset(),
        IterableDataset.from_generator(stream),
        stream(),
    ):
        found = estimate_posterior(model, Processor(), source, **options)
        torch.testing.assert_close(found.image.A, expected.image.A)
        torch.testing.assert_close(found.text.B, expected.text.B)


def test_max_pairs_stops_early() -> None:
    posterior = estimate_posterior(tiny_vlm(), Processor(), pairs(), max_pairs=6, progress=False)
    assert posterior.num_pairs == 6
    first = estimate_posterior(tiny_vlm(), Processor(), pairs()[:6], progress=False)
    assert torch.equal(posterior.image.B, first.image.B)


def test_too_few_pairs_for_the_reference_objective(caplog: pytest.LogCaptureFixture) -> None:
    many = estimate_posterior(tiny_vlm(), Processor(), pairs(80), progress=False)
    assert many.objective == "reference"
    assert "evidence" not in caplog.text
    few = estimate_posterior(tiny_vlm(), Processor(), pairs(6), progress=False)
    assert few.objective == "evidence"
    assert "objective='evidence'" in caplog.text
    with pytest.raises(ValueError, match="no maximum"):
        estimate_posterior(tiny_vlm(), Processor(), pairs(6), objective="reference", progress=False)


def test_a_model_in_training_mode_is_read_without_dropout() -> None:
    model = tiny_vlm("chinese_clip")
    expected = estimate_posterior(model, Processor("chinese_clip"), pairs(9), progress=False)
    model.train()
    model.vision_model.eval()
    found = estimate_posterior(model, Processor("chinese_clip"), pairs(9), progress=False)
    assert torch.equal(found.text.A, expected.text.A)
    assert model.training
    assert model.text_model.training
    assert not model.vision_model.training


def test_base_and_data_set_are_noted() -> None:
    posterior = estimate_posterior(
        tiny_vlm(),
        Processor(),
        pairs(9),
        base_model="user/base",
        revision="abc",
        dataset_name="user/pairs",
        dataset_revision="def",
        progress=False,
    )
    assert (posterior.base_model, posterior.revision) == ("user/base", "abc")
    assert (posterior.dataset, posterior.dataset_revision) == ("user/pairs", "def")


def test_hyperparameters_reach_the_posterior() -> None:
    posterior = estimate_posterior(
        tiny_vlm(),
        Processor(),
        pairs(40),
        pseudo_data_count=3.0,
        objective="evidence",
        covariance="full",
        damping="exact",
        modalities="image",
        progress=False,
    )
    assert (posterior.image.pseudo_data_count, posterior.text.pseudo_data_count) == (3.0, 3.0)
    assert (posterior.covariance, posterior.damping) == ("full", "exact")
    assert (posterior.modalities, posterior.objective) == ("image", "evidence")


def test_a_saved_posterior_gives_the_same_predictions(tmp_path: Any) -> None:
    model = BayesVLMForZeroShot.from_vlm(tiny_vlm())
    posterior = estimate_posterior(model, Processor(), pairs(), progress=False)
    posterior.save_pretrained(tmp_path)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(4, 16, (3, 6), generator=torch.Generator().manual_seed(1))
    outputs = []
    for source in (posterior, BayesVLMPosterior.from_pretrained(tmp_path)):
        model.set_posterior(source)
        with torch.no_grad():
            outputs.append(model(input_ids=ids, pixel_values=image))
    assert torch.equal(outputs[0].logits_var, outputs[1].logits_var)
    assert (outputs[0].logits_var > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contrast_size": 1}, "contrast_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"pseudo_data_count": 0.0}, "pseudo_data_count"),
        ({"image_column": "img"}, "no column 'img'; it has image, text"),
        ({"max_pairs": 1}, "at least 2"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_posterior(tiny_vlm(), Processor(), pairs(4), progress=False, **change)


@pytest.mark.parametrize("caption", ["", "   ", None, 7])
def test_bad_captions_are_named_by_row(caption: object) -> None:
    rows = pairs(4)
    rows[2]["text"] = caption
    with pytest.raises(ValueError, match="row 2"):
        estimate_posterior(tiny_vlm(), Processor(), rows, progress=False)


def test_no_pairs_at_all() -> None:
    with pytest.raises(ValueError, match="0 usable pairs"):
        estimate_posterior(tiny_vlm(), Processor(), [], progress=False)


def test_nan_weights_are_refused_before_the_work() -> None:
    vlm = tiny_vlm()
    with torch.no_grad():
        vlm.visual_projection.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        estimate_posterior(vlm, Processor(), pairs(4), progress=False)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc"
)
def test_memory_does_not_grow_with_the_number_of_pairs() -> None:
    script = Path(__file__).parent / "memory_of_estimation.py"
    done = subprocess.run(
        [sys.executable, str(script), "0", "1024", "8192"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    peaks = json.loads(done.stdout)
    assert peaks["8192"] <= 1.05 * peaks["1024"]
    # The pairs' own share of it, which the libraries' memory would hide: 8 k pairs take 28 MB and more.
    assert peaks["8192"] - peaks["1024"] < 15.0

"""Both pipelines with real processors: the stock task's scores and our task's uncertainties."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from PIL import Image
from transformers import AutoModelForZeroShotImageClassification, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from hf_bayesvlm import (
    BayesVLMForZeroShot,
    BayesVLMZeroShotImageClassificationPipeline,
    ImageInputError,
)
from hf_bayesvlm.acquisition import bald, entropy
from hf_bayesvlm.predictive import monte_carlo_probs

STOCK, OURS = "zero-shot-image-classification", "bayesvlm-zero-shot-image-classification"
LABELS = ["cat", "dog", "a pizza", "car"]
heads = pytest.mark.parametrize("family", ["clip", "siglip"])
UNCERTAINTIES = {"predictions", "entropy", "expected_entropy", "mutual_information"}


def picture(seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((48, 40), Image.Resampling.NEAREST)


@functools.cache
def _shared(family: str, task: str):
    return make(family, task)


def make(family: str = "clip", task: str = OURS, model=None, **options):
    return pipeline(
        task,
        model=tiny.fitted(family) if model is None else model,
        tokenizer=tiny.tiny_tokenizer(64),
        image_processor=tiny.tiny_image_processor(family),
        **options,
    )


def by_hand(pipe, image, labels=LABELS, template="This is a photo of {}.", **tokenizing):
    model = pipe.model
    pixels = pipe.image_processor(images=[image.convert("RGB")], return_tensors="pt")
    siglip = "siglip" in model.config.model_type
    padding = {"padding": "max_length", "max_length": 64} if siglip else {"padding": True}
    tokens = pipe.tokenizer(
        [template.format(label) for label in labels],
        return_tensors="pt",
        truncation=True,
        **padding | tokenizing,
    )
    with torch.no_grad():
        return model(pixel_values=pixels["pixel_values"].to(model.dtype), **tokens)


def by_label(result, key="score"):
    rows = result["predictions"] if isinstance(result, dict) else result
    return torch.tensor([{row["label"]: row[key] for row in rows}[label] for label in LABELS])


def probabilities(output, family):
    logits = output.logits_per_image[0]
    return logits.sigmoid() if "siglip" in family else logits.softmax(-1)


# ---------------------------------------------------------------------------- scores


@heads
@pytest.mark.parametrize("task", [STOCK, OURS])
def test_scores_are_the_predictive_probabilities(family, task):
    pipe, image = _shared(family, task), picture()
    result = pipe(image, candidate_labels=LABELS)
    expected = by_hand(pipe, image)
    torch.testing.assert_close(by_label(result), probabilities(expected, family))
    scores = [row["score"] for row in result]
    assert scores == sorted(scores, reverse=True)
    assert {row["label"] for row in result} == set(LABELS)
    if "siglip" not in family:
        assert sum(scores) == pytest.approx(1.0, abs=1e-5)
    # Not what the plain model says.
    plain = pipe.model.vlm(
        **pipe.image_processor(images=[image], return_tensors="pt"),
        **pipe.tokenizer(LABELS, padding="max_length", max_length=64, return_tensors="pt"),
    )
    assert not torch.allclose(probabilities(plain, family), by_label(result), rtol=1e-2)


@heads
@pytest.mark.parametrize("task", [STOCK, OURS])
def test_prompts_are_padded_as_in_training(family, task):
    pipe = make(family, task)
    shapes = []
    pipe.model.vlm.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    pipe(picture(), candidate_labels=["cat", "dog"])
    longest = len(pipe.tokenizer("This is a photo of cat.")["input_ids"])
    assert shapes == [(2, 64 if family == "siglip" else longest)]


@heads
def test_our_rows(family):
    pipe, image = _shared(family, OURS), picture()
    result = pipe(image, candidate_labels=LABELS)
    expected = by_hand(pipe, image)
    assert set(result[0]) == {"label", "score", "logit_mean", "logit_std"}
    torch.testing.assert_close(by_label(result, "logit_mean"), expected.logits_mean[0])
    torch.testing.assert_close(by_label(result, "logit_std"), expected.logits_var[0].sqrt())
    assert all(type(value) is float for row in result for k, value in row.items() if k != "label")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(family):
    if family == "siglip2":
        from transformers.models.siglip2.image_processing_pil_siglip2 import (
            Siglip2ImageProcessorPil,
        )

        processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
        pipe = pipeline(
            OURS,
            model=tiny.fitted(family),
            tokenizer=tiny.tiny_tokenizer(64),
            image_processor=processor,
        )
    else:
        pipe = make(family)
    images = [picture(seed) for seed in range(3)]
    one = [pipe(image, candidate_labels=LABELS) for image in images]
    many = pipe(images, candidate_labels=LABELS, batch_size=3)
    for first, second in zip(one, many, strict=True):
        torch.testing.assert_close(by_label(first), by_label(second), rtol=1e-4, atol=1e-6)


@heads
def test_top_k(family):
    pipe = _shared(family, OURS)
    full = pipe(picture(), candidate_labels=LABELS)
    assert pipe(picture(), candidate_labels=LABELS, top_k=2) == full[:2]
    assert pipe(picture(), candidate_labels=LABELS, top_k=99) == full
    result = pipe(picture(), candidate_labels=LABELS, top_k=1, return_uncertainty=True)
    assert result["predictions"] == full[:1]


@heads
def test_uncertainties(family):
    pipe, image = _shared(family, OURS), picture()
    result = pipe(image, candidate_labels=LABELS, return_uncertainty=True, num_samples=4000)
    assert set(result) == UNCERTAINTIES
    assert result["predictions"] == pipe(image, candidate_labels=LABELS)
    total = result["expected_entropy"] + result["mutual_information"]
    assert result["entropy"] == pytest.approx(total, abs=1e-5)
    assert result["mutual_information"] > 0
    # An independent Monte Carlo of both projections.
    model = pipe.model
    pixels = pipe.image_processor(images=[image], return_tensors="pt")
    tokens = pipe.tokenizer(
        [f"This is a photo of {label}." for label in LABELS],
        return_tensors="pt",
        padding="max_length",
        max_length=64,
    )
    with torch.no_grad():
        probs = monte_carlo_probs(
            model.encode_image(**pixels),
            model.encode_text(**tokens),
            model.covariance("image"),
            model.covariance("text"),
            likelihood=model.likelihood,
            logit_scale=model.logit_scale,
            logit_bias=model.logit_bias,
            num_samples=20000,
            generator=torch.Generator().manual_seed(9),
        )
    expected = entropy(probs.mean(1), likelihood=model.likelihood).item()
    assert result["entropy"] == pytest.approx(expected, rel=0.02)
    information = bald(probs, likelihood=model.likelihood).item()
    assert result["mutual_information"] == pytest.approx(information, rel=0.15)


@heads
def test_batches_do_not_change_the_numbers(family):
    pipe = _shared(family, OURS)
    images = [picture(seed) for seed in range(5)]
    options = {"candidate_labels": LABELS, "return_uncertainty": True}
    one = [pipe(image, **options) for image in images]
    for size in (1, 2, 5, 8):
        many = pipe(images, batch_size=size, **options)
        for first, second in zip(one, many, strict=True):
            for key in ("score", "logit_mean", "logit_std"):
                torch.testing.assert_close(
                    by_label(first, key), by_label(second, key), rtol=1e-4, atol=1e-5
                )
            for key in UNCERTAINTIES - {"predictions"}:
                assert first[key] == pytest.approx(second[key], rel=1e-3, abs=1e-5)


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    _shared("clip", OURS)(picture(), candidate_labels=LABELS, return_uncertainty=True)
    assert torch.equal(torch.random.get_rng_state(), before)


@heads
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("task", [STOCK, OURS])
def test_other_precisions(family, dtype, task):
    pipe = make(family, task, model=tiny.fitted(family).to(dtype))
    options = {} if task == STOCK else {"return_uncertainty": True}
    result = pipe(picture(), candidate_labels=LABELS, **options)
    expected = _shared(family, task)(picture(), candidate_labels=LABELS)
    torch.testing.assert_close(by_label(result), by_label(expected), rtol=0.2, atol=0.05)


def test_modalities_and_forms():
    pipe = make("clip")
    posterior = pipe.model.posterior
    seen = []
    for options in ({"modalities": "image"}, {"damping": "exact"}, {"covariance": "full"}):
        pipe.model.set_posterior(posterior.with_hyperparameters(**options))
        result = pipe(picture(), candidate_labels=LABELS, return_uncertainty=True)
        assert result["mutual_information"] > 0
        seen.append(result["predictions"][0]["logit_std"])
    assert len(set(seen)) == 3


# ---------------------------------------------------------------------------- prompts


def test_prompt_ensembles():
    pipe, image = _shared("clip", OURS), picture()
    templates = ["a photo of {}", "the drawing of a {}", "{}"]
    options = {"candidate_labels": LABELS}
    result = pipe(image, hypothesis_template=templates, **options)
    reverse = pipe(image, hypothesis_template=templates[::-1], **options)
    torch.testing.assert_close(by_label(result), by_label(reverse))
    single = pipe(image, hypothesis_template=templates[:1], **options)
    assert single == pipe(image, hypothesis_template=templates[0], **options)
    assert not torch.allclose(by_label(single), by_label(result))
    with torch.no_grad():
        text = pipe.model.encode_text(
            **pipe.tokenizer(
                [t.format(label) for label in LABELS for t in templates],
                padding=True,
                return_tensors="pt",
            )
        )
        fused = pipe.model.fuse_templates(text, 3)
        pixels = pipe.image_processor(images=[image], return_tensors="pt")
        mean, _ = pipe.model.similarity(pipe.model.encode_image(**pixels), fused)
    torch.testing.assert_close(by_label(result, "logit_mean"), mean[0])


@pytest.mark.parametrize("template", ["a drawing of {}", ["a {}", "the {}"]])
def test_default_template_of_the_model(template, tmp_path):
    model = tiny.fitted("clip")
    model.config.hypothesis_template = template
    tiny.save_bundle(model, tmp_path)
    pipe = pipeline(OURS, model=str(tmp_path))
    assert pipe.model.config.hypothesis_template == template
    result = pipe(picture(), candidate_labels=LABELS)
    plain = _shared("clip", OURS)
    assert result == plain(picture(), candidate_labels=LABELS, hypothesis_template=template)
    # An argument wins.
    other = pipe(picture(), candidate_labels=LABELS, hypothesis_template="{}")
    assert other == plain(picture(), candidate_labels=LABELS, hypothesis_template="{}")


@heads
def test_tokenizer_kwargs(family):
    pipe = _shared(family, OURS)
    expected = by_hand(pipe, picture(), max_length=4, padding="max_length")
    options = {"max_length": 4, "padding": "max_length"}
    result = pipe(picture(), candidate_labels=LABELS, tokenizer_kwargs=options)
    torch.testing.assert_close(by_label(result, "logit_mean"), expected.logits_mean[0])


@heads
def test_long_labels_are_cut(family):
    pipe = _shared(family, OURS)
    result = pipe(picture(), candidate_labels=["cat " * 200, "dog"])
    assert len(result) == 2


def test_options_at_construction_are_defaults():
    pipe = make(
        "clip",
        candidate_labels="cat, dog",
        hypothesis_template="a {}",
        top_k=1,
        return_uncertainty=True,
        num_samples=5,
    )
    result = pipe(picture())
    assert len(result["predictions"]) == 1
    assert len(pipe(picture(), candidate_labels=LABELS, top_k=3)["predictions"]) == 3
    assert isinstance(pipe(picture(), return_uncertainty=False), list)
    assert pipe(picture()) == result


# ---------------------------------------------------------------------------- the cache


def test_text_tower_runs_once_for_many_images():
    pipe = make("clip")
    runs = []
    pipe.model.vlm.text_model.register_forward_hook(lambda *_: runs.append(1))
    pipe([picture(seed) for seed in range(4)], candidate_labels=LABELS)
    pipe(picture(5), candidate_labels=LABELS, return_uncertainty=True)
    assert len(runs) == 1
    pipe.model.set_posterior(pipe.model.posterior.with_hyperparameters(pseudo_data_count=50))
    changed = pipe(picture(), candidate_labels=LABELS)
    assert len(runs) == 2
    expected = by_hand(pipe, picture())
    torch.testing.assert_close(by_label(changed, "logit_std"), expected.logits_var[0].sqrt())


# ---------------------------------------------------------------------------- inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")
    return folder


def test_every_kind_of_input(folder):
    pipe = _shared("clip", OURS)
    ask = functools.partial(pipe, candidate_labels=LABELS)
    paths = [folder / f"{seed}.png" for seed in range(3)]
    expected = [ask(picture(seed)) for seed in range(3)]
    data = paths[0].read_bytes()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.func.log_message = lambda *_: None
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/0.png"
        for one in (paths[0], str(paths[0]), data, base64.b64encode(data).decode(), url):
            assert ask(one) == expected[0]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert ask({"image": paths[0]}) == expected[0]
    assert ask(np.asarray(picture(0))) == expected[0]
    assert pipe(images=paths, candidate_labels=LABELS) == expected
    rows = Dataset.from_dict({"image": [str(p) for p in paths], "label": [0, 1, 2]})
    from datasets import Image as ImageFeature

    decoded = rows.cast_column("image", ImageFeature())
    encoded = rows.cast_column("image", ImageFeature(decode=False))
    stream = IterableDataset.from_generator(lambda: ({"image": str(p)} for p in paths))
    for many in (
        paths,
        tuple(paths),
        (picture(seed) for seed in range(3)),
        iter(paths),
        map(str, paths),
        KeyDataset(decoded, "image"),
        rows,
        decoded,
        encoded,
        decoded["image"],
        list(decoded),
        stream,
    ):
        assert list(ask(many)) == expected, type(many)
    assert (
        list(ask(decoded, batch_size=2)) == expected or len(list(ask(decoded, batch_size=2))) == 3
    )
    assert ask([]) == ask(()) == []
    assert list(ask(iter([]))) == []


def test_generators_are_not_read_ahead_of_time():
    read = []

    def images():
        for seed in range(5):
            read.append(seed)
            yield picture(seed)

    results = iter(_shared("clip", OURS)(images(), candidate_labels=LABELS))
    next(results)
    assert len(read) < 5
    assert len(list(results)) == 4


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (None, ValueError, "no images"),
        ("/nowhere/x.png", FileNotFoundError, "no image file"),
        (b"junk", ImageInputError, "not an image"),
        (torch.zeros(3, 4, 4), ImageInputError, "cannot load an image from Tensor"),
        (3, ImageInputError, "cannot load an image from int"),
        ({"train": []}, ImageInputError, "a row needs an 'image'; it has train"),
        ([picture(), b"junk"], ImageInputError, "not an image"),
        (Image.new("RGB", (0, 3)), ImageInputError, "no pixels"),
    ],
)
def test_bad_images(image, error, message):
    with pytest.raises(error, match=message):
        _shared("clip", OURS)(image, candidate_labels=LABELS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "candidate_labels are missing"),
        ({"candidate_labels": []}, ValueError, "empty"),
        ({"candidate_labels": ["cat", "cat"]}, ValueError, "more than once"),
        ({"candidate_labels": ["cat", ""]}, ValueError, "number 2 is empty"),
        ({"candidate_labels": [1]}, ValueError, "must be strings"),
        ({"candidate_labels": LABELS, "hypothesis_template": "x"}, ValueError, "has no"),
        ({"candidate_labels": LABELS, "hypothesis_template": "{"}, ValueError, "filled in"),
        ({"candidate_labels": LABELS, "top_k": 0}, ValueError, "top_k must be"),
        ({"candidate_labels": LABELS, "top_k": "3"}, ValueError, "top_k must be"),
        ({"candidate_labels": LABELS, "num_samples": True}, ValueError, "num_samples must be"),
        ({"candidate_labels": LABELS, "tok_k": 3}, TypeError, "unknown option tok_k"),
    ],
)
@pytest.mark.parametrize("image", [picture(), []], ids=["image", "no images"])
def test_bad_options(image, options, error, message):
    with pytest.raises(error, match=message):
        _shared("clip", OURS)(image, **options)


@heads
@pytest.mark.parametrize("with_posterior", [False, True])
@pytest.mark.parametrize("where", ["vision", "text"])
def test_nan_weights(family, with_posterior, where):
    pipe = make(family)
    if not with_posterior:
        pipe.model.set_posterior(None)
    tower = pipe.model.vlm.vision_model if where == "vision" else pipe.model.vlm.text_model
    with torch.no_grad():
        next(p for n, p in tower.named_parameters() if "layer_norm" in n).fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        pipe(picture(), candidate_labels=LABELS)


# ---------------------------------------------------------------------------- models


@heads
@pytest.mark.parametrize("task", [STOCK, OURS])
def test_unfitted_gives_the_plain_scores_and_warns_once(family, task, caplog):
    model = BayesVLMForZeroShot.from_vlm(tiny.tiny_vlm(family))
    pipe = make(family, task, model=model)
    logger = logging.getLogger("transformers")
    ours = logging.getLogger("hf_bayesvlm")
    handler = Lines()
    for each in (logger, ours):
        each.addHandler(handler)
    try:
        results = [pipe(picture(seed), candidate_labels=LABELS) for seed in range(3)]
    finally:
        for each in (logger, ours):
            each.removeHandler(handler)
    assert sum("no posterior" in line for line in handler.lines) == 1
    stock = make(family, STOCK, model=tiny.tiny_vlm(family))
    expected = stock(picture(0), candidate_labels=LABELS)
    torch.testing.assert_close(by_label(results[0]), by_label(expected))
    if task == OURS:
        assert {row["logit_std"] for row in results[0]} == {0.0}
        result = pipe(picture(), candidate_labels=LABELS, return_uncertainty=True)
        assert result["mutual_information"] == pytest.approx(0.0, abs=1e-5)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.mark.parametrize("positional", [False, True])
def test_a_plain_model_is_wrapped(positional):
    stock = tiny.tiny_vlm("clip")
    parts = {
        "tokenizer": tiny.tiny_tokenizer(64),
        "image_processor": tiny.tiny_image_processor(),
    }
    if positional:
        pipe = BayesVLMZeroShotImageClassificationPipeline(stock, **parts)
    else:
        pipe = BayesVLMZeroShotImageClassificationPipeline(model=stock, **parts)
    assert pipe.model.vlm is stock
    assert not pipe.model.is_fitted
    expected = make("clip", STOCK, model=tiny.tiny_vlm("clip"))(picture(), candidate_labels=LABELS)
    result = pipe(picture(), candidate_labels=LABELS)
    torch.testing.assert_close(by_label(result), by_label(expected))


@heads
@pytest.mark.parametrize("task", [STOCK, OURS])
def test_from_a_folder(family, task, tmp_path):
    tiny.save_bundle(tiny.fitted(family), tmp_path, family)
    pipe = pipeline(task, model=str(tmp_path))
    assert isinstance(pipe.model, BayesVLMForZeroShot)
    expected = _shared(family, task)(picture(), candidate_labels=LABELS)
    torch.testing.assert_close(
        by_label(pipe(picture(), candidate_labels=LABELS)), by_label(expected)
    )
    loaded = AutoModelForZeroShotImageClassification.from_pretrained(tmp_path)
    assert loaded.config.model_type == f"bayesvlm_{family}"


def test_plain_checkpoint_from_a_folder(tmp_path):
    tiny.save_bundle(tiny.tiny_vlm("clip"), tmp_path)
    pipe = pipeline(OURS, model=str(tmp_path))
    assert not pipe.model.is_fitted
    assert len(pipe(picture(), candidate_labels=LABELS)) == 4


def test_stock_pipeline_says_nothing_about_the_model_type(capsys):
    handler = Lines()
    logging.getLogger("transformers").addHandler(handler)
    try:
        make("clip", STOCK)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not [line for line in handler.lines if "not supported" in line]


def test_threads_that_share_a_pipeline_do_not_mix():
    pipe = make("clip")
    images = [picture(seed) for seed in range(2)]
    options = {"candidate_labels": LABELS, "return_uncertainty": True, "num_samples": 20}
    expected = [pipe(image, **options) for image in images]
    pipe.label_cache.clear()
    wrong = []

    def work(index: int) -> None:
        for _ in range(40):
            if pipe(images[index], **options) != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_worker_processes():
    pipe = _shared("clip", OURS)
    images = [picture(seed) for seed in range(4)]
    expected = pipe(images, candidate_labels=LABELS, batch_size=2)
    assert pipe(images, candidate_labels=LABELS, batch_size=2, num_workers=2) == expected


def test_save_pretrained(tmp_path):
    pipe = _shared("clip", OURS)
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = pipeline(OURS, model=str(tmp_path))
    assert again(picture(), candidate_labels=LABELS) == pipe(picture(), candidate_labels=LABELS)


def test_bundle_that_carries_its_code_uses_the_installed_package(tmp_path):
    tiny.save_bundle(tiny.fitted("clip"), tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    model_class = "modeling_bayesvlm.BayesVLMForZeroShot"
    config["auto_map"] = {
        "AutoConfig": "configuration_bayesvlm.BayesVLMConfig",
        "AutoModel": model_class,
        "AutoModelForZeroShotImageClassification": model_class,
    }
    config["custom_pipelines"] = {
        OURS: {
            "impl": "pipeline.BayesVLMZeroShotImageClassificationPipeline",
            "pt": ["AutoModelForZeroShotImageClassification"],
        }
    }
    file.write_text(json.dumps(config))
    pipe = pipeline(OURS, model=str(tmp_path))
    assert type(pipe) is BayesVLMZeroShotImageClassificationPipeline
    assert type(pipe.model) is BayesVLMForZeroShot
    assert len(pipe(picture(), candidate_labels="cat,dog")) == 2


def test_model_made_in_inference_mode():
    with torch.inference_mode():
        pipe = make("clip")
        inside = pipe(picture(), candidate_labels=LABELS)
    assert pipe(picture(), candidate_labels=LABELS) == inside


def test_jpeg_in_memory():
    stream = io.BytesIO()
    picture().save(stream, "JPEG")
    assert len(_shared("clip", OURS)(stream.getvalue(), candidate_labels="cat,dog")) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_device_gives_the_same_and_has_label_sets_of_its_own(dtype):
    model = tiny.fitted("clip")
    tools = {"tokenizer": tiny.tiny_tokenizer(), "image_processor": tiny.tiny_image_processor()}
    pipe = pipeline(OURS, model=model, device="cpu", **tools)
    image = Image.new("RGB", (40, 40), (200, 30, 60))
    options = {"candidate_labels": ["cat", "dog"], "return_uncertainty": True}
    expected = pipe(image, **options)
    moved = pipeline(OURS, model=model.to("cuda", dtype), device="cuda", **tools)
    moved.label_cache = pipe.label_cache
    found = moved(image, **options)
    assert len(moved.label_cache) == 2
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert found["entropy"] == pytest.approx(expected["entropy"], abs=tolerance)

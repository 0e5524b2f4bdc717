"""The model and images that the package ships."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

import hf_bayesvlm
from hf_bayesvlm import EMBEDDED_MODEL, BayesVLMForZeroShot, sample_images

LABELS = [
    "dog face",
    "cat face",
    "pizza",
    "rocket",
    "automobile",
    "red apple",
    "soccer ball",
    "airplane",
    "bicycle",
    "house",
    "guitar",
    "umbrella",
]


@pytest.fixture(scope="module")
def model() -> BayesVLMForZeroShot:
    return BayesVLMForZeroShot.from_pretrained(EMBEDDED_MODEL)


def test_the_bundle_is_small_and_complete(model: BayesVLMForZeroShot) -> None:
    folder = Path(EMBEDDED_MODEL)
    assert (folder / "model.safetensors").stat().st_size < 12e6
    assert not list(folder.glob("*.bin"))
    assert model.is_fitted
    assert model.dtype == torch.float32
    posterior = model.posterior
    assert posterior is not None
    assert posterior.num_pairs == 4820
    assert (posterior.base_model, posterior.dataset) == ("emoji-styles-clip", "emoji-styles")
    # No folder of the machine it was made on.
    config = json.dumps(json.loads((folder / "config.json").read_text("utf-8")))
    assert not re.findall(r'"(?:/|[A-Z]:\\\\)[^"]*"', config)
    # The fingerprint that the posterior was estimated with is that of the weights in the file.
    assert posterior.fingerprint == model.base_fingerprint()


def test_auto_classes_load_it() -> None:
    assert type(AutoModel.from_pretrained(EMBEDDED_MODEL)) is BayesVLMForZeroShot
    processor = AutoProcessor.from_pretrained(EMBEDDED_MODEL)
    assert type(processor).__name__ == "CLIPProcessor"


def test_samples_are_images_with_a_source() -> None:
    samples = sample_images()
    assert 8 <= len(samples) <= 12
    attribution = Path(samples[0].path).with_name("ATTRIBUTION.md").read_text()
    for sample in samples:
        with Image.open(sample.path) as image:
            assert image.mode == "RGB"
        assert sample.style.startswith("fluent-emoji")
        assert sample.license == "MIT"
        assert sample.author in attribution


def test_most_samples_are_recognised() -> None:
    pipe = pipeline("bayesvlm-zero-shot-image-classification", model=EMBEDDED_MODEL)
    samples = [sample for sample in sample_images() if sample.label in LABELS]
    results = pipe([sample.path for sample in samples], candidate_labels=LABELS, batch_size=4)
    right = [
        result[0]["label"] == sample.label for sample, result in zip(samples, results, strict=True)
    ]
    assert sum(right) >= 0.7 * len(right)
    assert all(prediction["logit_std"] > 0 for result in results for prediction in result)


def test_both_pipelines_agree() -> None:
    path = sample_images()[0].path
    ours = pipeline("bayesvlm-zero-shot-image-classification", model=EMBEDDED_MODEL)
    stock = pipeline("zero-shot-image-classification", model=EMBEDDED_MODEL)
    expected = {row["label"]: row["score"] for row in stock(path, candidate_labels=LABELS)}
    found = {row["label"]: row["score"] for row in ours(path, candidate_labels=LABELS)}
    assert found == pytest.approx(expected, abs=1e-4)


def test_noise_is_less_certain_than_the_samples() -> None:
    pipe = pipeline("bayesvlm-zero-shot-image-classification", model=EMBEDDED_MODEL)
    generator = torch.Generator().manual_seed(0)
    noise = [
        torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8).numpy()
        for _ in range(5)
    ]
    options = {"candidate_labels": LABELS, "return_uncertainty": True}
    clear = [row["entropy"] for row in pipe([s.path for s in sample_images()], **options)]
    blurred = [row["entropy"] for row in pipe(noise, **options)]
    assert sum(blurred) / len(blurred) > sum(clear) / len(clear)


def test_the_card_states_measured_results() -> None:
    card = ModelCard.load(Path(EMBEDDED_MODEL) / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    results = {
        (result.dataset_name, result.metric_type): result.metric_value
        for result in card.data.eval_results
    }
    for style in ("fluent-emoji-flat", "fluent-emoji-high-contrast"):
        for metric in ("accuracy", "nlpd", "ece"):
            assert results[(f"EmojiStyles {style}", metric)] >= 0
    for word in ("MAP", "NLPD", "ECE", "held-out", "2412.06014"):
        assert word in card.content


def test_it_loads_without_a_network(tmp_path: Path) -> None:
    code = (
        "import hf_bayesvlm, socket\n"
        "def refuse(*_): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "from transformers import pipeline\n"
        "pipe = pipeline('bayesvlm-zero-shot-image-classification', model=hf_bayesvlm.EMBEDDED_MODEL)\n"
        "image = hf_bayesvlm.sample_images()[0].path\n"
        "print(pipe(image, candidate_labels=['animal', 'food'])[0]['label'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("animal", "food")


def test_public_names_exist() -> None:
    for name in hf_bayesvlm.__all__:
        assert hasattr(hf_bayesvlm, name)

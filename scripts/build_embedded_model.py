"""Turn the trained emoji CLIP into the bundle that the package ships.

    python scripts/build_embedded_model.py emoji-clip emoji-styles hf_bayesvlm/assets/emoji-styles-clip

Estimates the posterior on the training pairs, chooses its hyperparameters on `validation`, measures
MAP and Bayesian predictions on `test` once, and writes model, processor, posterior and card.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from emoji_card import write_card
from emoji_evaluation import Embedded, Scores, embed_everything, evaluate
from emoji_styles import STOCK_TEMPLATE, load_emoji_styles, on_background
from tqdm.auto import tqdm
from transformers import AutoProcessor

from hf_bayesvlm import (
    BayesVLMForZeroShot,
    BayesVLMPosterior,
    PosteriorError,
    estimate_posterior,
)

COUNTS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
BASE_MODEL = "emoji-styles-clip"
SELECTION_SLICES = ("in-style", "openmoji")
# A choice must not cost more accuracy than this against the plain model, averaged over the slices.
MAX_ACCURACY_LOSS = 0.002


class Captioned:
    """Training pairs: a drawing on white and its name in the stock prompt.

    Args:
        split: The training split.
    """

    def __init__(self, split: Dataset) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.split:
            text = STOCK_TEMPLATE.format(row["text"])
            yield {"image": on_background(row["image"]), "text": text}


def candidates(posterior: BayesVLMPosterior) -> Iterator[BayesVLMPosterior]:
    """Every combination of hyperparameters that is tried on validation."""
    settings = itertools.product(
        COUNTS,
        ("reference", "evidence"),
        ("diagonal", "full"),
        ("factored", "exact"),
        ("both", "image"),
    )
    for count, objective, covariance, damping, modalities in settings:
        try:
            yield posterior.with_hyperparameters(
                pseudo_data_count=count,
                objective=objective,  # type: ignore[arg-type]
                covariance=covariance,  # type: ignore[arg-type]
                damping=damping,  # type: ignore[arg-type]
                modalities=modalities,  # type: ignore[arg-type]
            )
        except PosteriorError:
            # The reference objective: never for exact damping, and without a maximum for few pairs.
            if objective != "reference":
                raise


def selection_score(scores: list[Scores], metric: str) -> float:
    """Mean of a metric over the selection slices and all their tasks."""
    values = [s.values[metric] for s in scores if s.slice in SELECTION_SLICES]
    return sum(values) / len(values)


def choose(
    model: BayesVLMForZeroShot, posterior: BayesVLMPosterior, data: Embedded
) -> tuple[BayesVLMPosterior, list[dict[str, Any]]]:
    """Lowest validation NLPD among the posteriors that keep the plain model's accuracy.

    Args:
        model: The model; its posterior is replaced.
        posterior: The estimated factors.
        data: Embeddings of the validation split.

    Returns:
        The chosen posterior and a table of all that were tried, best first.
    """
    plain = selection_score(evaluate(model, data, bayesian=False), "accuracy")
    tried: list[tuple[BayesVLMPosterior, dict[str, Any]]] = []
    for candidate in tqdm(list(candidates(posterior)), desc="choosing", leave=False):
        model.set_posterior(candidate)
        scores = evaluate(model, data)
        row = {
            "pseudo_data_count": candidate.image.pseudo_data_count,
            "objective": candidate.objective,
            "covariance": candidate.covariance,
            "damping": candidate.damping,
            "modalities": candidate.modalities,
            "image_prior_precision": candidate.image.prior_precision,
            "text_prior_precision": candidate.text.prior_precision,
        }
        row |= {name: selection_score(scores, name) for name in ("nlpd", "ece", "accuracy")}
        tried.append((candidate, row))
    tried.sort(key=lambda item: item[1]["nlpd"])
    keeping = [item for item in tried if item[1]["accuracy"] >= plain - MAX_ACCURACY_LOSS]
    return (keeping or tried)[0][0], [row for _, row in tried]


def fit_temperature(model: BayesVLMForZeroShot, data: Embedded) -> float:
    """Temperature of the plain model with the lowest validation NLPD, by golden-section search."""

    def loss(log_temperature: float) -> float:
        scores = evaluate(
            model, data, bayesian=False, temperature=torch.tensor(log_temperature).exp().item()
        )
        return selection_score(scores, "nlpd")

    ratio, low, high = (5**0.5 - 1) / 2, -1.5, 2.5
    while high - low > 1e-3:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return float(torch.tensor(0.5 * (low + high)).exp())


def data_revision(folder: Path) -> str:
    """SHA-256 over the data set's files: its revision where it is not on the Hub."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("data/*.parquet")):
        digest.update(file.read_bytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def save_bundle(model: BayesVLMForZeroShot, processor: Any, folder: Path) -> None:
    """Save model and processor: weights in half precision, to be loaded in single."""
    if folder.exists():
        shutil.rmtree(folder)
    model.vlm.half()
    model.save_pretrained(folder)
    model.vlm.float()
    processor.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    # CPUs compute slowly in half precision; the file is small in it.
    for section in (config, config["vlm_config"], *_sections(config["vlm_config"])):
        section["dtype"] = "float32"
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [config[name] for name in ("text_config", "vision_config")]


def main(arguments: list[str] | None = None) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("clip", type=Path, help="folder of the trained CLIP")
    parser.add_argument("data", type=Path, help="folder of the data set")
    parser.add_argument("out", type=Path, help="folder of the bundle; replaced")
    parser.add_argument("--contrast-size", type=int, default=32768)
    options = parser.parse_args(arguments)

    dataset = load_emoji_styles(options.data)
    processor = AutoProcessor.from_pretrained(options.clip)
    model = BayesVLMForZeroShot.from_pretrained(options.clip, dtype=torch.float32)
    posterior = estimate_posterior(
        model,
        processor,
        Captioned(dataset["train"]),
        contrast_size=options.contrast_size,
        base_model=BASE_MODEL,
        dataset_name="emoji-styles",
        dataset_revision=data_revision(options.data),
    )
    validation = embed_everything(model, processor, dataset, ["validation"])
    chosen, tried = choose(model, posterior, validation)
    temperature = fit_temperature(model, validation)
    model.set_posterior(chosen)

    test = embed_everything(model, processor, dataset, ["test"])
    report = {
        "chosen": _summary(chosen),
        "tried": tried,
        "temperature": temperature,
        "results": {
            split: {
                "map": [asdict(s) for s in evaluate(model, data, bayesian=False)],
                "temperature": [
                    asdict(s)
                    for s in evaluate(model, data, bayesian=False, temperature=temperature)
                ],
                "bayes": [asdict(s) for s in evaluate(model, data)],
            }
            for split, data in (("validation", validation), ("test", test))
        },
    }
    save_bundle(model, processor, options.out)
    summary = options.clip / "training_summary.json"
    report["training"] = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    (options.out / "evaluation.json").write_text(
        json.dumps(report, indent=1) + "\n", encoding="utf-8"
    )
    write_card(report, options.out / "README.md")
    print(f"wrote {options.out}")
    return 0


def _summary(posterior: BayesVLMPosterior) -> dict[str, Any]:
    return {
        "pseudo_data_count": posterior.image.pseudo_data_count,
        "objective": posterior.objective,
        "covariance": posterior.covariance,
        "damping": posterior.damping,
        "modalities": posterior.modalities,
        "image_prior_precision": posterior.image.prior_precision,
        "text_prior_precision": posterior.text.prior_precision,
        "num_pairs": posterior.num_pairs,
        "contrast_size": posterior.contrast_size,
    }


if __name__ == "__main__":
    sys.exit(main())

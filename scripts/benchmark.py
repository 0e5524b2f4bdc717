"""Speed ratios, measured side by side in one run.

    python scripts/benchmark.py --json build/benchmark.json

Each pair of competitors is timed in turn, A B A B ..., and the medians are divided: a machine that slows
down slows both.  `benchmark_scaling.py` measures how the cost of estimation grows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import benchmark_scaling
import numpy as np
import torch
from benchmark_common import interleaved, print_rows, textbook_ggn, write_json
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, pipeline
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import hf_bayesvlm
from hf_bayesvlm import BayesVLMForZeroShot, BayesVLMPosterior, ModalityPosterior
from hf_bayesvlm.cosine import gaussian_embedding
from hf_bayesvlm.curvature import info_nce_ggn
from hf_bayesvlm.label_cache import LabelSet
from hf_bayesvlm.pipeline import TASK, image_uncertainty
from hf_bayesvlm.predictive import predictive_probs, probit_logits

THINGS = (
    *("golden retriever", "sports car", "grand piano", "fire engine", "coffee mug"),
    *("mountain bike", "polar bear", "school bus", "tennis ball", "water bottle"),
)
PLACES = (
    *("in the snow", "on a table", "at night", "in a forest", "by the sea"),
    *("in the rain", "on a street", "in a box", "under a tree", "in a museum"),
)


@dataclass(frozen=True)
class Comparison:
    """One line of the table.

    Attributes:
        name: What is compared.
        baseline: What it is compared with.
        baseline_seconds: Median time of the baseline.
        seconds: Median time of ours.
        ratio: Baseline over ours, or a share where `target` says "<=".
        target: What the project asks for.
    """

    name: str
    baseline: str
    baseline_seconds: float
    seconds: float
    ratio: float
    target: str


def random_clip(seed: int = 0) -> CLIPModel:
    """A CLIP of the size of ViT-B/32 with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPModel(CLIPConfig()).eval()


def random_posterior(model: BayesVLMForZeroShot, seed: int = 0) -> BayesVLMPosterior:
    """A posterior with random factors of the right size."""
    generator = torch.Generator().manual_seed(seed)

    def factor(size: int) -> Tensor:
        root = torch.randn(size, size, generator=generator)
        return root @ root.T

    parts = {
        name: ModalityPosterior(factor(w.shape[1]), factor(w.shape[0]), 1.0, 1000.0)
        for name, w in model.projection_weights().items()
    }
    return BayesVLMPosterior(parts["image"], parts["text"], likelihood="softmax")


def bench_pipelines(clip: CLIPModel, model: BayesVLMForZeroShot, runs: int) -> Comparison:
    """Our pipeline with a posterior against the stock pipeline with the plain model, 100 labels."""
    pixels = np.random.default_rng(0).integers(0, 256, (256, 320, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    labels = [f"{thing} {place}" for thing in THINGS for place in PLACES]
    tools: dict[str, Any] = {
        "tokenizer": AutoTokenizer.from_pretrained(hf_bayesvlm.EMBEDDED_MODEL),
        "image_processor": CLIPImageProcessorPil(),
        "device": "cpu",
    }
    stock = pipeline("zero-shot-image-classification", model=clip, **tools)
    ours = pipeline(TASK, model=model, **tools)  # type: ignore[call-overload]
    stock_seconds, our_seconds = interleaved(
        lambda: stock(image, candidate_labels=labels),
        lambda: ours(image, candidate_labels=labels, return_uncertainty=True),
        runs,
    )
    return Comparison(
        "our pipeline with uncertainties and cached labels, per image",
        "stock pipeline, plain CLIP ViT-B/32, 100 labels",
        stock_seconds,
        our_seconds,
        stock_seconds / our_seconds,
        ">= 8",
    )


def bench_head(model: BayesVLMForZeroShot, runs: int, *, uncertainty: bool) -> Comparison:
    """Everything after the towers against the image tower, batch of 8, 100 labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(8, 3, 224, 224, generator=generator)
    ids = torch.randint(0, 2000, (100, 12), generator=generator)
    with torch.no_grad():
        text = model.encode_text(input_ids=ids)
        image = model.encode_image(pixel_values=pixels)
    labels = LabelSet(tuple(map(str, range(100))), text)
    # Checking that cached labels are still valid is part of what every batch pays.
    run_image_tower: Callable[..., Any] = cast(Any, model.vlm).get_image_features

    def tower() -> None:
        with torch.no_grad():
            run_image_tower(pixel_values=pixels)

    def head() -> None:
        with torch.no_grad():
            model.state_version()
            rows = gaussian_embedding(image.mean, image.features, model.covariance("image"))
            mean, var = model.similarity(rows, text)
            predictive_probs(probit_logits(mean, var), model.likelihood)
            if uncertainty:
                image_uncertainty(model, rows, labels, model.config.num_samples)

    tower_seconds, head_seconds = interleaved(tower, head, runs)
    samples = f" and entropies of {model.config.num_samples} samples" if uncertainty else ""
    return Comparison(
        f"Bayesian head: covariance, mean, variance, probit{samples}",
        "image tower of ViT-B/32, batch 8",
        tower_seconds,
        head_seconds,
        head_seconds / tower_seconds,
        "<= 0.03",
    )


def bench_curvature(runs: int, features: int = 512, candidates: int = 16384) -> Comparison:
    """Curvature of one row by GEMMs against the batched formula."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(2048, features, generator=generator)
    target = torch.randn(candidates, features, generator=generator)
    rows = 8
    expected = textbook_ggn(source[:rows].double(), target.double(), 100.0)
    error = (info_nce_ggn(source[:rows], target, 100.0) - expected).norm() / expected.norm()
    assert error < 1e-4, f"the two formulas disagree: {error}"
    slow, fast = interleaved(
        lambda: textbook_ggn(source[:rows], target, 100.0),
        lambda: info_nce_ggn(source, target, 100.0),
        runs,
    )
    slow, fast = slow / rows, fast / source.shape[0]
    name = f"info_nce_ggn, per row, D = {features}, C = {candidates:,}"
    return Comparison(name, "batched textbook formula", slow, fast, slow / fast, ">= 100")


def print_table(comparisons: list[Comparison]) -> None:
    """Print the comparisons."""
    rows = [
        (
            row.name,
            row.baseline,
            f"{1e3 * row.baseline_seconds:.3f}",
            f"{1e3 * row.seconds:.3f}",
            f"{row.ratio:.4f}" if row.ratio < 1 else f"{row.ratio:.1f}",
            row.target,
        )
        for row in comparisons
    ]
    columns = ("ours", "against", "its ms", "our ms", "ratio", "target")
    print_rows("hf_bayesvlm, side by side", columns, rows, texts=2)


def main(arguments: list[str] | None = None) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each competitor")
    parser.add_argument(
        "--scaling",
        type=Path,
        metavar="PAGE",
        help="measure the cost of estimation too and write this page (about half an hour)",
    )
    options = parser.parse_args(arguments)
    clip = random_clip()
    model = BayesVLMForZeroShot.from_vlm(random_clip())
    model.set_posterior(random_posterior(model))
    comparisons = [
        bench_pipelines(clip, model, options.runs),
        bench_head(model, 3 * options.runs, uncertainty=False),
        bench_head(model, 3 * options.runs, uncertainty=True),
        bench_curvature(max(3, options.runs // 2)),
    ]
    print_table(comparisons)
    if options.json is not None:
        write_json(options.json, {"comparisons": [asdict(row) for row in comparisons]})
    if options.scaling is not None:
        return benchmark_scaling.main(["--write", str(options.scaling)])
    return 0


if __name__ == "__main__":
    sys.exit(main())

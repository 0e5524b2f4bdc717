"""How the number of pairs and the contrast size of a posterior change validation metrics.

    python scripts/sensitivity.py emoji-styles emoji-clip --write model_cards/sensitivity.md

The towers run once over the training pairs and the validation split; every posterior is then a few matrix
products.  The test split is not used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from build_embedded_model import (
    COUNTS,
    MAX_ACCURACY_LOSS,
    SELECTION_SLICES,
    data_revision,
    selection_score,
)
from datasets import Dataset, DatasetDict
from emoji_evaluation import Embedded, Scores, embed_everything, embed_images, evaluate
from emoji_styles import STOCK_TEMPLATE, load_emoji_styles
from sensitivity_report import EVIDENCE_COUNT, FIXED_COUNT, Sensitivity, Trial, write_report
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoProcessor

from hf_bayesvlm import (
    BayesVLMForZeroShot,
    BayesVLMPosterior,
    GaussianEmbedding,
    ModalityPosterior,
    PosteriorError,
)
from hf_bayesvlm.curvature import CurvatureAccumulator
from hf_bayesvlm.label_cache import encode_labels, tokenizer_settings

# Fewer pairs may need larger counts than the ones that are tried for the embedded model.
_COUNTS = (*COUNTS, 200.0, 500.0)
_SPLIT = "validation"


@dataclass(frozen=True)
class Pairs:
    """Embeddings of the training pairs, one row a pair.

    Attributes:
        image: Of the drawings.
        text: Of the captions.
    """

    image: GaussianEmbedding
    text: GaussianEmbedding

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, rows: Tensor) -> Pairs:
        """The pairs of these rows."""
        return Pairs(self.image[rows], self.text[rows])


def embed_training_pairs(model: BayesVLMForZeroShot, processor: Any, split: Dataset) -> Pairs:
    """Run both towers once over the training pairs: a drawing on white, its name in the stock prompt.

    Args:
        model: The model; its posterior does not matter.
        processor: Its processor.
        split: The training split.

    Returns:
        The embeddings, in the order of the split.
    """
    names = list(split["text"])
    # Five styles draw the same thing: each name is encoded once.
    distinct = {name: row for row, name in enumerate(dict.fromkeys(names))}
    settings = tokenizer_settings(model, processor.tokenizer)
    with torch.no_grad():
        texts = encode_labels(model, processor.tokenizer, [*distinct], [STOCK_TEMPLATE], settings)
    return Pairs(
        image=embed_images(model, processor, split),
        text=texts[torch.tensor([distinct[name] for name in names])],
    )


def settings_grid(
    total: int, pair_counts: Sequence[int], contrasts: Sequence[int]
) -> list[tuple[int, int]]:
    """Numbers of pairs and the contrast sizes below each; the last contrast size is all its pairs.

    Args:
        total: Training pairs there are; this number is always part of the grid.
        pair_counts: Numbers of pairs; those that are not below `total` are left out.
        contrasts: Contrast sizes; those that are not below the number of pairs are left out.

    Returns:
        Pairs and contrast size, both rising.
    """
    counts = [*sorted(count for count in set(pair_counts) if count < total), total]
    return [
        (count, contrast)
        for count in counts
        for contrast in [*sorted(c for c in set(contrasts) if c < count), count]
    ]


def random_rows(total: int, count: int, seed: int) -> Tensor:
    """The first `count` of `total` rows in a random order: larger subsets contain smaller ones."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]


def posterior_of(model: BayesVLMForZeroShot, pairs: Pairs, contrast: int) -> BayesVLMPosterior:
    """Fold pairs into a posterior, block by block in their order.

    Args:
        model: The model they were embedded by.
        pairs: Their embeddings.
        contrast: Contrast size; a last block of one pair is left out, as in estimation.

    Returns:
        The posterior with the prior precisions of one count; set others by `with_hyperparameters`.
    """
    bias = model.logit_bias if model.likelihood == "sigmoid" else 0.0
    sums = {
        name: CurvatureAccumulator(model.likelihood, model.logit_scale, bias)
        for name in ("image", "text")
    }
    for rows in torch.arange(len(pairs)).split(contrast):
        if len(rows) > 1:
            block = pairs[rows]
            image, text = block.image, block.text
            sums["image"].update(image.features, image.mean, text.mean)
            sums["text"].update(text.features, text.mean, image.mean)
    weights = model.projection_weights()
    parts: dict[str, ModalityPosterior] = {}
    for name, accumulator in sums.items():
        factors = accumulator.factors()
        parts[name] = ModalityPosterior(
            A=factors.A.float(),
            B=factors.B.float(),
            pseudo_data_count=1.0,
            prior_precision=1.0,
            weight_norm_squared=float(weights[name].double().square().sum()),
        )
    return BayesVLMPosterior(
        image=parts["image"],
        text=parts["text"],
        likelihood=model.likelihood,
        modalities="image",
        fingerprint=model.base_fingerprint(),
        num_pairs=sums["image"].num_pairs,
        contrast_size=contrast,
    )


def with_count(posterior: BayesVLMPosterior, count: float) -> BayesVLMPosterior:
    """The same factors under another pseudo-data count, with the prior precisions chosen anew.

    By the reference objective, and by the evidence where that has no maximum, as in estimation.
    """
    try:
        return posterior.with_hyperparameters(pseudo_data_count=count, objective="reference")
    except PosteriorError:
        return posterior.with_hyperparameters(pseudo_data_count=count, objective="evidence")


def try_posteriors(
    model: BayesVLMForZeroShot, posteriors: Sequence[BayesVLMPosterior], data: Embedded
) -> list[tuple[BayesVLMPosterior, list[Scores]]]:
    """Evaluate posteriors.

    Args:
        model: The model; its posterior is replaced.
        posteriors: What to evaluate.
        data: Embeddings of the validation split.

    Returns:
        Each posterior and its scores.
    """
    outcomes: list[tuple[BayesVLMPosterior, list[Scores]]] = []
    for posterior in posteriors:
        model.set_posterior(posterior)
        outcomes.append((posterior, evaluate(model, data)))
    return outcomes


def best_outcome(
    outcomes: list[tuple[BayesVLMPosterior, list[Scores]]], plain_accuracy: float
) -> tuple[BayesVLMPosterior, list[Scores]]:
    """Lowest NLPD on the selection slices among those that keep the plain model's accuracy.

    Args:
        outcomes: From `try_posteriors`.
        plain_accuracy: Of the plain model, on the same slices.

    Returns:
        One of the outcomes.
    """
    enough = plain_accuracy - MAX_ACCURACY_LOSS
    keeping = [item for item in outcomes if selection_score(item[1], "accuracy") >= enough]
    return min(keeping or outcomes, key=lambda item: selection_score(item[1], "nlpd"))


def measure(
    model: BayesVLMForZeroShot,
    pairs: Pairs,
    data: Embedded,
    grid: Sequence[tuple[int, int]],
    seeds: Sequence[int],
) -> tuple[list[Scores], list[Trial]]:
    """Measure every setting of the grid with every seed.

    Args:
        model: The model; its posterior is replaced.
        pairs: All training pairs.
        data: Embeddings of the validation split.
        grid: From `settings_grid`.
        seeds: Of the order of the pairs, which sets both the subset and the blocks.

    Returns:
        Scores of the plain model, and one trial for each of `SETTINGS`, cell of the grid and seed.
    """
    plain = evaluate(model, data, bayesian=False)
    plain_accuracy = selection_score(plain, "accuracy")
    trials: list[Trial] = []
    jobs = [
        (count, contrast, seed)
        for count, contrast in grid
        # All pairs in one block are the same in every order.
        for seed in (seeds[:1] if count == contrast == len(pairs) else seeds)
    ]
    for count, contrast, seed in tqdm(jobs, desc="posteriors", leave=False):
        rows = random_rows(len(pairs), count, seed)
        posterior = posterior_of(model, pairs[rows], contrast)
        outcomes = try_posteriors(model, [with_count(posterior, count) for count in _COUNTS], data)
        evidence = posterior.with_hyperparameters(
            pseudo_data_count=EVIDENCE_COUNT, objective="evidence"
        )
        results = {
            "fixed": outcomes[_COUNTS.index(FIXED_COUNT)],
            "evidence": try_posteriors(model, [evidence], data)[0],
            "chosen": best_outcome(outcomes, plain_accuracy),
        }
        for setting, (candidate, scores) in results.items():
            trial = Trial(
                pairs=count,
                contrast=contrast,
                seed=seed,
                setting=setting,
                pseudo_data_count=candidate.image.pseudo_data_count,
                prior_precision=candidate.image.prior_precision,
                objective=candidate.objective,
                scores=tuple(scores),
            )
            trials.append(trial)
    return plain, trials


def main(arguments: list[str] | None = None) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the data set")
    parser.add_argument("model", type=Path, help="folder of the trained CLIP")
    parser.add_argument("--write", type=Path, help="write the report here")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1000, 4000], help="of the subsets")
    parser.add_argument("--contrasts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--seeds", type=int, default=5, help="random orders of the pairs")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: standard errors come from the spread over seeds")
    if min(*options.pairs, *options.contrasts) < 2:
        parser.error("--pairs and --contrasts must be at least 2: a pair needs others")

    everything = load_emoji_styles(options.data)
    # What is not there cannot be looked at.
    dataset = DatasetDict({split: everything[split] for split in ("train", _SPLIT)})
    processor = AutoProcessor.from_pretrained(options.model)
    model = BayesVLMForZeroShot.from_pretrained(options.model, dtype=torch.float32)
    pairs = embed_training_pairs(model, processor, dataset["train"])
    data = embed_everything(model, processor, dataset, [_SPLIT])
    grid = settings_grid(len(pairs), options.pairs, options.contrasts)
    plain, trials = measure(model, pairs, data, grid, range(options.seeds))
    report = Sensitivity(
        data_revision=data_revision(options.data),
        total=len(pairs),
        seeds=options.seeds,
        counts=_COUNTS,
        selection_slices=SELECTION_SLICES,
        plain=tuple(plain),
        trials=tuple(trials),
    )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    if options.write is not None:
        write_report(report, options.write)
        print(f"wrote {options.write}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

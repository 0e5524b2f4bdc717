"""Score a model on the zero-shot tasks of the emoji-styles data set.

Images and labels are embedded once (`embed_images`, `embed_labels`); every posterior and every method
is then a few matrix products on the same embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset, DatasetDict
from emoji_styles import Slice, ZeroShotTask, evaluation_slices, on_background, zero_shot_tasks
from torch import Tensor
from tqdm.auto import tqdm

from hf_bayesvlm import BayesVLMForZeroShot, GaussianEmbedding
from hf_bayesvlm.cosine import gaussian_embedding
from hf_bayesvlm.label_cache import DEFAULT_TEMPLATE, encode_labels, tokenizer_settings
from hf_bayesvlm.metrics import accuracy, brier, ece, nlpd
from hf_bayesvlm.predictive import predictive_probs, probit_logits

METRICS = {"accuracy": accuracy, "nlpd": nlpd, "ece": ece, "brier": brier}


@dataclass(frozen=True)
class Scores:
    """Metrics of one method on one task of one slice.

    Attributes:
        slice: Such as `fluent-emoji-flat` or `openmoji/held-out`.
        task: `full`, `names-105` or `coarse`.
        images: Number of images.
        classes: Number of candidate labels.
        values: Metric name -> value.
    """

    slice: str
    task: str
    images: int
    classes: int
    values: dict[str, float]


@dataclass(frozen=True)
class Embedded:
    """Everything about the data that does not depend on a posterior.

    Attributes:
        slices: The slices, and the tasks of each.
        images: Split -> embeddings of all its images.
        labels: Label text -> row in `texts`.
        texts: Embeddings of all labels.
    """

    slices: tuple[tuple[Slice, tuple[ZeroShotTask, ...]], ...]
    images: dict[str, GaussianEmbedding]
    labels: dict[str, int]
    texts: GaussianEmbedding


def embed_everything(
    model: BayesVLMForZeroShot, processor: object, dataset: DatasetDict, splits: Sequence[str]
) -> Embedded:
    """Run both towers once over the images and labels of some splits.

    Args:
        model: The model; its posterior does not matter.
        processor: Its processor.
        dataset: The whole data set.
        splits: Which splits to evaluate.

    Returns:
        The embeddings.
    """
    slices = tuple(
        (piece, tuple(zero_shot_tasks(dataset, piece)))
        for split in splits
        for piece in evaluation_slices(dataset[split], split)
    )
    names = sorted({label for _, tasks in slices for task in tasks for label in task.labels})
    with torch.no_grad():
        settings = tokenizer_settings(model, processor.tokenizer)  # type: ignore[attr-defined]
        texts = encode_labels(
            model,
            processor.tokenizer,  # type: ignore[attr-defined]
            names,
            [DEFAULT_TEMPLATE],
            settings,
        )
        images = {split: embed_images(model, processor, dataset[split]) for split in splits}
    return Embedded(slices, images, {name: row for row, name in enumerate(names)}, texts)


def embed_images(
    model: BayesVLMForZeroShot, processor: object, split: Dataset, batch_size: int = 64
) -> GaussianEmbedding:
    """Embed all images of a split, on white, in its order."""
    parts: list[GaussianEmbedding] = []
    for start in tqdm(range(0, len(split), batch_size), desc="embedding", leave=False):
        rows = [on_background(image) for image in split[start : start + batch_size]["image"]]
        pixels = processor.image_processor(images=rows, return_tensors="pt")  # type: ignore[attr-defined]
        with torch.no_grad():
            parts.append(model.encode_image(**pixels.to(model.device, model.dtype)))
    return GaussianEmbedding.cat(parts)


def task_groups(tasks: Iterable[ZeroShotTask]) -> dict[str, list[ZeroShotTask]]:
    """Tasks by name; parts of one name are pooled when they are measured."""
    groups: dict[str, list[ZeroShotTask]] = {}
    for task in tasks:
        groups.setdefault(task.name, []).append(task)
    return groups


def evaluate(
    model: BayesVLMForZeroShot, data: Embedded, *, bayesian: bool = True, temperature: float = 1.0
) -> list[Scores]:
    """Measure a model on all slices and tasks.

    Args:
        model: Gives the posterior.
        data: From `embed_everything` with the same base weights.
        bayesian: False for the plain model's softmax (MAP).
        temperature: Divides the logits.

    Returns:
        One entry a slice and task.
    """
    results: list[Scores] = []
    texts = _with_posterior(model, data.texts, "text")
    images = {split: _with_posterior(model, rows, "image") for split, rows in data.images.items()}
    for piece, tasks in data.slices:
        for name, parts in task_groups(tasks).items():
            outcome = [
                _probabilities(model, images[piece.split], texts, data, task, bayesian, temperature)
                for task in parts
                if task.rows
            ]
            if outcome:
                results.append(_measure(piece.name, name, outcome))
    return results


def _probabilities(
    model: BayesVLMForZeroShot,
    images: GaussianEmbedding,
    texts: GaussianEmbedding,
    data: Embedded,
    task: ZeroShotTask,
    bayesian: bool,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    candidates = texts[torch.tensor([data.labels[label] for label in task.labels])]
    rows = images[torch.tensor(task.rows)]
    with torch.no_grad():
        if bayesian:
            logits = probit_logits(*model.similarity(rows, candidates))
        else:
            unit = torch.nn.functional.normalize
            logits = unit(rows.mean, dim=1) @ unit(candidates.mean, dim=1).T
            logits = logits * model.logit_scale + model.logit_bias
        return predictive_probs(logits / temperature, model.likelihood), torch.tensor(task.targets)


def _measure(piece: str, task: str, outcome: list[tuple[Tensor, Tensor]]) -> Scores:
    # Parts differ by one in their number of classes: zero columns make them one table.
    width = max(probs.shape[1] for probs, _ in outcome)
    padded = [torch.nn.functional.pad(p, (0, width - p.shape[1])) for p, _ in outcome]
    probs, targets = torch.cat(padded), torch.cat([labels for _, labels in outcome])
    values = {name: metric(probs, targets) for name, metric in METRICS.items()}
    return Scores(piece, task, len(targets), width, values)


def _with_posterior(
    model: BayesVLMForZeroShot, rows: GaussianEmbedding, modality: str
) -> GaussianEmbedding:
    covariance = None if model.factors is None else model.factors.covariance(modality)
    return gaussian_embedding(rows.mean, rows.features, covariance)

r"""Estimate a posterior from image-text pairs.

Pairs are taken in blocks of `contrast_size`.  Within a block every image is contrasted with every text;
the block's inputs and curvature are folded into the Kronecker factors and dropped, so that memory does
not grow with the number of pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from .backbones import is_watched, unwatch_projections
from .base_access import evaluation_mode
from .cosine import CovarianceForm, GaussianEmbedding, Modalities
from .curvature import CurvatureAccumulator, KroneckerFactors
from .images import ImageInputError, load_rgb_image
from .kronecker import Damping, check_positive
from .label_cache import tokenizer_settings
from .laplace import NoMaximumError, Objective, optimize_prior_precision
from .modeling_bayesvlm import BayesVLMForZeroShot
from .posterior import BayesVLMPosterior, ModalityPosterior
from .posterior_files import CHOICES, hub_id

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class PairEmbeddings:
    """Embeddings of a batch of pairs, without uncertainty.

    Attributes:
        image: One row a pair.
        text: One row a pair.
    """

    image: GaussianEmbedding
    text: GaussianEmbedding

    def __len__(self) -> int:
        return len(self.image)


def estimate_posterior(
    model: BayesVLMForZeroShot | PreTrainedModel,
    processor: Any,
    dataset: Iterable[Mapping[str, Any]],
    *,
    image_column: str = "image",
    text_column: str = "text",
    contrast_size: int = 32768,
    batch_size: int = 64,
    max_pairs: int | None = None,
    pseudo_data_count: float = 1.0,
    objective: Objective | None = None,
    covariance: CovarianceForm = "diagonal",
    damping: Damping = "factored",
    modalities: Modalities = "both",
    base_model: str | None = None,
    revision: str | None = None,
    dataset_name: str | None = None,
    dataset_revision: str | None = None,
    progress: bool = True,
) -> BayesVLMPosterior:
    r"""Estimate the Laplace posterior of a vision-language model from image-text pairs.

    Nothing is trained: one forward pass of both towers over the pairs, and the Gauss-Newton curvature of the
    model's own contrastive loss with respect to its embeddings.  The model is not changed.

    Args:
        model: A CLIP/SigLIP-like model, or a `BayesVLMForZeroShot` (its posterior is ignored).
        processor: Its processor, with `tokenizer` and `image_processor`.
        dataset: Rows with an image and a text: a list, a `datasets.Dataset` or an `IterableDataset`.
        image_column: Key of the images (anything `load_rgb_image` takes).
        text_column: Key of the captions.
        contrast_size: Pairs that are contrasted with each other; the paper takes 32,768.
        batch_size: Pairs that go through the towers at once.
        max_pairs: Stop after this many pairs.
        pseudo_data_count: How often the pairs are counted (tau).
        objective: How the prior precisions are chosen, `"reference"` or `"evidence"`.  By default the
            reference, and the evidence (with a warning) where the reference has no maximum, which happens
            for fewer pairs than features; always the evidence for exact damping.
        covariance: `"diagonal"` or `"full"`.
        damping: `"factored"` or `"exact"`.
        modalities: Whose uncertainty counts.
        base_model: Hub id to note as the base; by default the one the model was loaded from.
        revision: Revision of the base to note.
        dataset_name: Name or Hub id of the pairs to note; by default what the data set says of itself.
        dataset_revision: Revision of the pairs to note.
        progress: Show a progress bar.

    Returns:
        The posterior, with the fingerprint of the model's projections.

    Raises:
        ValueError: For fewer than two pairs, a missing column, an empty caption, or impossible settings.
        ImageInputError: For an image that cannot be used.
    """
    if contrast_size < 2:
        raise ValueError(
            f"contrast_size must be at least 2, not {contrast_size}: a pair needs others"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    check_positive("pseudo_data_count", pseudo_data_count)
    for name, value in (
        ("covariance", covariance),
        ("damping", damping),
        ("modalities", modalities),
    ):
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, not {value!r}")
    if max_pairs is not None and max_pairs < 2:
        raise ValueError(f"max_pairs must be at least 2, not {max_pairs}")
    with _as_bayesian(model) as vlm:
        fingerprint = vlm.base_fingerprint()
        batches = embed_pairs(
            vlm,
            processor,
            dataset,
            image_column=image_column,
            text_column=text_column,
            batch_size=batch_size,
            max_pairs=max_pairs,
            progress=progress,
        )
        factors = _fold(vlm, _blocks(batches, contrast_size))
    parts, chosen = _modalities(vlm, factors, pseudo_data_count, objective, damping)
    num_pairs = factors["image"].num_pairs
    return BayesVLMPosterior(
        image=parts["image"],
        text=parts["text"],
        likelihood=vlm.likelihood,
        covariance=covariance,
        damping=damping,
        modalities=modalities,
        objective=chosen,
        base_model=base_model or hub_id(vlm.config.vlm_config.name_or_path or vlm.name_or_path),
        revision=revision,
        fingerprint=fingerprint,
        num_pairs=num_pairs,
        contrast_size=min(contrast_size, num_pairs),
        dataset=dataset_name or getattr(getattr(dataset, "info", None), "dataset_name", None),
        dataset_revision=dataset_revision,
        provenance={"image_column": image_column, "text_column": text_column},
    )


def embed_pairs(
    model: BayesVLMForZeroShot,
    processor: Any,
    dataset: Iterable[Mapping[str, Any]],
    *,
    image_column: str = "image",
    text_column: str = "text",
    batch_size: int = 64,
    max_pairs: int | None = None,
    progress: bool = False,
) -> Iterator[PairEmbeddings]:
    """Run both towers over image-text pairs, batch by batch.

    Args:
        model: The model.
        processor: Its processor.
        dataset: Rows with an image and a text.
        image_column: Key of the images.
        text_column: Key of the captions.
        batch_size: Pairs at once.
        max_pairs: Stop after this many pairs.
        progress: Show a progress bar.

    Yields:
        The embeddings of each batch.

    Raises:
        ValueError: For a missing column or an empty caption, with the row's number.
        ImageInputError: For an image that cannot be used.
    """
    settings = tokenizer_settings(model, processor.tokenizer)
    rows = enumerate(itertools.islice(iter(dataset), max_pairs))
    with tqdm(total=_length(dataset, max_pairs), unit="pair", disable=not progress) as bar:
        while batch := list(itertools.islice(rows, batch_size)):
            images = [_image(row, image_column, number) for number, row in batch]
            texts = [_caption(row, text_column, number) for number, row in batch]
            pixels = processor.image_processor(images=images, return_tensors="pt")
            tokens = processor.tokenizer(texts, return_tensors="pt", **settings)
            with torch.no_grad(), evaluation_mode(model):
                embedded = PairEmbeddings(
                    image=model.encode_image(**pixels.to(model.device, model.dtype)),
                    text=model.encode_text(**tokens.to(model.device)),
                )
            yield embedded
            bar.update(len(batch))


@contextmanager
def _as_bayesian(model: BayesVLMForZeroShot | PreTrainedModel) -> Iterator[BayesVLMForZeroShot]:
    """The model itself, or a plain one wrapped for a while and left without a trace."""
    # By what it can do, not by its class: a bundle loaded as remote code has classes of its own.
    if hasattr(model, "encode_image"):
        yield cast(BayesVLMForZeroShot, model)
        return
    was_watched = is_watched(model)
    wrapped = BayesVLMForZeroShot.from_vlm(model)
    try:
        yield wrapped
    finally:
        if not was_watched:
            unwatch_projections(model, wrapped.backbone)


def _fold(
    model: BayesVLMForZeroShot, blocks: Iterable[PairEmbeddings]
) -> dict[str, KroneckerFactors]:
    """The Kronecker factors of both projections from blocks of pairs."""
    accumulators = {name: _accumulator(model) for name in ("image", "text")}
    for block in blocks:
        if len(block) < 2:
            logger.warning(
                "The last pair is dropped: it is alone in its block, with nothing to contrast it with."
            )
            continue
        image, text = block.image, block.text
        accumulators["image"].update(image.features, image.mean, text.mean)
        accumulators["text"].update(text.features, text.mean, image.mean)
    num_pairs = accumulators["image"].num_pairs
    if num_pairs < 2:
        raise ValueError(f"the data set gave {num_pairs} usable pairs: at least 2 are needed")
    return {name: accumulator.factors() for name, accumulator in accumulators.items()}


def _accumulator(model: BayesVLMForZeroShot) -> CurvatureAccumulator:
    return CurvatureAccumulator(
        model.likelihood,
        model.logit_scale,
        model.logit_bias if model.likelihood == "sigmoid" else 0.0,
    )


def _modalities(
    model: BayesVLMForZeroShot,
    factors: dict[str, KroneckerFactors],
    pseudo_data_count: float,
    objective: Objective | None,
    damping: Damping,
) -> tuple[dict[str, ModalityPosterior], Objective]:
    """The parts of the posterior, and the objective their prior precisions were chosen by."""
    weights = model.projection_weights()
    chosen: Objective = objective or ("evidence" if damping == "exact" else "reference")
    try:
        parts = {
            name: _modality(part, weights[name], pseudo_data_count, chosen, damping)
            for name, part in factors.items()
        }
    except NoMaximumError as error:
        if objective is not None or chosen == "evidence":
            raise
        logger.warning(
            f"{error}. The prior precisions of this posterior are chosen by objective='evidence'."
        )
        return _modalities(model, factors, pseudo_data_count, "evidence", damping)
    return parts, chosen


def _modality(
    factors: KroneckerFactors,
    weight: Tensor,
    pseudo_data_count: float,
    objective: Objective,
    damping: Damping,
) -> ModalityPosterior:
    norm = float(weight.double().square().sum())
    precision = optimize_prior_precision(
        factors.A, factors.B, norm, pseudo_data_count, objective, damping=damping
    )
    return ModalityPosterior(
        A=factors.A.float().cpu(),
        B=factors.B.float().cpu(),
        pseudo_data_count=pseudo_data_count,
        prior_precision=precision,
        weight_norm_squared=norm,
    )


def _blocks(batches: Iterable[PairEmbeddings], size: int) -> Iterator[PairEmbeddings]:
    """Regroup batches into blocks of exactly `size` pairs; the last one may be smaller."""
    held: list[PairEmbeddings] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += len(batch)
        while count >= size:
            joined = _cat(held)
            yield _rows(joined, slice(0, size))
            count -= size
            held = [_rows(joined, slice(size, None))] if count else []
    if count:
        yield _cat(held)


def _cat(parts: list[PairEmbeddings]) -> PairEmbeddings:
    return PairEmbeddings(
        image=GaussianEmbedding.cat([part.image for part in parts]),
        text=GaussianEmbedding.cat([part.text for part in parts]),
    )


def _rows(pairs: PairEmbeddings, rows: slice) -> PairEmbeddings:
    return PairEmbeddings(image=pairs.image[rows], text=pairs.text[rows])


def _cell(row: Mapping[str, Any], column: str, number: int) -> Any:
    if not isinstance(row, Mapping):
        raise ValueError(
            f"row {number} is {type(row).__name__}, not a mapping: the data set must give rows such as "
            "{'image': ..., 'text': ...}"
        )
    if column not in row:
        raise ValueError(
            f"row {number} has no column {column!r}; it has {', '.join(map(str, row))}: set image_column "
            "and text_column"
        )
    return row[column]


def _image(row: Mapping[str, Any], column: str, number: int) -> Image.Image:
    try:
        return load_rgb_image(_cell(row, column, number))
    except ImageInputError as error:
        raise ImageInputError(f"row {number}: {error}") from error


def _caption(row: Mapping[str, Any], column: str, number: int) -> str:
    text = _cell(row, column, number)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"row {number}: the caption in {column!r} must be a non-empty string, not {text!r}"
        )
    return text


def _length(dataset: Iterable[Any], max_pairs: int | None) -> int | None:
    try:
        length = len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return max_pairs
    return length if max_pairs is None else min(length, max_pairs)

"""A labelled data set as embeddings, computed once: what tuning and evaluation work on."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .base_access import evaluation_mode
from .cosine import GaussianEmbedding
from .fingerprint import Fingerprint
from .images import ImageInputError, load_rgb_image
from .label_cache import check_labels, check_templates, encode_labels, tokenizer_settings
from .modeling_bayesvlm import BayesVLMForZeroShot


@dataclass(frozen=True)
class LabelledFeatures:
    """MAP embeddings of labelled images and of their classes, without any posterior.

    Attributes:
        images: One row an image.
        texts: One row a class, prompts fused.
        targets: Class of every image, `[images]`, int64.
        class_names: The classes.
        templates: Prompts that the classes were embedded in.
        fingerprint: Of the projections that made the embeddings, where it is known.
    """

    images: GaussianEmbedding
    texts: GaussianEmbedding
    targets: Tensor
    class_names: tuple[str, ...]
    templates: tuple[str, ...] = ()
    fingerprint: Fingerprint | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> LabelledFeatures:
        """The same on another device."""
        return LabelledFeatures(
            images=self.images.to(device),
            texts=self.texts.to(device),
            targets=self.targets.to(device),
            class_names=self.class_names,
            templates=self.templates,
            fingerprint=self.fingerprint,
        )

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ValueError: For no images, fewer than two classes, targets that are no class indices, NaN or
                infinity, or counts that disagree.
        """
        if len(self.images) == 0:
            raise ValueError(
                "there are no images: give a data set with at least one labelled image"
            )
        if len(self.texts) != len(self.class_names):
            raise ValueError(
                f"{len(self.texts)} class embeddings for {len(self.class_names)} class names"
            )
        if len(self.class_names) < 2:
            raise ValueError(
                "one class has probability 1 whatever the posterior: at least two classes are needed"
            )
        if self.targets.shape != (len(self.images),) or self.targets.dtype != torch.int64:
            raise ValueError(
                f"targets must be int64 of shape [{len(self.images)}], one an image, not "
                f"{self.targets.dtype} of {list(self.targets.shape)}"
            )
        wrong = (self.targets < 0) | (self.targets >= len(self.class_names))
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"row {row}: the label {int(self.targets[row])} is not an index of the "
                f"{len(self.class_names)} classes"
            )
        for name, embedding in (("image", self.images), ("class", self.texts)):
            rows = (torch.isfinite(embedding.mean).all(dim=1)) & (
                torch.isfinite(embedding.features).all(dim=1)
            )
            if not rows.all():
                row = int((~rows).nonzero()[0, 0])
                raise ValueError(
                    f"the embedding of {name} {row} contains NaN or infinity: its weights or input are "
                    "damaged, or their precision is too low"
                )


def embed_labelled(
    model: BayesVLMForZeroShot,
    processor: Any,
    dataset: Iterable[Mapping[str, Any]],
    *,
    image_column: str = "image",
    label_column: str = "label",
    class_names: Sequence[str] | None = None,
    hypothesis_template: str | Sequence[str] | None = None,
    batch_size: int = 64,
    max_images: int | None = None,
    progress: bool = True,
) -> LabelledFeatures:
    """Run both towers over labelled images and their classes, once.

    The model is not changed, and its posterior has no part in the result.

    Args:
        model: The model.
        processor: Its processor, with `tokenizer` and `image_processor`.
        dataset: Rows with an image and a label: a list, a `datasets.Dataset` or an `IterableDataset`.
        image_column: Key of the images (anything `load_rgb_image` takes).
        label_column: Key of the labels: class indices or class names.
        class_names: The candidate classes, in the order of the indices.  By default the names that the
            data set declares (`ClassLabel`), or for labels that are strings, those that occur, sorted.
        hypothesis_template: Prompt with `{}` for the class, or several to fuse; by default the model's own,
            or "This is a photo of {}.".
        batch_size: Images that go through the tower at once.
        max_images: Stop after this many images.
        progress: Show a progress bar.

    Returns:
        The embeddings, on the model's device.

    Raises:
        ValueError: For no images, a missing column, fewer than two classes, or a label that is none of the
            classes, with the row's number.
        ImageInputError: For an image that cannot be used, with the row's number.
    """
    for name, count in (("batch_size", batch_size), ("max_images", max_images)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    templates = check_templates(
        model.config.hypothesis_template if hypothesis_template is None else hypothesis_template
    )
    labels = _Labels(class_names, _declared_names(dataset, label_column))
    images: list[GaussianEmbedding] = []
    rows = enumerate(itertools.islice(iter(dataset), max_images))
    with (
        torch.no_grad(),
        evaluation_mode(model),
        tqdm(total=_length(dataset, max_images), unit="image", disable=not progress) as bar,
    ):
        while batch := list(itertools.islice(rows, batch_size)):
            for number, row in batch:
                labels.add(_cell(row, label_column, number), number)
            pictures = [_image(row, image_column, number) for number, row in batch]
            pixels = processor.image_processor(images=pictures, return_tensors="pt")
            images.append(_plain(model.encode_image(**pixels.to(model.device, model.dtype))))
            bar.update(len(batch))
        if not images:
            raise ValueError("the data set is empty: give one with at least one labelled image")
        names, targets = labels.result()
        settings = tokenizer_settings(model, processor.tokenizer)
        texts = _plain(encode_labels(model, processor.tokenizer, names, templates, settings))
    joined = GaussianEmbedding.cat(images)
    features = LabelledFeatures(
        images=joined,
        texts=texts.to(joined.mean.device),
        targets=torch.tensor(targets, device=joined.mean.device),
        class_names=names,
        templates=templates,
        fingerprint=model.base_fingerprint(),
    )
    features.check()
    return features


class _Labels:
    """Collects labels of one kind, indices or names, and refuses a bad one at its row."""

    def __init__(self, given: Sequence[str] | None, declared: Sequence[str] | None) -> None:
        self._names = None if given is None else check_labels(given)
        if self._names is None and declared is not None:
            self._names = check_labels(declared)
        # Indices are those of the data set: other names must be as many.
        if self._names is not None and declared is not None and len(self._names) != len(declared):
            raise ValueError(
                f"{len(self._names)} class names were given, the data set has {len(declared)} classes"
            )
        if self._names is not None and len(self._names) < 2:
            raise ValueError(
                "one class has probability 1 whatever the posterior: at least two classes are needed"
            )
        self._index = {name: i for i, name in enumerate(self._names or ())}
        self._values: list[int | str] = []

    def add(self, value: Any, number: int) -> None:
        if isinstance(value, str):
            value = value.strip()
            if self._names is not None and value not in self._index:
                raise ValueError(
                    f"row {number}: the label {value!r} is not among the {len(self._names)} class names"
                )
            if not value:
                raise ValueError(f"row {number}: the label is empty")
            self._values.append(value)
        else:
            self._values.append(self._checked_index(value, number))
        if type(self._values[-1]) is not type(self._values[0]):
            raise ValueError(
                f"row {number}: labels are class indices in some rows, names in others"
            )

    def _checked_index(self, value: Any, number: int) -> int:
        try:
            index = operator.index(value)
        except TypeError:
            index = None
        if index is None or isinstance(value, bool):
            raise ValueError(
                f"row {number}: the label must be a class index or a class name, not {value!r}"
            )
        if self._names is None:
            raise ValueError(
                f"row {number}: the label is the index {index}, and the data set does not name its classes: "
                "pass class_names"
            )
        if not 0 <= index < len(self._names):
            raise ValueError(
                f"row {number}: the label {index} is not an index of the {len(self._names)} classes"
            )
        return index

    def result(self) -> tuple[tuple[str, ...], list[int]]:
        """Class names, and the index of every row's class."""
        names = self._names
        if names is None:
            names = check_labels(sorted({str(value) for value in self._values}))
            self._index = {name: i for i, name in enumerate(names)}
        return names, [
            self._index[value] if isinstance(value, str) else value for value in self._values
        ]


def _declared_names(dataset: Any, column: str) -> list[str] | None:
    """Names of a `ClassLabel` column."""
    features = getattr(dataset, "features", None)
    column_type = features.get(column) if isinstance(features, Mapping) else None
    names = getattr(column_type, "names", None)
    return list(names) if names else None


def _plain(embedding: GaussianEmbedding) -> GaussianEmbedding:
    """Without the variance of whatever posterior the model has."""
    zeros = embedding.mean.new_zeros(len(embedding))
    return GaussianEmbedding(embedding.mean, embedding.features, zeros)


def _cell(row: Mapping[str, Any], column: str, number: int) -> Any:
    if not isinstance(row, Mapping):
        raise ValueError(
            f"row {number} is {type(row).__name__}, not a mapping: the data set must give rows such as "
            "{'image': ..., 'label': ...}"
        )
    if column not in row:
        raise ValueError(
            f"row {number} has no column {column!r}; it has {', '.join(map(str, row))}: name the columns of "
            "images and labels"
        )
    return row[column]


def _image(row: Mapping[str, Any], column: str, number: int) -> Any:
    try:
        return load_rgb_image(_cell(row, column, number))
    except ImageInputError as error:
        raise ImageInputError(f"row {number}: {error}") from error


def _length(dataset: Iterable[Any], max_images: int | None) -> int | None:
    try:
        length = len(dataset)  # type: ignore[arg-type]
    except TypeError:
        return max_images
    return length if max_images is None else min(length, max_images)

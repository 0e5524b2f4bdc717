"""What an image-text pair of a data set is, and what is wrong with a row that is none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from .images import ImageInputError, load_rgb_image

Captions = Literal["sample", "expand"]

_ADDRESSES = ("http://", "https://", "data:")
# Addresses of file systems, chained ones included, that are not plain web addresses.
_REMOTE = re.compile(r"(?!https?://)[a-z0-9+]+://")


class PairError(ValueError):
    """A row of the data set is not a usable image-text pair."""


@dataclass(frozen=True)
class Slot:
    """One (row, caption) of a data set, not decoded yet.

    Slots are numbered whether or not they turn out to be usable, so that the pairs of a block do not depend
    on how many processes read them or where a run was resumed.

    Attributes:
        number: Position among all slots.
        row: Number of the row.
        image: The row's image as the data set has it.
        text: The caption as the data set has it.
        error: Why the row could not even be read, if so.
    """

    number: int
    row: int
    image: Any
    text: Any
    error: str | None = None


@dataclass(frozen=True)
class Pair:
    """A usable pair.

    Attributes:
        row: Number of the row.
        image: In RGB.
        text: The caption.
    """

    row: int
    image: Image.Image
    text: str


@dataclass(frozen=True)
class PairColumns:
    """Where a row keeps its pair, and what to do about several captions.

    Attributes:
        image: Column of the images (anything `load_rgb_image` takes); a dot reaches into a nested column.
        text: Column of the captions: a string, or a list of strings.
        captions: `"sample"` takes one of several captions, `"expand"` makes a pair of each.
        seed: Chooses among several captions, by row number.
        image_root: Folder that relative paths of images start from.
    """

    image: str = "image"
    text: str = "text"
    captions: Captions = "sample"
    seed: int = 0
    image_root: str | None = None

    def __post_init__(self) -> None:
        if self.captions not in ("sample", "expand"):
            raise ValueError(f"captions must be 'sample' or 'expand', not {self.captions!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number from 0, not {self.seed!r}")

    def slots_of(self, row: Any, row_number: int, first_slot: int) -> list[Slot]:
        """The slots of one row: at least one, so that every row is accounted for.

        Args:
            row: The row, or the exception that reading it raised.
            row_number: Its number.
            first_slot: Number of its first slot.

        Returns:
            One slot, or one a caption for `captions="expand"`.
        """
        if isinstance(row, Exception):
            return [Slot(first_slot, row_number, None, None, str(row) or type(row).__name__)]
        try:
            image, texts = cell(row, self.image), cell(row, self.text)
        except PairError as error:
            return [Slot(first_slot, row_number, None, None, str(error))]
        choices = list(texts) if isinstance(texts, (list, tuple, np.ndarray)) else [texts]
        if self.captions == "sample" and len(choices) > 1:
            usable = [text for text in choices if isinstance(text, str) and text.strip()] or choices
            choices = [usable[np.random.default_rng((self.seed, row_number)).integers(len(usable))]]
        return [
            Slot(first_slot + i, row_number, image, text) for i, text in enumerate(choices or [""])
        ]

    def count_slots(self, texts: Any) -> int:
        """How many slots a row with these captions has."""
        several = self.captions == "expand" and isinstance(texts, (list, tuple, np.ndarray))
        return max(1, len(texts)) if several else 1

    def pair(self, slot: Slot) -> Pair:
        """Decode a slot.

        Args:
            slot: The slot.

        Returns:
            The pair.

        Raises:
            PairError: Naming the row and what is wrong with it.
        """
        where = f"row {slot.row}"
        if slot.error is not None:
            raise PairError(f"{where}: {slot.error}")
        if not isinstance(slot.text, str) or not slot.text.strip():
            shown = repr(slot.text)
            raise PairError(
                f"{where}: the caption in {self.text!r} must be a non-empty string, not {shown[:80]}"
            )
        if slot.image is None:
            raise PairError(f"{where}: there is no image in {self.image!r}")
        try:
            return Pair(slot.row, load_rgb_image(self._located(slot.image)), slot.text)
        except (ImageInputError, OSError) as error:
            raise PairError(f"{where}: {error}") from error

    def _located(self, image: Any) -> Any:
        """What `load_rgb_image` can load: relative paths from `image_root`, remote files as bytes."""
        if isinstance(image, dict) and image.get("bytes") is None and image.get("path"):
            path = image["path"]
            return _remote_bytes(path) if _REMOTE.match(path) else path
        if isinstance(image, str):
            if _REMOTE.match(image):
                return _remote_bytes(image)
            if self.image_root is not None and not image.startswith(_ADDRESSES):
                return str(Path(self.image_root) / image)
        return image


def _remote_bytes(address: str) -> bytes:
    """The file behind an address of a file system such as hf:// or zip://, as streams give them."""
    import fsspec

    with fsspec.open(address, "rb") as stream:
        return cast(bytes, stream.read())


def cell(row: Any, column: str) -> Any:
    """The content of one column of a row.

    Args:
        row: A mapping.
        column: Its key; where there is no such key, a dot reaches into nested mappings.

    Returns:
        The content.

    Raises:
        PairError: If the row is no mapping or lacks the column.
    """
    if not isinstance(row, Mapping):
        raise PairError(
            f"{type(row).__name__} is not a mapping: the data set must give rows such as "
            "{'image': ..., 'text': ...}"
        )
    if column in row:
        return row[column]
    head, _, rest = column.partition(".")
    if rest and isinstance(row.get(head), Mapping):
        return cell(row[head], rest)
    raise PairError(f"no column {column!r}; it has {', '.join(map(str, row))}")

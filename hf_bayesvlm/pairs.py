"""What an image-text pair of a data set is, and what is wrong with a row that is none."""

from __future__ import annotations

import os
import re
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from .images import ImageInputError, load_rgb_image, may_be_base64

Captions = Literal["sample", "expand"]

_ADDRESSES = ("http://", "https://", "data:")
# Addresses of file systems, chained ones included, that are not plain web addresses.
_REMOTE = re.compile(r"(?!https?://)[a-z0-9+]+(::[a-z0-9+]+)*://")
# An open file decodes into itself: two threads that ask for its pixels at once get halves of them.
_LAZY_IMAGES = threading.Lock()


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
        for kind, name in (("image", self.image), ("text", self.text)):
            if not isinstance(name, str) or not name:
                raise ValueError(f"the {kind} column must be the name of a column, not {name!r}")
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
        try:
            texts = self._captions_of(row)
        except PairError as error:
            return [Slot(first_slot, row_number, None, None, str(error))]
        if self.captions == "sample" and len(texts) > 1:
            usable = [text for text in texts if isinstance(text, str) and text.strip()] or texts
            texts = [usable[np.random.default_rng((self.seed, row_number)).integers(len(usable))]]
        image, problem = None, None
        try:
            image = cell(row, self.image)
        except PairError as error:
            problem = str(error)
        return [
            Slot(first_slot + i, row_number, image, text, problem) for i, text in enumerate(texts)
        ]

    def count_slots(self, row: Any) -> int:
        """How many slots a row has; of the row, the column of the captions is enough."""
        if self.captions == "sample":
            return 1
        try:
            return len(self._captions_of(row))
        except PairError:
            return 1

    def _captions_of(self, row: Any) -> list[Any]:
        """At least one; an empty text where there is none."""
        if isinstance(row, Exception):
            raise PairError(str(row) or type(row).__name__)
        texts = cell(row, self.text)
        several = isinstance(texts, (list, tuple)) or (isinstance(texts, np.ndarray) and texts.ndim)
        return (list(texts) or [""]) if several else [texts]

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
        text = slot.text.item() if isinstance(slot.text, np.ndarray) else slot.text
        if not isinstance(text, str) or not text.strip():
            raise PairError(
                f"{where}: the caption in {self.text!r} must be a non-empty string, not {repr(text)[:80]}"
            )
        image = self.located(slot.image)
        if image is None:
            raise PairError(f"{where}: there is no image in {self.image!r}")
        try:
            return Pair(slot.row, _loaded(image), text)
        except (ImageInputError, OSError) as error:
            raise PairError(f"{where}: {error}") from error

    def located(self, image: Any) -> Any:
        """The content of an undecoded image, with relative paths led from `image_root`."""
        if isinstance(image, dict) and "image" not in image and image.keys() & {"bytes", "path"}:
            image = image.get("path") if image.get("bytes") is None else image["bytes"]
        root = self.image_root
        if root is None or not isinstance(image, (str, os.PathLike)):
            return image
        if isinstance(image, str) and (image.startswith(_ADDRESSES) or _REMOTE.match(image)):
            return image
        located = os.path.join(root, image)  # noqa: PTH118 - root may be an address
        if isinstance(image, str) and may_be_base64(image) and not _exists(located):
            return image
        return located


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False  # too long for a path


def _loaded(image: Any) -> Image.Image:
    if isinstance(image, str) and _REMOTE.match(image):
        image = _remote_bytes(image)
    if isinstance(image, Image.Image):
        with _LAZY_IMAGES:
            return load_rgb_image(image)
    return load_rgb_image(image)


def _remote_bytes(address: str) -> bytes:
    """The file behind an address of a file system such as hf:// or zip://, as streams give them."""
    import fsspec

    try:
        with fsspec.open(address, "rb") as stream:
            return cast(bytes, stream.read())
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ImageInputError(f"{address} cannot be read: {error}") from error


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

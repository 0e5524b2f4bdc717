"""Reads the slots of any data set, by number where it can be indexed, else from front to back."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    LargeList,
    List,
    Value,
)
from datasets import Image as ImageFeature
from PIL import Image

from .pairs import PairColumns, Slot

# Rows that tell data sets apart when a run is resumed.
_SAMPLE_ROWS = 32
_READ_ROWS = 128
# What reading a row of a user's own data set may raise because of the row.
_ROW_ERRORS = (
    *(OSError, ValueError, SyntaxError, EOFError, RuntimeError),
    *(Image.DecompressionBombError, struct.error, zlib.error),
)


class SlotReader:
    """Reads the slots of a data set.

    Args:
        dataset: A `datasets.Dataset` or `IterableDataset`, a sequence, or any iterable of rows.
        columns: Where rows keep their pairs.

    Raises:
        ValueError: If it is no data set of pairs: several splits, no such column, images or texts alone.

    Attributes:
        fingerprint: What `datasets` calls the data set's state, if it has a name for it.
        num_rows: Number of rows, if known.
        random_access: Whether rows can be read by number.
    """

    def __init__(self, dataset: Iterable[Any], columns: PairColumns) -> None:
        check_columns(dataset, columns)
        self.columns = columns
        self.fingerprint: str | None = getattr(dataset, "_fingerprint", None)
        self.num_rows = _length(dataset)
        self._dataset = _undecoded(dataset, columns)
        self.random_access = self.num_rows is not None and hasattr(self._dataset, "__getitem__")
        self._rows: Iterator[Any] | None = None
        self._row_number = 0
        self._next_slot = 0
        self._pending: list[Slot] = []
        self._first_slots: np.ndarray | None = None
        if self.random_access and columns.captions == "expand":
            self._first_slots = self._count_slots()

    @property
    def num_slots(self) -> int | None:
        """Number of slots, or None where it is not known before the end."""
        if self._first_slots is not None:
            return int(self._first_slots[-1])
        return self.num_rows if self.columns.captions == "sample" else None

    def read(self, start: int, stop: int) -> Iterator[Slot]:
        """The slots from `start` up to `stop`, fewer at the end of the data.

        Args:
            start: First slot; of data that cannot be indexed, not before the end of the last read.
            stop: First slot that is not wanted any more.

        Yields:
            Slots in order.
        """
        return self._read_indexed(start, stop) if self.random_access else self._skip(start, stop)

    def position(self) -> dict[str, Any]:
        """Where a stream has been read to, for `seek`; JSON."""
        position: dict[str, Any] = {"slot": self._next_slot, "row": self._row_number}
        if self._row_number and not self._pending and _resumes_exactly(self._dataset):
            # Lets a resumed stream open the right file instead of reading all files before it.
            position["state"] = self._dataset.state_dict()
        return position

    def seek(self, position: dict[str, Any]) -> None:
        """Go to where a stream had been read to.

        Args:
            position: From `position` of a reader of the same data.
        """
        if self.random_access:
            return
        if position.get("state") is not None and isinstance(self._dataset, IterableDataset):
            self._dataset.load_state_dict(position["state"])
            self._rows = iter(self._dataset)
            self._row_number, self._next_slot = position["row"], position["slot"]
        else:
            for _ in self._skip(position["slot"], position["slot"]):
                pass

    def sample_digest(self) -> str:
        """SHA-256 of some rows, to tell data sets apart; to be called before the first read.

        Returns:
            Hexadecimal digits.
        """
        rows: list[Any]
        if self.random_access:
            assert self.num_rows is not None
            count = min(_SAMPLE_ROWS, self.num_rows)
            numbers = np.linspace(0, max(self.num_rows - 1, 0), count).astype(int)
            rows = [row for i in numbers for row in self._batch(int(i), int(i) + 1)]
        else:
            iterator = iter(self._dataset)
            rows = list(itertools.islice(iterator, _SAMPLE_ROWS))
            if not isinstance(self._dataset, IterableDataset):
                # It may be readable once only, as a generator is, and whatever wraps one.
                self._rows = itertools.chain(rows, iterator)
        digest = hashlib.sha256(str(self.num_rows).encode())
        for i, row in enumerate(rows):
            for slot in self.columns.slots_of(row, i, 0):
                digest.update(f"{slot.text!r}{slot.error!r}".encode())
                digest.update(_image_bytes(self.columns.located(slot.image)))
        return digest.hexdigest()

    def _skip(self, start: int, stop: int) -> Iterator[Slot]:
        """Reads a stream on to `stop`, without what comes before `start`."""
        if self._rows is None:
            self._rows = iter(self._dataset)
        while self._next_slot < stop:
            if not self._pending:
                row = next(self._rows, None)
                if row is None:
                    return
                self._pending = self.columns.slots_of(row, self._row_number, self._next_slot)
                self._row_number += 1
            slot = self._pending.pop(0)
            self._next_slot += 1
            if slot.number >= start:
                yield slot

    def _read_indexed(self, start: int, stop: int) -> Iterator[Slot]:
        assert self.num_rows is not None
        first, last = start, min(stop, self.num_rows)
        if self._first_slots is not None:
            # The row that a slot lies in, and the row after the last one.
            first = int(np.searchsorted(self._first_slots, start, side="right")) - 1
            last = min(int(np.searchsorted(self._first_slots, stop, side="left")), self.num_rows)
        for begin in range(first, last, _READ_ROWS):
            rows = self._batch(begin, min(begin + _READ_ROWS, last))
            for number, row in enumerate(rows, start=begin):
                slot_number = (
                    number if self._first_slots is None else int(self._first_slots[number])
                )
                for slot in self.columns.slots_of(row, number, slot_number):
                    if start <= slot.number < stop:
                        yield slot

    def _batch(self, start: int, stop: int) -> Iterable[Any]:
        """Rows by number; a row that cannot be read is the exception that says why."""
        if isinstance(self._dataset, Dataset) and not _is_transformed(self._dataset):
            return cast(Iterable[Any], self._dataset[start:stop].to_pylist())
        # One by one: rows of a user's own data set hold decoded images.
        return (_row(self._dataset, number) for number in range(start, stop))

    def _count_slots(self) -> np.ndarray:
        """Number of the first slot of every row, and of all slots, `[rows + 1]`."""
        assert self.num_rows is not None
        dataset, columns = self._dataset, self.columns
        if isinstance(dataset, Dataset) and not _is_transformed(dataset) and self.num_rows:
            tables = dataset.select_columns([_top(columns.text, dataset.column_names)])
            rows = (row for table in tables.iter(_READ_ROWS) for row in table.to_pylist())
        else:
            rows = (_row(dataset, i) for i in range(self.num_rows))
        counts = np.fromiter(map(columns.count_slots, rows), np.int64, self.num_rows)
        return np.concatenate([[0], np.cumsum(counts)])


def check_columns(dataset: Any, columns: PairColumns) -> None:
    """Refuse what is no data set of image-text pairs, before any work.

    Args:
        dataset: What the user passed.
        columns: Where rows should keep their pairs.

    Raises:
        ValueError: Saying what is missing and what to pass instead.
    """
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        raise ValueError(
            f"the data set has several splits: pass one of them, such as dataset[{next(iter(dataset), '')!r}] "
            f"(it has {', '.join(map(str, dataset)) or 'none'})"
        )
    if hasattr(dataset, "iloc"):
        raise ValueError(
            "the data set is a table of pandas: pass Dataset.from_pandas(table) of the datasets library"
        )
    if isinstance(dataset, (Mapping, str, bytes)) or not (
        hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")
    ):
        raise ValueError(
            f"the data set must give one row a pair, not be a {type(dataset).__name__}: join images and "
            "captions into rows such as {'image': ..., 'text': ...}, or open files with open_dataset()"
        )
    if _is_transformed(dataset):
        # Its rows have the columns that the transform makes.
        return
    features = getattr(dataset, "features", None)
    names = list(features) if features else list(getattr(dataset, "column_names", None) or [])
    if not names:
        return
    missing = [name for name in (columns.image, columns.text) if _top(name, names) not in names]
    if missing:
        hint = _side_table(features, names) if features else ""
        raise ValueError(
            f"the data set has no column {missing[0]!r}; it has {', '.join(names)}{hint}"
        )


def _side_table(features: Features, names: list[str]) -> str:
    """What to say of a table that has images or texts alone."""
    images = [name for name in names if isinstance(features[name], ImageFeature)]
    strings = [name for name in names if features[name] in (Value("string"), Value("large_string"))]
    lists = [name for name in names if "string" in str(features[name]) and name not in strings]
    if images and not strings and not lists:
        return (
            f". Only {images[0]!r} holds images and nothing holds texts: a posterior needs image-text "
            "pairs, so join the captions to the images first"
        )
    if strings and not images and not any("path" in n or "url" in n or "image" in n for n in names):
        return (
            ". It holds texts and no images: a posterior needs image-text pairs, so join the images to "
            "the captions first"
        )
    return ". Name the columns of images and captions"


def _undecoded(dataset: Any, columns: PairColumns) -> Any:
    """The same rows with images as bytes or paths: one broken image must not stop the reading."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    if _is_transformed(dataset):
        return dataset
    if isinstance(dataset, Dataset):
        # Arrow tables hold images as they were stored.
        names = {_top(name, dataset.column_names) for name in (columns.image, columns.text)}
        known = names <= set(dataset.column_names)
        return (dataset.select_columns(sorted(names)) if known else dataset).with_format("arrow")
    # A stream of its own: going on from a checkpoint must not move the caller's.
    dataset = dataset.with_format(None)
    features = dataset.features or {}
    names = {_top(name, features) for name in (columns.image, columns.text)}
    if names <= set(features):
        dataset = dataset.select_columns(sorted(names))
        for name in names:
            feature = _without_decoding(features[name])
            if feature != features[name]:
                dataset = dataset.cast_column(name, feature)
    return dataset


def _top(column: str, names: Collection[str]) -> str:
    """The column of the data set that a possibly dotted name leads into."""
    return column if column in names else column.partition(".")[0]


def _without_decoding(feature: Any) -> Any:
    """The type of a column with its images undecoded, however deep they lie."""
    if isinstance(feature, ImageFeature):
        return ImageFeature(decode=False)
    if isinstance(feature, dict):
        return {name: _without_decoding(part) for name, part in feature.items()}
    if isinstance(feature, (List, LargeList)):
        return dataclasses.replace(feature, feature=_without_decoding(feature.feature))
    return feature


def _is_transformed(dataset: Any) -> bool:
    """Whether rows pass through a function of the user's when they are read."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def _resumes_exactly(dataset: Any) -> bool:
    """Whether a stream's state leads to the same rows: what is in a shuffle buffer is not in it."""
    if not isinstance(dataset, IterableDataset):
        return False
    sources = [getattr(dataset, "_ex_iterable", None)]
    for source in sources:
        if source is None or type(source).__name__ == "BufferShuffledExamplesIterable":
            return False
        inner = getattr(source, "ex_iterable", None)
        sources += getattr(source, "ex_iterables", []) if inner is None else [inner]
    return True


def _row(dataset: Any, number: int) -> Any:
    try:
        return dataset[number]
    except _ROW_ERRORS as error:
        return error


def _image_bytes(image: Any) -> bytes:
    if isinstance(image, dict):
        return cast(bytes, image.get("bytes") or str(image.get("path")).encode())
    if isinstance(image, Image.Image):
        try:
            return f"{image.mode}{image.size}".encode() + image.tobytes()
        except _ROW_ERRORS as error:
            return str(error).encode()
    if isinstance(image, np.ndarray):
        return f"{image.dtype}{image.shape}".encode() + image.tobytes()
    if isinstance(image, (str, os.PathLike)):
        # The file and not its path: the same path may lead to another file, another path to the same.
        try:
            return Path(image).read_bytes()
        except (OSError, ValueError):
            return str(image).encode()
    return image if isinstance(image, bytes) else str(image).encode()


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None

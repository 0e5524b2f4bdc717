"""Slots of data sets of every kind, in windows, resumed, undecoded."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    load_dataset,
)
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_bayesvlm.pairs import PairColumns, PairError, Slot
from hf_bayesvlm.slots import SlotReader

COUNT = 13
EXPAND = PairColumns(captions="expand")


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (i, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(count: int = COUNT) -> list[dict[str, Any]]:
    """Row i has i % 4 captions."""
    return [
        {"image": {"bytes": png(i), "path": None}, "text": [f"{i}.{j}" for j in range(i % 4)]}
        for i in range(count)
    ]


FEATURES = Features({"image": ImageFeature(), "text": List(Value("string"))})


def table(count: int = COUNT) -> Dataset:
    return Dataset.from_list(rows(count), features=FEATURES)


class Again:
    """Can be read often, but not by number."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(rows())


class Sized(Again):
    """Knows its length too."""

    def __len__(self) -> int:
        return COUNT


class ByNumber:
    """As data sets of torch are, with rows that cannot be read."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = dict(enumerate(errors, start=3))

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> dict[str, Any]:
        assert type(i) is int
        if i in self.errors:
            raise self.errors[i]
        return rows()[i]


class Unsized(ByNumber):
    """Indexed, of unknown length."""

    __len__ = None  # type: ignore[assignment]

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i >= COUNT:
            raise IndexError(i)
        return super().__getitem__(i)


def generate() -> Iterator[dict[str, Any]]:
    yield from rows()


KINDS = {
    "list": rows,
    "tuple": lambda: tuple(rows()),
    "Dataset": table,
    "Dataset, selected": lambda: Dataset.from_list([*rows(), *rows()], features=FEATURES).select(
        range(COUNT)
    ),
    "Dataset, more columns": lambda: table().add_column("other", list(range(COUNT))),
    "Dataset, torch format": lambda: table().with_format("torch"),
    "Dataset, numpy format": lambda: table().with_format("numpy", columns=["text"]),
    "Dataset, pandas format": lambda: table().with_format("pandas"),
    "Dataset, transform": lambda: table().with_transform(lambda batch: batch),
    "stream": lambda: table().to_iterable_dataset(),
    "stream of three": lambda: table().to_iterable_dataset(num_shards=3),
    "stream, torch format": lambda: table().to_iterable_dataset().with_format("torch"),
    "stream, numpy format": lambda: table().to_iterable_dataset().with_format("numpy"),
    "stream, arrow format": lambda: table().to_iterable_dataset().with_format("arrow"),
    "stream, mapped": lambda: table().to_iterable_dataset().map(lambda row: row),
    "stream of a generator": lambda: IterableDataset.from_generator(generate),
    "typed stream of a generator": lambda: IterableDataset.from_generator(
        generate, features=FEATURES
    ),
    "generator": generate,
    "class": Again,
    "class with length": Sized,
    "torch": ByNumber,
    "torch without length": Unsized,
}


def seen(slots: Iterator[Slot] | list[Slot], columns: PairColumns = EXPAND) -> list[Any]:
    """Number, row, text and the colour of the image, decoded."""
    return [
        (
            s.number,
            s.row,
            s.text,
            None if s.error or not s.text else columns.pair(s).image.getpixel((0, 0))[0],
        )
        for s in slots
    ]


def expected() -> list[Any]:
    slots = [(i, text) for i, row in enumerate(rows()) for text in (row["text"] or [""])]
    return [(n, i, text, i if text else None) for n, (i, text) in enumerate(slots)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_slots(kind: str) -> None:
    reader = SlotReader(KINDS[kind](), EXPAND)
    total = len(expected())
    assert seen(reader.read(0, total + 99)) == expected()
    assert reader.num_slots == (total if reader.random_access else None)
    assert list(reader.read(total, total + 5)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_choice_of_captions(kind: str) -> None:
    columns = PairColumns(seed=5)
    by_list = seen(SlotReader(rows(), columns).read(0, 99), columns)
    reader = SlotReader(KINDS[kind](), columns)
    assert reader.num_slots in (COUNT, None)
    assert seen(reader.read(0, 99), columns) == by_list
    assert [row for _, row, _, _ in by_list] == list(range(COUNT))


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(0, 5), max_size=12),
    cuts=st.lists(st.integers(0, 70), max_size=5).map(sorted),
    captions=st.sampled_from(["sample", "expand"]),
)
def test_windows_by_number_and_as_a_stream(
    counts: list[int], cuts: list[int], captions: Any
) -> None:
    data = [
        {"image": i, "text": [f"{i}.{j}" for j in range(count)]} for i, count in enumerate(counts)
    ]
    columns = PairColumns(captions=captions)
    whole = list(SlotReader(data, columns).read(0, 999))
    assert [slot.number for slot in whole] == list(range(len(whole)))
    assert len(whole) == (
        len(counts) if captions == "sample" else sum(max(1, count) for count in counts)
    )
    windows = list(zip([0, *cuts], [*cuts, 999], strict=True))
    as_table = Dataset.from_list(
        [row | {"image": str(row["image"])} for row in data] or [{"image": "", "text": []}],
        features=Features({"image": Value("string"), "text": List(Value("string"))}),
    )
    sources = (data, iter(data), as_table, as_table.to_iterable_dataset())
    for source in sources if data else sources[:2]:
        reader = SlotReader(source, columns)
        found = [list(reader.read(start, stop)) for start, stop in windows]
        for (start, stop), slots in zip(windows, found, strict=True):
            assert [slot.number for slot in slots] == [
                slot.number for slot in whole if start <= slot.number < stop
            ]
        assert [(s.number, s.row, s.text, str(s.image)) for part in found for s in part] == [
            (s.number, s.row, s.text, str(s.image)) for s in whole
        ]


def test_windows_with_gaps() -> None:
    for kind in ("list", "Dataset", "stream", "generator"):
        reader = SlotReader(KINDS[kind](), EXPAND)
        assert seen(reader.read(2, 4)) == expected()[2:4]
        assert seen(reader.read(9, 9)) == []
        assert seen(reader.read(11, 14)) == expected()[11:14]


# Going on from a position


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("parquet")
    names = []
    for k in range(3):
        part = table().select(range(k * COUNT // 3, (k + 1) * COUNT // 3))
        names.append(str(folder / f"{k}.parquet"))
        part.to_parquet(names[-1], batch_size=2)
    return names


STREAMS = {
    "generator": lambda files: generate(),
    "class": lambda files: Again(),
    "list": lambda files: rows(),
    "table": lambda files: table().to_iterable_dataset(num_shards=2),
    "stream of a generator": lambda files: IterableDataset.from_generator(generate),
    "files": lambda files: load_dataset("parquet", data_files=files, split="train", streaming=True),
    "files, filtered": lambda files: load_dataset(
        "parquet", data_files=files, split="train", streaming=True
    ).filter(lambda row: row["text"] != ["1.0"]),
    "files, mapped in batches": lambda files: load_dataset(
        "parquet", data_files=files, split="train", streaming=True
    ).map(lambda batch: batch, batched=True, batch_size=4),
    "files, skipped and taken": lambda files: (
        load_dataset("parquet", data_files=files, split="train", streaming=True).skip(2).take(9)
    ),
    "shuffled": lambda files: (
        table().to_iterable_dataset(num_shards=3).shuffle(seed=3, buffer_size=4)
    ),
}


@pytest.mark.parametrize("stop", [0, 1, 5, 8, 15, 99])
@pytest.mark.parametrize("kind", STREAMS)
def test_a_reader_goes_on_where_another_stopped(kind: str, stop: int, files: list[str]) -> None:
    first = SlotReader(STREAMS[kind](files), EXPAND)
    before = seen(first.read(0, stop))
    position = json.loads(json.dumps(first.position()))
    rest = seen(first.read(stop, 99))
    assert len(before) == min(stop, len(before) + len(rest))
    second = SlotReader(STREAMS[kind](files), EXPAND)
    second.seek(position)
    assert seen(second.read(stop, 99)) == rest


def test_a_resumed_stream_does_not_open_the_files_before(files: list[str], tmp_path: Path) -> None:
    copies = [tmp_path / Path(name).name for name in files]
    for name, copy in zip(files, copies, strict=True):
        copy.write_bytes(Path(name).read_bytes())

    def reader() -> SlotReader:
        names = [str(copy) for copy in copies]
        stream = load_dataset("parquet", data_files=names, split="train", streaming=True)
        return SlotReader(stream, EXPAND)

    first = reader()
    list(first.read(0, 16))
    position = first.position()
    assert position["row"] == 10
    rest = seen(first.read(16, 99))
    second = reader()
    copies[0].write_bytes(b"not a parquet file any more")
    second.seek(position)
    assert seen(second.read(16, 99)) == rest


@pytest.mark.parametrize("kind", ["stream of a generator", "files", "table"])
def test_the_callers_stream_stays_at_its_beginning(kind: str, files: list[str]) -> None:
    stream = STREAMS[kind](files)
    first = SlotReader(stream, EXPAND)
    list(first.read(0, 8))
    SlotReader(stream, EXPAND).seek(first.position())
    assert [row["text"] for row in stream] == [row["text"] for row in rows()]


# What tells data sets apart


DIGEST = """
import sys
from test_slots import KINDS, EXPAND, SlotReader
print({kind: SlotReader(KINDS[kind](), EXPAND).sample_digest() for kind in sys.argv[1:]})
"""


def test_the_digest_is_the_same_in_another_process() -> None:
    kinds = ["list", "Dataset", "stream of three", "generator", "stream of a generator", "torch"]
    here = {kind: SlotReader(KINDS[kind](), EXPAND).sample_digest() for kind in kinds}
    done = subprocess.run(
        [sys.executable, "-c", DIGEST, *kinds],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.strip() == str(here), done.stderr[-2000:]


def test_the_digest_leaves_the_first_read_complete() -> None:
    for kind in KINDS:
        reader = SlotReader(KINDS[kind](), EXPAND)
        assert reader.sample_digest()
        assert seen(reader.read(0, 99)) == expected(), kind


def test_the_digest_sees_changed_rows() -> None:
    digests = set()
    changes: list[dict[str, Any]] = [
        {},
        {"text": ["other"]},
        {"image": {"bytes": png(99), "path": None}},
        {"image": {"bytes": None, "path": "a.png"}},
        {"image": {"bytes": None, "path": "b.png"}},
        {"image": "c.png"},
        {"image": Image.new("RGB", (4, 4))},
        {"image": Image.new("RGB", (2, 8))},
        {"image": Image.new("I;16", (4, 4))},
        {"image": np.zeros((4, 4, 3), np.uint8)},
        {"image": np.zeros((2, 8, 3), np.uint8)},
        {"image": None},
    ]
    for change in changes:
        data = rows()
        data[5] |= change
        digests.add(SlotReader(data, EXPAND).sample_digest())
        digests.add(SlotReader(iter(data), EXPAND).sample_digest())
    assert len(digests) == 2 * len(changes)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "I;16", "I", "F", "P", "CMYK", "LAB", "HSV"]
)
def test_the_digest_takes_every_kind_of_image(mode: str) -> None:
    data = [{"image": Image.new(mode, (4, 4)), "text": "a"}]
    assert SlotReader(data, PairColumns()).sample_digest()


def test_the_digest_takes_a_broken_image(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    with Image.open(tmp_path / "a.png") as image:
        assert SlotReader([{"image": image, "text": "a"}], PairColumns()).sample_digest()


# Rows that cannot be read


def test_rows_that_cannot_be_read_do_not_stop_the_others() -> None:
    errors = [
        ValueError("bad value"),
        OSError("bad file"),
        RuntimeError("bad decoder"),
        EOFError("bad end"),
        Image.DecompressionBombError("bad bomb"),
    ]
    slots = list(SlotReader(ByNumber(*errors), PairColumns()).read(0, 99))
    assert [s.number for s in slots] == list(range(COUNT))
    for i, error in enumerate(errors, start=3):
        assert slots[i].error == str(error)
        with pytest.raises(PairError, match=f"row {i}: bad"):
            PairColumns().pair(slots[i])
    assert slots[2].error is slots[3 + len(errors)].error is None
    total = len(list(SlotReader(ByNumber(*errors), EXPAND).read(0, 99)))
    assert SlotReader(ByNumber(*errors), EXPAND).num_slots == total


def test_programming_errors_are_not_taken_for_bad_rows() -> None:
    with pytest.raises(TypeError, match="mine"):
        list(SlotReader(ByNumber(TypeError("mine")), PairColumns()).read(0, 99))


def test_a_transform_that_fails_for_one_row() -> None:
    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        if ["5.0"] in batch["text"]:
            raise ValueError("not this one")
        return {"picture": batch["image"], "caption": batch["text"]}

    columns = PairColumns(image="picture", text="caption", captions="expand")
    slots = list(SlotReader(table().with_transform(transform), columns).read(0, 99))
    assert [s.row for s in slots if s.error] == [5]
    good = [entry for entry in seen(slots, columns) if entry[1] != 5]
    assert good == [entry for entry in expected() if entry[1] != 5]


def nested(i: int, broken: int = 4) -> dict[str, Any]:
    return {"bytes": b"junk" if i == broken else png(i), "path": None}


BROKEN = {
    "image": (ImageFeature(), nested, PairColumns()),
    "dotted": (
        {"of": ImageFeature()},
        lambda i: {"of": nested(i)},
        PairColumns(image="image.of"),
    ),
    "list": (List(ImageFeature()), lambda i: [nested(i)], PairColumns()),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_does_not_stop_the_others(kind: str, streaming: bool) -> None:
    feature, make, columns = BROKEN[kind]
    features = Features({"image": feature, "text": Value("string"), "other": ImageFeature()})
    data: Any = Dataset.from_list(
        [{"image": make(i), "text": f"{i}", "other": nested(i, broken=2)} for i in range(6)],
        features=features,
    )
    if streaming:
        data = data.to_iterable_dataset()
    slots = list(SlotReader(data, columns).read(0, 99))
    assert [s.text for s in slots] == list("012345")
    if kind != "list":
        with pytest.raises(PairError, match=r"row 4: .*not an image"):
            columns.pair(slots[4])
        assert columns.pair(slots[5]).image.getpixel((0, 0)) == (5, 0, 0)


def test_undecoded_reading_leaves_the_callers_data_set_alone() -> None:
    data = table().with_format("torch", columns=["image", "text"])
    stream = table().to_iterable_dataset()
    before = data.features.copy(), data.format, data._fingerprint, stream.features.copy()
    for source in (data, stream):
        reader = SlotReader(source, EXPAND)
        reader.sample_digest()
        list(reader.read(0, 99))
    assert (data.features, data.format, data._fingerprint, stream.features) == before
    assert isinstance(next(iter(stream))["image"], Image.Image)


def test_opening_copies_no_images(tmp_path: Path) -> None:
    """A data set of terabytes must not be converted before the first row is read."""
    features = Features({"part": {"image": ImageFeature(), "text": Value("string")}})
    data = [{"part": {"image": nested(i), "text": "a"}} for i in range(5)]
    Dataset.from_list(data, features=features).save_to_disk(str(tmp_path / "data"))
    saved = Dataset.load_from_disk(str(tmp_path / "data"))
    before = sorted(tmp_path.rglob("*"))
    columns = PairColumns(image="part.image", text="part.text", captions="expand")
    assert len(list(SlotReader(saved, columns).read(0, 99))) == 5
    assert sorted(tmp_path.rglob("*")) == before


# What is no data set of pairs


TEXTS = {"caption": ["a", "b"], "label": [0, 1]}
PICTURES = {"picture": [{"bytes": png(0), "path": None}]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DatasetDict(train=table(2), test=table(2)), r"dataset\['train'\].*train, test"),
        (IterableDatasetDict(val=table(2).to_iterable_dataset()), r"dataset\['val'\]"),
        (DatasetDict(), "has none"),
        ({"image": [1], "text": ["a"]}, "one row a pair, not be a dict"),
        ({"train": table(2)}, "one row a pair, not be a dict"),
        (UserDict(image=[1], text=["a"]), "one row a pair, not be a UserDict"),
        ("user/pairs", "not be a str.*open_dataset"),
        (b"pairs", "not be a bytes"),
        (Path("pairs"), r"not be a \w+Path.*open_dataset"),
        (None, "not be a NoneType"),
        (3, "not be a int"),
        (pd.DataFrame({"image": [1], "text": ["a"]}), "Dataset.from_pandas"),
        (Dataset.from_dict(TEXTS), "has caption, label. It holds texts and no images"),
        (Dataset.from_dict(TEXTS).to_iterable_dataset(), "texts and no images"),
        (
            Dataset.from_dict(TEXTS).cast_column("caption", Value("large_string")),
            "texts and no images",
        ),
        (
            Dataset.from_dict(PICTURES, features=Features({"picture": ImageFeature()})),
            "'picture' holds images and nothing holds texts",
        ),
        (Dataset.from_dict({"image": ["a"], "caption": ["b"]}), "no column 'text'; it has image"),
        (Dataset.from_dict({"url": ["a"], "caption": ["b"]}), "Name the columns"),
    ],
)
def test_what_is_no_data_set_of_pairs(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlotReader(data, PairColumns())


def test_names_with_dots_are_found_whole_or_in_parts() -> None:
    data = Dataset.from_dict({"a.png": ["x"], "json": [{"text": "t"}]})
    columns = PairColumns(image="a.png", text="json.text")
    [slot] = SlotReader(data, columns).read(0, 9)
    assert (slot.image, slot.text) == ("x", "t")
    [slot] = SlotReader(data.to_iterable_dataset(), columns).read(0, 9)
    assert (slot.image, slot.text) == ("x", "t")
    with pytest.raises(ValueError, match=r"no column .png\.a."):
        SlotReader(data, PairColumns(image="png.a", text="json.text"))


@pytest.mark.parametrize("data", [[], Dataset.from_list([]), iter(()), table().select([])])
def test_nothing_at_all(data: Any) -> None:
    for columns in (PairColumns(), EXPAND):
        reader = SlotReader(data, columns)
        assert reader.sample_digest()
        assert list(reader.read(0, 9)) == []

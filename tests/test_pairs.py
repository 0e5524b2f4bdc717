"""Pairs out of rows: columns, captions, images, and what is wrong with a row."""

from __future__ import annotations

import base64
import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_bayesvlm.pairs import Pair, PairColumns, PairError, Slot, cell

RED = (250, 10, 20)


def png(color: tuple[int, int, int] = RED, size: tuple[int, int] = (6, 5)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def slot(image: Any, text: Any = "a cat", row: int = 7) -> Slot:
    return Slot(0, row, image, text)


def color(pair: Pair) -> tuple[int, ...]:
    assert pair.image.mode == "RGB"
    return pair.image.getpixel((0, 0))


def chosen(texts: Any, **columns: Any) -> list[Any]:
    return [s.text for s in PairColumns(**columns).slots_of({"image": 0, "text": texts}, 3, 0)]


# Columns


def test_a_column_is_found_by_its_whole_name_first() -> None:
    row = {"a.b": 1, "a": {"b": 2, "c": {"d": 3}}}
    assert cell(row, "a.b") == 1
    assert cell(row, "a.c") == {"d": 3}
    assert cell(row, "a.c.d") == 3


@pytest.mark.parametrize("column", ["x", "a.x", "a.b.c", "a.", ".a"])
def test_a_missing_column_is_named_with_those_there_are(column: str) -> None:
    with pytest.raises(PairError, match=r"no column .* it has ") as caught:
        cell({"a": {"b": 1}, "other": 2}, column)
    assert repr(column.rpartition(".")[2] or column)[1:-1] in str(caught.value)


@pytest.mark.parametrize("row", [("image", "text"), None, "text", 3, [1, 2]])
def test_a_row_must_be_a_mapping(row: Any) -> None:
    with pytest.raises(PairError, match="not a mapping"):
        cell(row, "image")
    [only] = PairColumns().slots_of(row, 5, 9)
    assert (only.number, only.row) == (9, 5)
    with pytest.raises(PairError, match=r"row 5: .*not a mapping"):
        PairColumns().pair(only)


def test_a_row_that_could_not_be_read_is_a_bad_pair() -> None:
    [only] = PairColumns(captions="expand").slots_of(OSError("disk on fire"), 4, 11)
    assert only.number == 11
    with pytest.raises(PairError, match="row 4: disk on fire"):
        PairColumns().pair(only)
    [silent] = PairColumns().slots_of(ValueError(), 4, 11)
    with pytest.raises(PairError, match="row 4: ValueError"):
        PairColumns().pair(silent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": "all"}, "captions"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"image": None}, "column"),
        ({"text": ""}, "column"),
        ({"text": ["text"]}, "column"),
    ],
)
def test_impossible_columns_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairColumns(**change)


# Captions


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_several_captions(kind: Any) -> None:
    texts = kind(["a", "b", "c"])
    [one] = chosen(texts)
    assert one in ("a", "b", "c")
    assert chosen(texts, captions="expand") == ["a", "b", "c"]
    assert PairColumns(captions="expand").count_slots({"text": texts}) == 3
    assert PairColumns().count_slots({"text": texts}) == 1


@pytest.mark.parametrize("captions", ["sample", "expand"])
def test_a_text_in_an_array_without_dimensions_is_a_text(captions: Any) -> None:
    columns = PairColumns(captions=captions)
    text = np.array("a cat")
    [only] = columns.slots_of({"image": png(), "text": text}, 0, 0)
    assert columns.count_slots({"text": text}) == 1
    assert columns.pair(only).text == "a cat"


@pytest.mark.parametrize("captions", ["sample", "expand"])
@pytest.mark.parametrize("texts", [[], (), np.array([])])
def test_a_row_without_captions_is_one_bad_slot(texts: Any, captions: Any) -> None:
    columns = PairColumns(captions=captions)
    [only] = columns.slots_of({"image": png(), "text": texts}, 2, 5)
    assert columns.count_slots({"text": texts}) == 1
    with pytest.raises(PairError, match="row 2: the caption in 'text'"):
        columns.pair(only)


def test_sample_leaves_out_captions_that_are_none() -> None:
    for seed in range(20):
        assert chosen(["", "  ", "a cat", None, 3], seed=seed) == ["a cat"]


def test_expand_keeps_a_slot_for_captions_that_are_none() -> None:
    columns = PairColumns(captions="expand")
    slots = columns.slots_of({"image": png(), "text": ["a", "", None, "b"]}, 1, 10)
    assert [s.number for s in slots] == [10, 11, 12, 13]
    assert [columns.pair(slots[i]).text for i in (0, 3)] == ["a", "b"]
    for i in (1, 2):
        with pytest.raises(PairError, match="non-empty"):
            columns.pair(slots[i])


@settings(deadline=None, max_examples=50)
@given(
    texts=st.lists(st.text(min_size=1), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    row=st.integers(0, 2**40),
    slots=st.tuples(st.integers(0, 99), st.integers(0, 99)),
)
def test_the_choice_is_by_seed_and_row_alone(
    texts: list[str], seed: int, row: int, slots: tuple[int, int]
) -> None:
    columns = PairColumns(seed=seed)
    first, second = (columns.slots_of({"image": 0, "text": texts}, row, n) for n in slots)
    assert first[0].text == second[0].text
    assert first[0].text in texts


def test_another_seed_or_row_chooses_anew_and_evenly() -> None:
    texts = list("abcde")
    by_row = [
        PairColumns().slots_of({"image": 0, "text": texts}, i, i)[0].text for i in range(2000)
    ]
    by_seed = [chosen(texts, seed=i)[0] for i in range(2000)]
    for choices in (by_row, by_seed):
        counts = [choices.count(text) for text in texts]
        assert min(counts) > 320
        assert max(counts) < 480


@pytest.mark.parametrize("captions", ["sample", "expand"])
@pytest.mark.parametrize(
    "row",
    [
        *({"image": 0, "text": text} for text in ("a", ["a"], ["a", "b"], [], None, 3)),
        *({"text": ["a", "b"]}, {"image": 0}, {}, None, 3, OSError("x")),
    ],
    ids=str,
)
def test_slots_are_counted_by_their_captions_alone(row: Any, captions: Any) -> None:
    columns = PairColumns(captions=captions)
    slots = columns.slots_of(row, 3, 20)
    assert columns.count_slots(row) == len(slots)
    assert [s.number for s in slots] == list(range(20, 20 + len(slots)))


# Cells that are no pair


@pytest.mark.parametrize("text", [None, 3, 1.5, "", " \n", b"bytes", ["nested"], {"raw": "a"}])
def test_a_caption_must_be_a_text(text: Any) -> None:
    with pytest.raises(PairError, match="row 7: the caption in 'text' must be a non-empty string"):
        PairColumns().pair(slot(png(), text))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "no image in 'image'"),
        (b"", "image"),
        (b"not an image", "not an image that Pillow can read"),
        (png()[:50], "damaged or truncated"),
        (3, "int"),
        ([png()], "list"),
        ({"bytes": None, "path": None}, "no image in 'image'"),
        ({"bytes": b"junk", "path": "a.png"}, "not an image"),
        ({"bytes": None, "path": "missing.png"}, "missing.png"),
        ({"url": "x"}, "'image'"),
        ("missing.png", "no image file"),
        ("memory://missing.png", "missing.png"),
        ("nothing://of/that/kind.png", "nothing"),
        ("http://127.0.0.1:9/a.png", "cannot be downloaded"),
        ("http://[bad/a.png", "cannot be downloaded"),
        ("data:image/png;base64,????", "base64"),
        ("zip://a.png::missing.zip", "missing.zip"),
    ],
)
def test_a_bad_image_is_named_by_row(image: Any, message: str) -> None:
    with pytest.raises(PairError, match="row 7: ") as caught:
        PairColumns().pair(slot(image))
    assert message in str(caught.value)


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(PairError, match=r"row 7: .*is a folder"):
        PairColumns().pair(slot(str(tmp_path)))


def test_an_archive_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "bad.zip").write_bytes(b"not a zip")
    with pytest.raises(PairError, match="row 7: "):
        PairColumns().pair(slot(f"zip://a.png::{tmp_path / 'bad.zip'}"))


# Where images are


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png())
    return tmp_path


@pytest.mark.parametrize("kind", [str, Path, lambda path: {"bytes": None, "path": str(path)}])
def test_relative_paths_start_from_image_root(folder: Path, kind: Any) -> None:
    columns = PairColumns(image_root=str(folder))
    assert color(columns.pair(slot(kind(Path("sub/a.png"))))) == RED
    with pytest.raises(PairError, match="no image file"):
        PairColumns().pair(slot(kind(Path("sub/a.png"))))


@pytest.mark.parametrize("kind", [str, Path, lambda path: {"bytes": None, "path": str(path)}])
def test_absolute_paths_are_taken_as_they_are(folder: Path, kind: Any) -> None:
    columns = PairColumns(image_root="elsewhere")
    assert color(columns.pair(slot(kind(folder / "sub" / "a.png")))) == RED


def test_a_missing_file_is_named_with_its_root(tmp_path: Path) -> None:
    columns = PairColumns(image_root=str(tmp_path))
    with pytest.raises(PairError) as caught:
        columns.pair(slot("b.png"))
    assert str(tmp_path / "b.png") in str(caught.value)


@pytest.mark.parametrize("root", [None, "somewhere"])
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
@pytest.mark.parametrize("size", [(6, 5), (90, 90)])
def test_base64_is_no_path(root: str | None, prefix: str, size: tuple[int, int]) -> None:
    # The larger one is longer than any path may be.
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    noise[0, 0] = RED
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    text = prefix + base64.b64encode(buffer.getvalue()).decode()
    assert color(PairColumns(image_root=root).pair(slot(text))) == RED


def test_base64_of_a_jpeg_looks_like_an_absolute_path() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), RED).save(buffer, "JPEG", quality=95)
    text = base64.b64encode(buffer.getvalue()).decode()
    assert text.startswith("/9j/")
    assert PairColumns(image_root="somewhere").pair(slot(text)).image.size == (8, 8)


@pytest.mark.parametrize(
    "image",
    [
        png(),
        bytearray(png()),
        Image.new("RGB", (4, 4), RED),
        np.full((4, 4, 3), RED, dtype=np.uint8),
        {"bytes": png(), "path": None},
        {"bytes": png(), "path": "some/where.png"},
        {"bytes": png()},
        {"path": "some/where.png", "bytes": png(), "size": 3},
    ],
    ids=lambda image: type(image).__name__,
)
def test_images_in_memory(image: Any) -> None:
    assert color(PairColumns(image_root="elsewhere").pair(slot(image))) == RED


@pytest.mark.parametrize("kind", [str, lambda path: {"bytes": None, "path": path}])
def test_other_file_systems(kind: Any, tmp_path: Path) -> None:
    with fsspec.open("memory://pairs/a.png", "wb") as stream:
        stream.write(png())
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("in/a.png", png((1, 2, 3)))
    columns = PairColumns(image_root="elsewhere")
    assert color(columns.pair(slot(kind("memory://pairs/a.png")))) == RED
    assert color(columns.pair(slot(kind(f"zip://in/a.png::{archive}")))) == (1, 2, 3)
    beside = PairColumns(image_root="memory://pairs")
    assert color(beside.pair(slot(kind("a.png")))) == RED
    assert color(columns.pair(slot(kind("simplecache::memory://pairs/a.png")))) == RED


def test_an_open_file_is_decoded_once_by_many_threads(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    columns = PairColumns(captions="expand")
    for _ in range(5):
        with Image.open(tmp_path / "noise.png") as image:
            slots = columns.slots_of({"image": image, "text": list("abcdefgh")}, 0, 0)
            with ThreadPoolExecutor(8) as pool:
                for pair in pool.map(columns.pair, slots):
                    np.testing.assert_array_equal(np.asarray(pair.image), pixels)


def test_the_pair_knows_its_row() -> None:
    pair = PairColumns().pair(slot(png(), "a dog", row=12))
    assert (pair.row, pair.text, pair.image.size) == (12, "a dog", (6, 5))

"""Data sets from folders and files of every kind."""

from __future__ import annotations

import csv
import functools
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from hf_bayesvlm.pairs import PairColumns
from hf_bayesvlm.slots import SlotReader
from hf_bayesvlm.sources import OpenedDataset, find_columns, open_dataset

COUNT = 6


@pytest.fixture(autouse=True)
def _cache_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written into the user's home."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", cache / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", cache / "extracted")


def color(i: int) -> tuple[int, int, int]:
    return (10 * i, 0, 255 - i)


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color(i)).save(buffer, "PNG")
    return buffer.getvalue()


def caption(i: int) -> str:
    # What tables have to quote.
    return f'a "cat", number {i}'


def table(start: int = 0, stop: int = COUNT) -> Dataset:
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    rows = [
        {"image": {"bytes": png(i), "path": f"{i}.png"}, "caption": caption(i)}
        for i in range(start, stop)
    ]
    return Dataset.from_list(rows, features=features)


def images(folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(png(i))
    return [f"{i}.png" for i in range(COUNT)]


def imagefolder(folder: Path) -> Path:
    rows = [
        {"file_name": name, "caption": caption(i)} for i, name in enumerate(images(folder / "all"))
    ]
    write_table(folder / "all" / "metadata.csv", rows)
    return folder / "all"


def write_table(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def paths(folder: Path) -> list[dict[str, Any]]:
    names = images(folder / "images")
    return [{"image_path": f"images/{n}", "text": caption(i)} for i, n in enumerate(names)]


def json_lines(folder: Path) -> Path:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in paths(folder)))
    return folder / "pairs.jsonl"


def parquet_file(folder: Path) -> Path:
    table().to_parquet(folder / "pairs.parquet")
    return folder / "pairs.parquet"


def parquet_folder(folder: Path) -> Path:
    (folder / "data").mkdir()
    for k in range(3):
        table(2 * k, 2 * k + 2).to_parquet(folder / "data" / f"train-{k:05}-of-00003.parquet")
    return folder / "data"


def arrow_file(folder: Path) -> Path:
    table().save_to_disk(str(folder / "saved"))
    return next((folder / "saved").glob("*.arrow"))


def saved(folder: Path) -> Path:
    table().save_to_disk(str(folder / "saved"), num_shards=2)
    return folder / "saved"


def saved_splits(folder: Path) -> Path:
    DatasetDict(train=table(), test=table(0, 2)).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def tars(folder: Path) -> Path:
    (folder / "shards").mkdir()
    for k in range(2):
        with tarfile.open(folder / "shards" / f"{k:03}.tar", "w") as target:
            for i in range(3 * k, 3 * k + 3):
                for ending, data in (("png", png(i)), ("txt", caption(i).encode())):
                    member = tarfile.TarInfo(f"{i:04}.{ending}")
                    member.size = len(data)
                    target.addfile(member, io.BytesIO(data))
    return folder / "shards"


KINDS: dict[str, Callable[[Path], Any]] = {
    "imagefolder": imagefolder,
    "parquet file": parquet_file,
    "parquet folder": parquet_folder,
    "parquet pattern": lambda folder: parquet_folder(folder) / "*.parquet",
    "arrow": arrow_file,
    "saved": saved,
    "saved splits": saved_splits,
    "webdataset folder": tars,
    "webdataset pattern": lambda folder: tars(folder) / "*.tar",
    "webdataset range": lambda folder: str(tars(folder) / "{000..001}.tar"),
    "csv": lambda folder: write_table(folder / "pairs.csv", paths(folder)),
    "tsv": lambda folder: write_table(folder / "pairs.tsv", paths(folder), "\t"),
    "jsonl": json_lines,
}


def read(opened: OpenedDataset, *names: str) -> list[tuple[str, Any]]:
    """All pairs as caption and colour."""
    image, text = names or find_columns(opened.dataset, None, None)
    columns = PairColumns(image, text, image_root=opened.image_root)
    pairs = [columns.pair(slot) for slot in SlotReader(opened.dataset, columns).read(0, 99)]
    return [(pair.text, pair.image.getpixel((0, 0))) for pair in pairs]


def expected(count: int = COUNT) -> list[tuple[str, Any]]:
    return [(caption(i), color(i)) for i in range(count)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_pairs(kind: str, streaming: bool, tmp_path: Path) -> None:
    opened = open_dataset(KINDS[kind](tmp_path), streaming=streaming)
    assert isinstance(opened.dataset, IterableDataset if streaming else Dataset)
    assert read(opened) == expected()
    assert opened.revision is None
    assert opened.name


@pytest.mark.parametrize("kind", ["imagefolder", "csv", "parquet folder"])
def test_relative_sources(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = KINDS[kind](tmp_path)
    monkeypatch.chdir(source.parent)
    opened = open_dataset(source.name)
    assert read(opened) == expected()
    assert opened.name == source.name
    if source.is_dir():
        monkeypatch.chdir(source)
        here = open_dataset(".")
        assert read(here) == expected()
        assert here.name == source.name


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on this machine, and the folder it serves."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", tmp_path
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_tables_of_addresses(ending: str, streaming: bool, server: tuple[str, Path]) -> None:
    address, folder = server
    rows = [
        {"url": f"{address}/images/{name}", "caption": caption(i)}
        for i, name in enumerate(images(folder / "images"))
    ]
    path = folder / f"pairs.{ending}"
    if ending == "csv":
        write_table(path, rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (path, f"{address}/pairs.{ending}", f"{address}/pairs.{ending}?download=true"):
        opened = open_dataset(source, streaming=streaming)
        assert find_columns(opened.dataset, None, None) == ("url", "caption")
        assert read(opened) == expected()


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_web_server(streaming: bool, server: tuple[str, Path]) -> None:
    address, folder = server
    tars(folder)
    opened = open_dataset(f"{address}/shards/{{000..001}}.tar", streaming=streaming)
    assert read(opened) == expected()


# Splits and configurations


def split_files(folder: Path, *names: str) -> Path:
    (folder / "data").mkdir()
    for k, name in enumerate(names, start=1):
        table(0, k).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder / "data"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["files", "saved"])
def test_splits(kind: str, streaming: bool, tmp_path: Path) -> None:
    if kind == "files":
        folder = split_files(tmp_path, "validation", "test")
    else:
        folder = tmp_path / "data"
        DatasetDict(validation=table(0, 1), test=table(0, 2)).save_to_disk(str(folder))
    with pytest.raises(ValueError, match=r"which split.*validation, test"):
        open_dataset(folder, streaming=streaming)
    with pytest.raises(ValueError, match="no split 'train'; the data set has validation, test"):
        open_dataset(folder, split="train", streaming=streaming)
    opened = open_dataset(folder, split="test", streaming=streaming)
    assert read(opened) == expected(2)


def test_train_is_taken_by_default(tmp_path: Path) -> None:
    assert read(open_dataset(split_files(tmp_path, "test", "train"))) == expected(2)


def test_the_only_split_is_taken(tmp_path: Path) -> None:
    assert read(open_dataset(split_files(tmp_path, "validation"))) == expected(1)


def test_a_part_of_a_split(tmp_path: Path) -> None:
    assert read(open_dataset(parquet_file(tmp_path), split="train[:2]")) == expected(2)
    with pytest.raises(ValueError, match="split"):
        open_dataset(tmp_path / "pairs.parquet", split="nothing[:2]")


def test_a_data_set_saved_without_splits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without splits: leave out"):
        open_dataset(saved(tmp_path), split="train")


def test_configurations(tmp_path: Path) -> None:
    write_table(tmp_path / "en.csv", [{"url": "x", "caption": "a cat"}])
    write_table(tmp_path / "de.csv", [{"url": "x", "caption": "eine Katze"}])
    configs = "".join(f"- config_name: {n}\n  data_files: {n}.csv\n" for n in ("en", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(ValueError, match=r"(?s)Config name is missing.*en.*de"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"'fr' not found. Available.*en.*de"):
        open_dataset(tmp_path, config="fr")
    for name, text in (("en", "a cat"), ("de", "eine Katze")):
        assert open_dataset(tmp_path, config=name).dataset["caption"][:] == [text]


@pytest.mark.parametrize("kind", ["csv", "saved", "imagefolder"])
def test_what_a_local_data_set_has_not_is_not_ignored(kind: str, tmp_path: Path) -> None:
    source = KINDS[kind](tmp_path)
    with pytest.raises(ValueError, match="no revision: leave it out"):
        open_dataset(source, revision="main")
    if kind != "imagefolder":
        with pytest.raises(ValueError, match="no configuration: leave it out"):
            open_dataset(source, config="en")


# What cannot be opened


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("", FileNotFoundError, "no data set ''"),
        ("missing.csv", FileNotFoundError, "no file 'missing.csv'"),
        ("missing-*.tar", FileNotFoundError, r"no file 'missing-\*.tar'"),
        ("missing-{00..03}.tar", FileNotFoundError, "no file 'missing-00.tar'"),
        ("missing-{03..00}.tar", ValueError, "empty range"),
        ("./missing", FileNotFoundError, "give a Hub id, a folder, or files that end in .parquet"),
        ("/missing/folder", FileNotFoundError, "give a Hub id"),
        ("notes.txt", FileNotFoundError, "files that end in .parquet"),
        ("http://127.0.0.1:9/pairs.zip", FileNotFoundError, "files that end in"),
        ("empty", FileNotFoundError, "doesn't contain any data files"),
        ("documents", FileNotFoundError, "data files"),
        ("empty.csv", ValueError, "No columns to parse from file"),
        ("bad.parquet", ValueError, "bad.parquet cannot be read: .*[Pp]arquet"),
        ("bad.jsonl", ValueError, "JSON parse error"),
        ("bad.tar", ValueError, "bad.tar cannot be read: "),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_opened(
    source: str,
    error: type[Exception],
    message: str,
    streaming: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "documents").mkdir()
    for name in ("notes.txt", "bad.parquet", "bad.jsonl", "bad.tar", "documents/a.docx"):
        (tmp_path / name).write_text("{junk")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(error, match=message):
        read(open_dataset(source, streaming=streaming))


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_commit_of_data_in_the_cache_with_the_hub_out_of_reach(offline: str) -> None:
    code = "from hf_bayesvlm.sources import _commit\nprint(_commit('user/pairs', 'v1', None))\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": offline},
    )
    assert done.stdout == "v1\n", done.stderr[-2000:]


# Columns


def features(**columns: Any) -> Dataset:
    return Dataset.from_dict({name: [] for name in columns}, features=Features(columns))


TEXT = Value("string")


@pytest.mark.parametrize(
    ("columns", "given", "found"),
    [
        ({"image": ImageFeature(), "text": TEXT}, (None, None), ("image", "text")),
        ({"photo": ImageFeature(), "caption": TEXT}, (None, None), ("photo", "caption")),
        ({"jpg": ImageFeature(), "txt": TEXT, "json": TEXT}, (None, None), ("jpg", "txt")),
        ({"URL": TEXT, "TEXT": TEXT}, (None, None), ("URL", "TEXT")),
        ({"image": ImageFeature(), "mask": ImageFeature(), "text": TEXT}, (None, None), ("image", "text")),
        ({"image": ImageFeature(), "captions": List(TEXT)}, (None, None), ("image", "captions")),
        ({"image": ImageFeature(), "alt": TEXT}, (None, "alt"), ("image", "alt")),
        ({"img": TEXT, "text": TEXT}, ("img", None), ("img", "text")),
        ({"a": TEXT, "b": TEXT}, ("a", "b"), ("a", "b")),
        ({"path": TEXT, "url": TEXT}, (None, "path"), ("url", "path")),
        ({"text": ImageFeature(), "title": TEXT}, (None, None), ("text", "title")),
    ],
)  # fmt: skip
def test_columns_are_found_by_type_and_name(columns: Any, given: Any, found: Any) -> None:
    assert find_columns(features(**columns), *given) == found
    stream = IterableDataset.from_generator(lambda: iter([]), features=Features(columns))
    assert find_columns(stream, *given) == found


def test_columns_of_a_stream_without_features() -> None:
    stream = IterableDataset.from_generator(lambda: iter([{"image": 1, "caption": "a"}] * 3))
    assert find_columns(stream, None, None) == ("image", "caption")
    assert len(list(stream)) == 3


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": TEXT, "text": TEXT}, "holds the images.*has img, text: name it with --image-column"),
        ({"a": ImageFeature(), "b": ImageFeature(), "text": TEXT}, "--image-column"),
        ({"image": ImageFeature(), "alt": TEXT}, "holds the texts.* --text-column"),
        ({"image": ImageFeature()}, "holds the texts"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_told(columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_columns(features(**columns), None, None)

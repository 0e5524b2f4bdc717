"""Open image-text or labelled images from the Hub, folders and files, all through `datasets`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from datasets.inspect import SplitsNotFoundError

from .posterior_files import hub_id

_BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
}
# Names in use for columns without a type that says it: image files, addresses, captions.
_IMAGE_NAMES = (
    *("image", "jpg", "jpeg", "png", "webp", "image_path", "file_name", "filepath", "path"),
    *("image_url", "url"),
)
_TEXT_NAMES = (
    *("text", "caption", "captions", "txt", "sentence", "sentences", "sentences_raw", "raw"),
    *("title", "description", "prompt", "alt_text"),
)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class OpenedDataset:
    """A data set and where it comes from.

    Attributes:
        dataset: One split.
        name: Hub id, or name of the folder or file.
        revision: Commit on the Hub, where it could be found out.
        image_root: Folder that relative paths of images start from: that of a local table.
    """

    dataset: Dataset | IterableDataset
    name: str
    revision: str | None = None
    image_root: str | None = None


def open_dataset(
    source: str | os.PathLike[str],
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    token: str | bool | None = None,
) -> OpenedDataset:
    """Open a data set from anywhere.

    Args:
        source: A Hub id, a folder (images with `metadata.csv`, parquet, arrow or webdataset files, or what
            `save_to_disk` wrote), or a file, pattern or URL that ends in `.parquet`, `.arrow`, `.tar`, `.csv`,
            `.tsv`, `.json` or `.jsonl`.  `{000..127}` stands for a range of numbers.
        config: Configuration of a Hub data set.
        split: Split; by default `train`, or the only one.
        revision: Branch, tag or commit on the Hub.
        streaming: Read from front to back without downloading or converting first.
        token: Hub token.

    Returns:
        The data set, its name and where its images are.

    Raises:
        FileNotFoundError: If there is no such file, folder or data set.
        ValueError: For a split or configuration that does not exist, or a file of another kind.
    """
    text = os.fspath(source)
    folder = Path(text)
    is_folder = bool(text) and folder.is_dir()
    if is_folder or _suffix(text) in _BUILDERS:
        _refuse_hub_options(text, config if _is_saved(folder) or not is_folder else None, revision)
    if is_folder:
        if _is_saved(folder):
            return OpenedDataset(_from_disk(folder, split, streaming), folder.name)
        options: dict[str, Any] = {"path": str(folder.resolve())}
        name = folder.resolve().name
        root: str | None = text
    elif _suffix(text) in _BUILDERS:
        files = list(_expanded(text))
        options = {"path": _BUILDERS[_suffix(text)], "data_files": files}
        if _suffix(text) == ".tsv":
            options["sep"] = "\t"
        name, root = folder.name, None if "://" in text else str(folder.parent)
    elif hub_id(text) is not None and "://" not in text:
        options = {"path": text, "revision": revision, "token": token}
        name, root = text, None
    else:
        raise FileNotFoundError(_no_data_set(text))
    if config is not None:
        options["name"] = config
    try:
        chosen = _choose_split(options, split)
        dataset = datasets.load_dataset(**options, split=chosen, streaming=streaming)
    except (DatasetGenerationError, SplitsNotFoundError) as error:
        raise ValueError(f"{text} cannot be read: {_first_cause(error)}") from error
    commit = _commit(text, revision, token) if "revision" in options else None
    return OpenedDataset(dataset, name, commit, root)


def split_names(
    source: str | os.PathLike[str],
    *,
    config: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> list[str]:
    """The splits of a data set, without opening it.

    Args:
        source: As for `open_dataset`.
        config: Configuration of a Hub data set.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.

    Returns:
        Their names; none for files and for what was saved without splits.

    Raises:
        FileNotFoundError: If there is no such data set.
    """
    text = os.fspath(source)
    folder = Path(text)
    if text and folder.is_dir():
        if (folder / "dataset_dict.json").exists():
            return sorted(path.name for path in folder.iterdir() if path.is_dir())
        if _is_saved(folder):
            return []
        text = str(folder.resolve())
    elif _suffix(text) in _BUILDERS:
        return []
    elif hub_id(text) is None or "://" in text:
        raise FileNotFoundError(_no_data_set(text))
    names = datasets.get_dataset_split_names(
        text, config_name=config, revision=revision, token=token
    )
    return [str(name) for name in names]


def find_columns(
    dataset: Dataset | IterableDataset, image_column: str | None, text_column: str | None
) -> tuple[str, str]:
    """The columns of images and captions, found by type and name where they are not given.

    Args:
        dataset: The data set.
        image_column: If known.
        text_column: If known.

    Returns:
        Column of the images, column of the captions.

    Raises:
        ValueError: If one cannot be told.
    """
    if image_column is not None and text_column is not None:
        return image_column, text_column
    features = dataset.features or {}
    names = list(features) or list(next(iter(dataset), {}))
    typed = [name for name in names if isinstance(features.get(name), ImageFeature)]
    image_column = image_column or _pick(
        "image", typed, [name for name in names if name != text_column], _IMAGE_NAMES
    )
    text_column = text_column or _pick(
        "text", [], [name for name in names if name != image_column], _TEXT_NAMES
    )
    return image_column, text_column


def _pick(kind: str, typed: Sequence[str], names: Sequence[str], usual: Iterable[str]) -> str:
    if len(typed) == 1:
        return typed[0]
    by_lower = {name.lower(): name for name in (typed or names)}
    found = next((by_lower[name] for name in usual if name in by_lower), None)
    if found is None:
        raise ValueError(
            f"which column holds the {kind}s? The data set has {', '.join(names) or 'no columns'}: name it with "
            f"--{kind}-column ({kind}_column)"
        )
    return found


def _no_data_set(text: str) -> str:
    return f"no data set {text!r}: give a Hub id, a folder, or files that end in {', '.join(_BUILDERS)}"


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _refuse_hub_options(text: str, config: str | None, revision: str | None) -> None:
    """What would be ignored is an error."""
    given = [n for n, v in (("configuration", config), ("revision", revision)) if v is not None]
    if given:
        raise ValueError(f"{text} is not on the Hub and has no {given[0]}: leave it out")


def _first_cause(error: BaseException) -> str:
    """What a library's error is about, which says itself only that there was one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _from_disk(folder: Path, split: str | None, streaming: bool) -> Any:
    loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[_split_among(list(loaded), split)]
    elif split is not None and str(loaded.split) != split:
        raise ValueError(f"{folder} was saved as one data set without splits: leave out the split")
    return loaded.to_iterable_dataset() if streaming else loaded


def _choose_split(options: dict[str, Any], split: str | None) -> str:
    if split is not None and not split.isidentifier():
        # A slice such as train[:1000]; load_dataset checks it.
        return split
    options = dict(options)
    options["config_name"] = options.pop("name", None)
    names = [str(name) for name in datasets.get_dataset_split_names(**options)]
    return _split_among(names, split)


def _split_among(names: Sequence[str], split: str | None) -> str:
    if split is not None:
        if split not in names:
            raise ValueError(f"no split {split!r}; the data set has {', '.join(names)}")
        return split
    if len(names) == 1:
        return names[0]
    if "train" in names:
        return "train"
    raise ValueError(f"which split? The data set has {', '.join(names)}")


def _expanded(pattern: str) -> Iterator[str]:
    """A pattern with every `{000..127}` written out."""
    found = _RANGE.search(pattern)
    if found is None:
        # Path.glob takes no absolute patterns.
        if "://" not in pattern and not (Path(pattern).exists() or glob(pattern, recursive=True)):  # noqa: PTH207
            raise FileNotFoundError(f"no file {pattern!r}")
        yield pattern
        return
    first, last = found.groups()
    if int(first) > int(last):
        raise ValueError(f"{found.group()} in {pattern!r} is an empty range")
    for number in range(int(first), int(last) + 1):
        middle = str(number).zfill(len(first))
        yield from _expanded(pattern[: found.start()] + middle + pattern[found.end() :])


def _suffix(text: str) -> str:
    path = text.partition("?")[0] if "://" in text else text
    return Path(path).suffix.lower()


def _commit(name: str, revision: str | None, token: str | bool | None) -> str | None:
    """The commit that a data set on the Hub stands at; None where the Hub cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # Its bases are the error of whichever HTTP library there is, and OSError.
    unreachable: Any = (OfflineModeIsEnabled, *HfHubHTTPError.__bases__)
    try:
        return HfApi(token=token).dataset_info(name, revision=revision).sha
    except unreachable:
        return revision

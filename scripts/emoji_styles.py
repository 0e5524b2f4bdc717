"""What the emoji-styles scripts share: styles, label sets, prompts, slices and tasks.

Nothing here needs torch. `build_emoji_styles.py` writes the data set, `train_emoji_clip.py` trains
on it; an evaluation script builds its zero-shot tasks with :func:`zero_shot_tasks`, scores every
listed row against the listed prompts and compares the best one with the listed target.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

IMAGE_SIZE = 64
"""Side of the stored images in pixels."""

SPLITS: tuple[str, ...] = ("train", "validation", "test")

STOCK_TEMPLATE = "This is a photo of {}."
"""The prompt of `pipeline("zero-shot-image-classification")` when none is given."""

TEMPLATES: tuple[str, ...] = (
    "{}",
    STOCK_TEMPLATE,
    "a photo of a {}",
    "a picture of a {}.",
    "an emoji of {}",
    "an icon of a {}",
    "a drawing of {}",
    "a {} in a flat style",
    "clip art of {}",
    "this is {}",
)
"""Caption templates used in training; all of them are fit to be a prompt."""


@dataclass(frozen=True)
class StyleSource:
    """One drawing style, which is one Iconify JSON package.

    Attributes:
        style: Name of the style and of its package below `@iconify-json/`.
        version: Pinned package version.
        split: `train`, `validation` or `test`: what the style is used for.
        license: SPDX identifier of the drawings' licence.
        author: Who to credit.
        url: Home page of the drawings.
    """

    style: str
    version: str
    split: str
    license: str
    author: str
    url: str

    @property
    def package(self) -> str:
        """Name of the npm package."""
        return f"@iconify-json/{self.style}"


STYLES: dict[str, StyleSource] = {
    source.style: source
    for source in (
        StyleSource(
            "noto",
            "1.2.9",
            "train",
            "Apache-2.0",
            "Google Inc",
            "https://github.com/googlefonts/noto-emoji",
        ),
        StyleSource(
            "noto-v1",
            "1.2.5",
            "train",
            "Apache-2.0",
            "Google Inc",
            "https://github.com/googlefonts/noto-emoji",
        ),
        StyleSource(
            "twemoji",
            "1.2.5",
            "train",
            "CC-BY-4.0",
            "Twitter",
            "https://github.com/jdecked/twemoji",
        ),
        StyleSource(
            "emojione",
            "1.2.3",
            "train",
            "CC-BY-4.0",
            "Emoji One",
            "https://github.com/EmojiTwo/emojitwo",
        ),
        StyleSource(
            "fxemoji",
            "1.2.2",
            "train",
            "Apache-2.0",
            "Mozilla",
            "https://github.com/mozilla/fxemoji",
        ),
        StyleSource(
            "openmoji",
            "1.2.29",
            "validation",
            "CC-BY-SA-4.0",
            "OpenMoji",
            "https://github.com/hfg-gmuend/openmoji",
        ),
        StyleSource(
            "fluent-emoji-flat",
            "1.2.6",
            "test",
            "MIT",
            "Microsoft Corporation",
            "https://github.com/microsoft/fluentui-emoji",
        ),
        StyleSource(
            "fluent-emoji-high-contrast",
            "1.2.6",
            "test",
            "MIT",
            "Microsoft Corporation",
            "https://github.com/microsoft/fluentui-emoji",
        ),
    )
}
"""Every style of the data set, in the order of its rows. No other drawings are used."""

COARSE_LABELS: dict[str, tuple[str, ...]] = {
    "face": (
        "face-smiling",
        "face-affection",
        "face-tongue",
        "face-hand",
        "face-neutral-skeptical",
        "face-sleepy",
        "face-unwell",
        "face-hat",
        "face-glasses",
        "face-concerned",
        "face-negative",
    ),
    "hand": (
        "hand-fingers-open",
        "hand-fingers-partial",
        "hand-single-finger",
        "hand-fingers-closed",
        "hands",
        "hand-prop",
    ),
    "person": (
        "person",
        "person-gesture",
        "person-role",
        "person-fantasy",
        "person-activity",
        "person-sport",
        "person-resting",
        "family",
    ),
    "animal": (
        "animal-mammal",
        "animal-bird",
        "animal-amphibian",
        "animal-reptile",
        "animal-marine",
        "animal-bug",
    ),
    "plant": ("plant-flower", "plant-other"),
    "food": ("food-fruit", "food-vegetable", "food-prepared", "food-asian", "food-sweet"),
    "drink": ("drink",),
    "building": ("place-building", "place-religious"),
    "vehicle": ("transport-ground", "transport-water", "transport-air"),
    "weather": ("sky & weather",),
    "sport": ("sport",),
    "clothing": ("clothing",),
    "musical instrument": ("musical-instrument",),
    "tool": ("tool",),
    "electronic device": ("phone", "computer", "light & video"),
    "stationery": ("book-paper", "writing", "office", "mail"),
    "heart": ("heart",),
    "symbol": (
        "transport-sign",
        "warning",
        "arrow",
        "religion",
        "zodiac",
        "av-symbol",
        "gender",
        "math",
        "punctuation",
        "currency",
        "other-symbol",
        "alphanum",
        "geometric",
    ),
}
"""Everyday word -> the Unicode sub-groups it stands for; other sub-groups have no coarse label."""

_COARSE_OF_SUBGROUP = {
    subgroup: label for label, subgroups in COARSE_LABELS.items() for subgroup in subgroups
}


def coarse_label(subgroup: str) -> str | None:
    """Return the everyday word for a Unicode sub-group, or None where there is no fitting one."""
    return _COARSE_OF_SUBGROUP.get(subgroup)


def styles_of_split(split: str) -> tuple[str, ...]:
    """Return the names of the styles that are used for `split`."""
    return tuple(name for name, source in STYLES.items() if source.split == split)


def load_emoji_styles(path: str | Path) -> DatasetDict:
    """Load the data set from a local folder or a Hub repository.

    Args:
        path: Folder written by `build_emoji_styles.py`, or a Hub repository id.

    Returns:
        The splits `train`, `validation` and `test`.

    Raises:
        FileNotFoundError: If the folder holds no such data set.
    """
    from datasets import Dataset, DatasetDict, load_dataset

    folder = Path(path)
    if not folder.is_dir():
        if isinstance(path, str) and path.count("/") == 1 and not folder.is_absolute():
            return load_dataset(path)
        raise FileNotFoundError(f"No data set folder at {folder}. Run build_emoji_styles.py first.")
    files = {split: folder / "data" / f"{split}.parquet" for split in SPLITS}
    missing = [str(file) for file in files.values() if not file.exists()]
    if missing:
        raise FileNotFoundError(f"Not an emoji-styles folder, missing: {', '.join(missing)}")
    return DatasetDict({split: Dataset.from_parquet(str(file)) for split, file in files.items()})


def on_background(
    image: Image.Image, colour: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """Put a transparent image on a plain background.

    `image.convert("RGB")` drops the alpha channel instead, which leaves transparent pixels black
    and makes black drawings invisible, so the high-contrast style needs this.

    Args:
        image: RGBA image.
        colour: Red, green and blue, 0 to 255.

    Returns:
        RGB image of the same size.
    """
    rgba = image.convert("RGBA")
    canvas = Image.new("RGBA", rgba.size, (*colour, 255))
    return Image.alpha_composite(canvas, rgba).convert("RGB")


@dataclass(frozen=True)
class Slice:
    """Rows of one split that are evaluated together.

    Attributes:
        name: Such as `openmoji`, `openmoji/held-out` or `in-style`.
        split: The split that the rows come from.
        rows: Row numbers in that split.
        held_out: Whether the concepts were held out of training in every style.
    """

    name: str
    split: str
    rows: tuple[int, ...]
    held_out: bool


def evaluation_slices(dataset: Dataset, split: str) -> list[Slice]:
    """Cut `validation` or `test` by style, and by whether the concept was seen in training.

    Args:
        dataset: One split; only its columns `style` and `held_out_concept` are read.
        split: Name of that split.

    Returns:
        For each style unseen in training a slice of seen concepts (`<style>`) and one of held-out
        concepts (`<style>/held-out`); for `validation` also `in-style` (training styles, seen
        concepts, unseen drawings) and `in-style/held-out`.
    """
    train_styles = set(styles_of_split("train"))
    rows: dict[tuple[str, bool], list[int]] = {}
    for row, (style, held_out) in enumerate(
        zip(dataset["style"], dataset["held_out_concept"], strict=True)
    ):
        group = "in-style" if style in train_styles else style
        rows.setdefault((group, held_out), []).append(row)
    return [
        Slice(group + ("/held-out" if held_out else ""), split, tuple(indices), held_out)
        for (group, held_out), indices in sorted(rows.items())
    ]


@dataclass(frozen=True)
class ZeroShotTask:
    """A closed-set zero-shot classification task.

    Attributes:
        name: `full`, `names-105` or `coarse`. Tasks of the same name are parts of one task: pool
            their rows.
        labels: Candidate label texts, without a template.
        rows: Row numbers in the split.
        targets: For every row the index of its label in `labels`.
    """

    name: str
    labels: tuple[str, ...]
    rows: tuple[int, ...]
    targets: tuple[int, ...]


def concept_names(dataset: DatasetDict) -> dict[bool, list[str]]:
    """List the concept names of the data set.

    Returns:
        Sorted names of the held-out (`True`) and of the other (`False`) concepts.
    """
    names: dict[bool, set[str]] = {False: set(), True: set()}
    for split in dataset.values():
        for text, held_out in zip(split["text"], split["held_out_concept"], strict=True):
            names[held_out].add(text)
    return {held_out: sorted(texts) for held_out, texts in names.items()}


def _name_task(
    name: str, labels: Sequence[str], rows: Iterable[int], texts: Sequence[str]
) -> ZeroShotTask:
    index = {label: position for position, label in enumerate(labels)}
    kept = tuple(row for row in rows if texts[row] in index)
    return ZeroShotTask(name, tuple(labels), kept, tuple(index[texts[row]] for row in kept))


def _random_parts(names: Sequence[str], size: int, seed: int) -> Iterator[list[str]]:
    """Shuffle names and cut them into parts of about `size`, sizes differing by one at most."""
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    count = max(1, round(len(shuffled) / size))
    for part in range(count):
        yield sorted(shuffled[part::count])


def zero_shot_tasks(
    dataset: DatasetDict, piece: Slice, ways: int = 105, seed: int = 0
) -> list[ZeroShotTask]:
    """Build the zero-shot tasks of one slice.

    * `full`: every concept name of the same kind (seen, or held out) is a candidate.
    * `names-105`: the names are cut at random, with a fixed seed, into parts of about `ways`; each
      image is classified among the names of its own part. One task per part, so that every image
      counts and the figure does not hang on one lucky subset.
    * `coarse`: the words of `COARSE_LABELS`; images whose sub-group has none are left out.

    Args:
        dataset: The whole data set: the candidate names come from all of its splits.
        piece: From :func:`evaluation_slices`.
        ways: Size of a `names-105` part.
        seed: Fixes the parts.

    Returns:
        One `full`, several `names-105` and one `coarse` task.
    """
    split = dataset[piece.split]
    texts, subgroups = list(split["text"]), list(split["subgroup"])
    names = concept_names(dataset)[piece.held_out]
    tasks = [_name_task("full", names, piece.rows, texts)]
    for part in _random_parts(names, ways, seed):
        tasks.append(_name_task(f"names-{ways}", part, piece.rows, texts))
    words = [coarse_label(subgroup) or "" for subgroup in subgroups]
    tasks.append(_name_task("coarse", tuple(COARSE_LABELS), piece.rows, words))
    return tasks

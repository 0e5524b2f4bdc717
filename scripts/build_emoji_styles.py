"""Build the multi-style emoji image-text data set.

    python scripts/build_emoji_styles.py emoji-styles

Every drawing style is a domain, as in Office-Home: the model is trained on five styles and tested
on two others. See `model_cards/emoji-styles-data.md` for what is in it and under which licences.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoji_render import icon_svg, render
from emoji_samples import write_samples
from emoji_sources import (
    Concept,
    SourceError,
    fetch_packages,
    join_style,
    load_concepts,
    load_icon_sets,
)
from emoji_styles import SPLITS, STYLES, styles_of_split
from PIL import Image

if TYPE_CHECKING:
    from datasets import DatasetDict, Features

HELD_OUT_EVERY = 10
"""One concept in this many is held out of training in every style."""

HELD_OUT_PAIRS = 0.04
"""Share of the other (training style, concept) pairs that is kept for validation."""


def held_out_concepts(concepts: Iterable[Concept], seed: int) -> set[str]:
    """Choose the concepts that no training image shows, evenly over the sub-groups.

    Systematic sampling: the concepts are shuffled within their sub-group, the sub-groups are laid
    end to end, and every tenth concept is taken, so that small sub-groups get their share too.

    Returns:
        Slugs of the chosen concepts.
    """
    generator = random.Random(seed)
    by_subgroup: dict[str, list[str]] = defaultdict(list)
    for concept in concepts:
        by_subgroup[concept.subgroup].append(concept.concept)
    line: list[str] = []
    for subgroup in sorted(by_subgroup):
        members = sorted(by_subgroup[subgroup])
        generator.shuffle(members)
        line += members
    return set(line[generator.randrange(HELD_OUT_EVERY) :: HELD_OUT_EVERY])


def held_out_pairs(pairs: Iterable[tuple[str, str]], seed: int) -> set[tuple[str, str]]:
    """Choose drawings of training styles that are kept for validation.

    At most one per concept, and only of concepts that two or more training styles draw, so that
    each of their concepts is still trained on.

    Args:
        pairs: (style, concept) of training styles, without held-out concepts.
        seed: Fixes the choice.

    Returns:
        The chosen pairs.
    """
    styles_of: dict[str, list[str]] = defaultdict(list)
    for style, concept in sorted(pairs):
        styles_of[concept].append(style)
    total = sum(map(len, styles_of.values()))
    eligible = [concept for concept, styles in sorted(styles_of.items()) if len(styles) > 1]
    generator = random.Random(seed + 1)
    chosen = generator.sample(eligible, min(len(eligible), round(HELD_OUT_PAIRS * total)))
    return {(generator.choice(styles_of[concept]), concept) for concept in chosen}


def split_of(style: str, held_out: bool, pair_held_out: bool) -> str:
    """Return the split of one drawing."""
    split = STYLES[style].split
    return "validation" if split == "train" and (held_out or pair_held_out) else split


def collect_rows(packages: Path, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Render every drawing and sort it into its split.

    Args:
        packages: Folder with the pinned packages.
        seed: Fixes what is held out.

    Returns:
        Split -> rows with the columns of the data set.
    """
    concepts = load_concepts(packages)
    sets = load_icon_sets(packages)
    joined = {style: join_style(concepts, icons, chars) for style, (icons, chars) in sets.items()}
    held_out = held_out_concepts(concepts, seed)
    pairs = held_out_pairs(
        (
            (style, concept)
            for style in styles_of_split("train")
            for concept in joined[style]
            if concept not in held_out
        ),
        seed,
    )
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for style, names in joined.items():
        for concept in (c for c in concepts if c.concept in names):
            image = render(icon_svg(sets[style][0], names[concept.concept]))
            is_held_out = concept.concept in held_out
            split = split_of(style, is_held_out, (style, concept.concept) in pairs)
            rows[split].append(_row(concept, style, image, is_held_out))
    return rows


def _row(concept: Concept, style: str, image: Image.Image, held_out: bool) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return {
        "image": {"bytes": buffer.getvalue(), "path": f"{style}-{concept.concept}.png"},
        "text": concept.text,
        "keywords": list(concept.keywords),
        "concept": concept.concept,
        "category": concept.category,
        "subgroup": concept.subgroup,
        "style": style,
        "codepoint": concept.codepoint,
        "held_out_concept": held_out,
    }


def dataset_features() -> Features:
    """Return the column types of the data set."""
    from datasets import Features, Image, List, Value

    texts = ("text", "concept", "category", "subgroup", "style", "codepoint")
    columns = {name: Value("string") for name in texts}
    columns |= {"keywords": List(Value("string")), "held_out_concept": Value("bool")}
    return Features({"image": Image(), **columns})


def build_dataset(packages: Path, seed: int = 0) -> DatasetDict:
    """Build the data set in memory.

    Args:
        packages: Folder with the pinned packages.
        seed: Fixes what is held out.

    Returns:
        The splits `train`, `validation` and `test`.
    """
    from datasets import Dataset, DatasetDict

    rows = collect_rows(packages, seed)
    features = dataset_features()
    return DatasetDict(
        {split: Dataset.from_list(rows[split], features=features) for split in SPLITS}
    )


def write_dataset(dataset: DatasetDict, output: Path, seed: int) -> None:
    """Write one parquet file per split and a summary of the counts."""
    (output / "data").mkdir(parents=True, exist_ok=True)
    counts: dict[str, dict[str, int]] = {}
    for split, part in dataset.items():
        part.to_parquet(str(output / "data" / f"{split}.parquet"))
        styles = list(part["style"])
        counts[split] = {style: styles.count(style) for style in STYLES if style in styles}
    summary = {
        "seed": seed,
        "images": {split: part.num_rows for split, part in dataset.items()},
        "images_by_style": counts,
        "packages": {source.package: source.version for source in STYLES.values()},
    }
    (output / "build_summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Build the multi-style emoji data set.")
    parser.add_argument("output", type=Path, help="folder to write the data set to")
    parser.add_argument("--seed", type=int, default=0, help="fixes what is held out")
    parser.add_argument(
        "--packages-dir",
        type=Path,
        help="folder with the unpacked packages, such as node_modules (default: fetch with npm)",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=Path.home() / ".cache" / "emoji-styles",
        help="where fetched packages are kept (default: %(default)s)",
    )
    parser.add_argument("--samples", type=Path, help="also write the sample pictures here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Build and write the data set; return the exit code."""
    options = parse_arguments(arguments)
    try:
        packages = options.packages_dir or fetch_packages(options.cache_dir)
        dataset = build_dataset(packages, options.seed)
        write_dataset(dataset, options.output, options.seed)
        if options.samples is not None:
            write_samples(dataset, packages, options.samples)
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for split, part in dataset.items():
        print(f"{split}: {part.num_rows} images, {len(set(part['concept']))} concepts")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

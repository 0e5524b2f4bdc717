"""Measure how often the demo says "probably none of these" when it should, and when it should not.

    python scripts/measure_none_rule.py emoji-styles

For every image twelve random names, once with the right one among them and once without it.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from datasets import Dataset
from emoji_styles import load_emoji_styles

from hf_bayesvlm.demo_models import ModelStore
from hf_bayesvlm.demo_scoring import assess

LABELS = 12


def measure(dataset: Dataset, images: int, seed: int) -> dict[tuple[str, bool], float]:
    """Share of the images that are flagged.

    Args:
        dataset: With `image` and `text`.
        images: How many images are drawn from it.
        seed: Of images and labels.

    Returns:
        By variant, and by whether the right label was there.
    """
    store = ModelStore()
    loaded = store.load()
    variants = store.variants(loaded)
    names = sorted(set(dataset["text"]))
    generator = random.Random(seed)
    flagged = {(variant.name, there): 0 for variant in variants for there in (True, False)}
    rows = generator.sample(range(len(dataset)), images)
    for row in map(dataset.__getitem__, rows):
        for there in (True, False):
            labels = generator.sample([name for name in names if name != row["text"]], LABELS)
            if there:
                labels[0] = row["text"]
            image = row["image"].convert("RGB")
            for assessment in assess(loaded.pipe, variants, image, tuple(labels)):
                flagged[assessment.name, there] += assessment.verdict == "none"
    return {key: count / images for key, count in flagged.items()}


def main() -> None:
    """Print the shares of both splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder from build_emoji_styles.py")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    splits = load_emoji_styles(chosen.data)
    for split in ("validation", "test"):
        shares = measure(splits[split], chosen.images, chosen.seed)
        for (name, there), share in shares.items():
            print(f"{split}, {name}, right label {'there' if there else 'missing'}: {share:.3f}")


if __name__ == "__main__":
    main()

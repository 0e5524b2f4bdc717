"""What the package ships: a tiny Bayesian CLIP and a few sample images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_ASSETS = Path(__file__).resolve().parent / "assets"

EMBEDDED_MODEL: str = str(_ASSETS / "emoji-styles-clip")
"""Folder of the embedded bundle: a CLIP trained on emoji of five artists, with its posterior."""


@dataclass(frozen=True)
class SampleImage:
    """One of the sample images.

    Attributes:
        path: The PNG file.
        label: What it shows.
        style: The emoji set that it comes from; none of them was trained on.
        license: SPDX identifier of its licence.
        author: Who drew it.
    """

    path: str
    label: str
    style: str
    license: str
    author: str


def sample_images() -> list[SampleImage]:
    """The sample images, from styles that the embedded model was not trained on.

    Returns:
        The images in the order of `samples.json`.
    """
    folder = _ASSETS / "samples"
    rows = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    return [
        SampleImage(
            path=str(folder / row["file"]),
            label=row["label"],
            style=row["style"],
            license=row["license"],
            author=row["author"],
        )
        for row in rows
    ]

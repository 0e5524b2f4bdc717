"""Write the sample pictures that ship with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoji_render import icon_svg, render
from emoji_sources import join_style, load_concepts, load_icon_sets
from emoji_styles import STYLES, on_background

if TYPE_CHECKING:
    from datasets import DatasetDict

SAMPLES: tuple[tuple[str, str], ...] = (
    ("dog face", "fluent-emoji-flat"),
    ("pizza", "fluent-emoji-flat"),
    ("rocket", "fluent-emoji-flat"),
    ("automobile", "fluent-emoji-flat"),
    ("red apple", "fluent-emoji-flat"),
    ("soccer ball", "fluent-emoji-flat"),
    ("cat face", "fluent-emoji-high-contrast"),
    ("airplane", "fluent-emoji-high-contrast"),
    ("bicycle", "fluent-emoji-high-contrast"),
    ("house", "fluent-emoji-high-contrast"),
)
"""Sample pictures: well-known things, chosen before any model had seen them. With the default
seed, `pizza` is a concept that is held out of training."""

MIT_NOTICE = """MIT License

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


def write_samples(dataset: DatasetDict, packages: Path, folder: Path, size: int = 256) -> None:
    """Write the sample pictures on white, `samples.json` and `ATTRIBUTION.md`.

    Args:
        dataset: From :func:`build_dataset`; tells which concepts are held out.
        packages: Folder with the pinned packages.
        folder: Where to write.
        size: Side of the pictures in pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sets = load_icon_sets(packages)
    concepts = {concept.text: concept for concept in load_concepts(packages)}
    test = dataset["test"]
    held_out = dict(zip(test["text"], test["held_out_concept"], strict=True))
    entries = []
    for text, style in SAMPLES:
        icons, chars = sets[style]
        concept = concepts[text]
        icon = join_style([concept], icons, chars)[concept.concept]
        file = f"{concept.concept}-{style.removeprefix('fluent-emoji-')}.png"
        on_background(render(icon_svg(icons, icon), size)).save(folder / file, optimize=True)
        entries.append(_sample_entry(file, text, style, held_out[text]))
    (folder / "samples.json").write_text(json.dumps(entries, indent=2) + "\n", "utf-8")
    (folder / "ATTRIBUTION.md").write_text(_attribution(entries), "utf-8")


def _sample_entry(file: str, text: str, style: str, held_out: bool) -> dict[str, Any]:
    source = STYLES[style]
    return {
        "file": file,
        "label": text,
        "style": style,
        "license": source.license,
        "author": source.author,
        "url": source.url,
        "held_out_concept": held_out,
    }


def _attribution(entries: list[dict[str, Any]]) -> str:
    lines = [
        "# Sample pictures",
        "",
        "Fluent Emoji by Microsoft Corporation (https://github.com/microsoft/fluentui-emoji),",
        "MIT licence, from the Iconify packages `@iconify-json/fluent-emoji-flat` "
        f"{STYLES['fluent-emoji-flat'].version} and",
        "`@iconify-json/fluent-emoji-high-contrast` "
        f"{STYLES['fluent-emoji-high-contrast'].version}, drawn on white at 256 x 256 pixels.",
        "They are not in the training data of any model of this project.",
        "Made by `scripts/build_emoji_styles.py --samples`.",
        "",
        "| file | label | style | concept held out of training |",
        "|---|---|---|---|",
    ]
    for entry in entries:
        known = "yes" if entry["held_out_concept"] else "no"
        lines.append(f"| `{entry['file']}` | {entry['label']} | {entry['style']} | {known} |")
    return "\n".join([*lines, "", "## Licence", "", MIT_NOTICE])

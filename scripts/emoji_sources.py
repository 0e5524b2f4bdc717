"""Fetch the pinned npm packages and turn them into concepts and drawings.

A *concept* is one emoji of `emoji-datasource` that survives the exclusions below; a *drawing* is
the icon of one style that stands for it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoji_styles import STYLES

NAME_PACKAGES: dict[str, str] = {
    "emoji-datasource": "16.0.0",
    "unicode-emoji-json": "0.9.0",
    "emojilib": "4.0.3",
}
"""Where names, keywords and groups come from (all MIT)."""

EXCLUDED_SUBGROUPS = frozenset({"country-flag", "subdivision-flag", "keycap", "skin-tone"})
CLOCK_FACES = range(0x1F550, 0x1F568)
GENDER_SIGNS = frozenset({"2640", "2642"})
GENDERED_PEOPLE = frozenset({"1f468", "1f469"})
FACING_RIGHT = "27a1"
JOINER = "200d"


class SourceError(RuntimeError):
    """A package cannot be fetched or does not look as expected."""


@dataclass(frozen=True)
class Concept:
    """One emoji.

    Attributes:
        codepoint: Lower-case hexadecimal code points joined by `-`, without variation selectors.
        text: CLDR short name, such as `dog face`.
        concept: `text` as a slug, such as `dog-face`.
        keywords: Synonyms and related words.
        short_names: Names used by chat programs, such as `dog`.
        datasource_name: Older Unicode name, such as `DOG FACE`.
        category: Unicode group.
        subgroup: Unicode sub-group.
    """

    codepoint: str
    text: str
    concept: str
    keywords: tuple[str, ...]
    short_names: tuple[str, ...]
    datasource_name: str
    category: str
    subgroup: str


def slugify(name: str) -> str:
    """Return `name` in lower-case ASCII with `-` between words (Iconify's naming)."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub("[^a-z0-9]+", "-", ascii_name.lower().replace("'", "")).strip("-")


def plain_text(name: str) -> str:
    """Replace typographic quotes and accents, so that names can be typed on any keyboard."""
    name = name.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()


def normal_codepoint(codepoint: str) -> str:
    """Return a code point sequence in lower case and without variation selector 16."""
    return "-".join(part for part in codepoint.lower().split("-") if part != "fe0f")


def fetch_packages(cache: Path) -> Path:
    """Fetch every pinned package that `cache` lacks with `npm pack` and unpack its JSON files.

    Args:
        cache: Folder to fill. Packages end up in `<cache>/<name>@<version>/`.

    Returns:
        `cache`.

    Raises:
        SourceError: If npm is missing or fails.
    """
    wanted = {source.package: source.version for source in STYLES.values()} | NAME_PACKAGES
    cache.mkdir(parents=True, exist_ok=True)
    for name, version in wanted.items():
        folder = cache / f"{name}@{version}"
        if not folder.exists():
            unpack_json(npm_pack(name, version, cache), folder)
    return cache


def npm_pack(name: str, version: str, folder: Path) -> Path:
    """Download one package archive with npm and return its path."""
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError("npm was not found. Install Node.js, or pass --packages-dir.")
    command = [npm, "pack", f"{name}@{version}", "--json", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SourceError(f"npm pack {name}@{version} failed:\n{done.stderr.strip()}")
    archive = name.removeprefix("@").replace("/", "-") + f"-{version}.tgz"
    return folder / archive


def unpack_json(archive: Path, folder: Path) -> None:
    """Unpack only the JSON files and licences: one of the packages holds 60 MB of pictures."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = Path(*Path(member.name).parts[1:])
            if not member.isfile() or ".." in inside.parts:
                continue
            if inside.suffix != ".json" and not inside.name.startswith("LICENSE"):
                continue
            content = tar.extractfile(member)
            if content is not None:
                target = partial / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
    partial.rename(folder)
    archive.unlink()


def package_folder(packages: Path, name: str, version: str) -> Path:
    """Find one package below a cache or an already unpacked `node_modules` folder.

    Raises:
        SourceError: If it is missing or of another version than the pinned one.
    """
    for folder in (packages / f"{name}@{version}", packages / name):
        manifest = folder / "package.json"
        if manifest.exists():
            found = json.loads(manifest.read_text("utf-8"))["version"]
            if found != version:
                raise SourceError(f"{folder} holds {name} {found}, but {version} is pinned.")
            return folder
    raise SourceError(f"{name}@{version} is not in {packages}.")


def read_package_json(packages: Path, name: str, version: str, file: str) -> Any:
    """Read one JSON file of a package."""
    path = package_folder(packages, name, version) / file
    if not path.exists():
        raise SourceError(f"{name}@{version} has no {file}.")
    return json.loads(path.read_text("utf-8"))


def load_icon_sets(packages: Path) -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """Read `icons.json` and `chars.json` (empty when there is none) of every style."""
    sets = {}
    for style, source in STYLES.items():
        icons = read_package_json(packages, source.package, source.version, "icons.json")
        try:
            chars = read_package_json(packages, source.package, source.version, "chars.json")
        except SourceError:
            chars = {}
        sets[style] = (icons, chars)
    return sets


def is_excluded(codepoint: str, subgroup: str) -> bool:
    """Tell whether an emoji is a skin tone, a gendered or mirrored variant, a flag or the like."""
    parts = codepoint.split("-")
    if subgroup in EXCLUDED_SUBGROUPS:
        return True
    if len(parts) == 1 and int(parts[0], 16) in CLOCK_FACES:
        return True
    if JOINER not in parts:
        return False
    return bool(GENDER_SIGNS & set(parts)) or parts[0] in GENDERED_PEOPLE or FACING_RIGHT in parts


def load_concepts(packages: Path) -> list[Concept]:
    """Read the emoji that the data set is about.

    Args:
        packages: From :func:`fetch_packages`, or a `node_modules` folder.

    Returns:
        Concepts in Unicode order, with unique `concept` slugs.
    """
    read = {name: (packages, name, version) for name, version in NAME_PACKAGES.items()}
    rows = read_package_json(*read["emoji-datasource"], "emoji.json")
    names = _by_codepoint(read_package_json(*read["unicode-emoji-json"], "data-by-emoji.json"))
    keywords = _by_codepoint(read_package_json(*read["emojilib"], "dist/emoji-en-US.json"))
    concepts: dict[str, Concept] = {}
    for row in sorted(rows, key=lambda row: row["sort_order"]):
        codepoint = normal_codepoint(row["unified"])
        if not is_excluded(codepoint, row["subcategory"]):
            concept = _concept(row, codepoint, names, keywords)
            concepts.setdefault(concept.concept, concept)
    return list(concepts.values())


def _by_codepoint(table: dict[str, Any]) -> dict[str, Any]:
    """Key a table of emoji characters by normal code points."""
    return {
        normal_codepoint("-".join(f"{ord(char):04x}" for char in emoji)): value
        for emoji, value in table.items()
    }


def _concept(row: dict[str, Any], codepoint: str, names: dict, keywords: dict) -> Concept:
    known = names.get(codepoint)
    text = plain_text(known["name"] if known else row["name"].lower())
    words = [word.replace("_", " ") for word in keywords.get(codepoint, [])]
    words += [name.replace("_", " ").replace("-", " ") for name in row["short_names"]]
    plain = (plain_text(word).strip().lower() for word in words)
    unique = dict.fromkeys(word for word in plain if word and word != text.lower())
    return Concept(
        codepoint=codepoint,
        text=text,
        concept=slugify(text),
        keywords=tuple(unique),
        short_names=tuple(row["short_names"]),
        datasource_name=row["name"],
        category=row["category"],
        subgroup=row["subcategory"],
    )


def join_style(concepts: list[Concept], icon_set: dict, chars: dict[str, str]) -> dict[str, str]:
    """Find the icon of every concept in one icon set.

    By code point where the package has a table of them. Else by name: the CLDR name first, then
    the older Unicode name, then the short names, each over all concepts before the next, so that
    an exact name always wins and no icon is used twice. Sets whose names have no separators
    (`alarmclock`) are joined on short names first, because there `dog` is the dog's face.

    Args:
        concepts: From :func:`load_concepts`.
        icon_set: Content of `icons.json`.
        chars: Content of `chars.json`; empty for packages without one.

    Returns:
        Concept slug -> icon (or alias) name.
    """
    icons = set(icon_set["icons"]) | set(icon_set.get("aliases", {}))
    if chars:
        table = {normal_codepoint(codepoint): name for codepoint, name in chars.items()}
        found = {c.concept: table[c.codepoint] for c in concepts if c.codepoint in table}
        return {concept: name for concept, name in found.items() if name in icons}
    rules: list[Callable[[Concept], Iterable[str]]] = [
        lambda concept: (concept.text,),
        lambda concept: (concept.datasource_name,),
        lambda concept: concept.short_names,
    ]
    squashed = _has_squashed_names(icons)
    return _join_by_name(concepts, icons, rules[::-1] if squashed else rules, squashed)


def _has_squashed_names(icons: set[str]) -> bool:
    return sum("-" in icon for icon in icons) < 0.1 * len(icons)


def _join_by_name(
    concepts: list[Concept],
    icons: set[str],
    rules: list[Callable[[Concept], Iterable[str]]],
    squashed: bool,
) -> dict[str, str]:
    joined: dict[str, str] = {}
    free = set(icons)
    for rule in rules:
        for concept in concepts:
            if concept.concept in joined:
                continue
            names = (slugify(name) for name in rule(concept))
            keys = (name.replace("-", "") if squashed else name for name in names)
            match = next((key for key in keys if key in free), None)
            if match is not None:
                joined[concept.concept] = match
                free.discard(match)
    return joined

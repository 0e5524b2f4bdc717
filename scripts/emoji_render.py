"""Draw Iconify icons with resvg."""

from __future__ import annotations

import io
from typing import Any

from emoji_sources import SourceError
from emoji_styles import IMAGE_SIZE
from PIL import Image


def icon_svg(icon_set: dict[str, Any], name: str) -> str:
    """Return the SVG document of one icon, following aliases.

    Args:
        icon_set: Content of `icons.json`.
        name: Icon or alias name.

    Returns:
        SVG whose view box is the icon's own, so that it scales to any size.
    """
    icon, flips, turns = _resolve(icon_set, name)
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icon_set.get("width", 16))
    height = icon.get("height", icon_set.get("height", 16))
    body = icon["body"]
    middle_x, middle_y = left + width / 2, top + height / 2
    if flips != (1, 1) or turns:
        body = (
            f'<g transform="translate({middle_x} {middle_y}) rotate({90 * turns}) '
            f'scale({flips[0]} {flips[1]}) translate({-middle_x} {-middle_y})">{body}</g>'
        )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}" '
        f'color="#000">{body}</svg>'
    )


def _resolve(icon_set: dict[str, Any], name: str) -> tuple[dict[str, Any], tuple[int, int], int]:
    """Follow aliases to an icon and add up their flips and quarter turns."""
    flip_x, flip_y, turns = 1, 1, 0
    overrides: dict[str, Any] = {}
    aliases = icon_set.get("aliases", {})
    while name not in icon_set["icons"]:
        alias = aliases[name]
        flip_x *= -1 if alias.get("hFlip") else 1
        flip_y *= -1 if alias.get("vFlip") else 1
        turns += alias.get("rotate", 0)
        overrides = {key: alias[key] for key in ("width", "height") if key in alias} | overrides
        name = alias["parent"]
    return icon_set["icons"][name] | overrides, (flip_x, flip_y), turns % 4


def render(svg: str, size: int = IMAGE_SIZE) -> Image.Image:
    """Draw an SVG into a transparent square, keeping its proportions.

    Args:
        svg: From :func:`icon_svg`.
        size: Side in pixels.

    Returns:
        RGBA image of `size` x `size`.

    Raises:
        SourceError: If resvg-py is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise SourceError("resvg-py is missing. Install it: pip install resvg_py") from error
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size == (size, size):
        return image
    square = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square

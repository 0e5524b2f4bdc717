"""Load images from anything, as RGB, with errors that say what is wrong."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import os
import struct
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ._version import __version__

MAX_ASPECT_RATIO = 200
MAX_DOWNLOAD_BYTES = 64 * 2**20
DEFAULT_TIMEOUT = 60.0
_BACKGROUND = (255, 255, 255)


class ImageInputError(ValueError):
    """An image cannot be used."""


def load_rgb_image(source: Any, *, timeout: float | None = None) -> Image.Image:
    """Load one image.

    The first frame of an animation is taken, EXIF rotation is applied, transparency is put on white, and
    16-bit grey values are scaled to 8 bits.

    Args:
        source: A PIL image, a path, an http(s) URL, a base64 string (with or without `data:` prefix),
            the encoded bytes, an `[height, width(, channels)]` uint8 array, or a dictionary (a row of a data
            set) with one of these as `"image"`, or with `"bytes"` and `"path"`.
        timeout: Seconds to wait for a URL, a minute by default.

    Returns:
        The image in RGB.

    Raises:
        ImageInputError: If it is not an image, is empty, truncated, or too large to be decoded safely.
        FileNotFoundError: If the path does not exist.
    """
    if isinstance(source, dict):
        if source.keys() == {"bytes", "path"}:
            # An undecoded image of the datasets library.
            value = source["path"] if source["bytes"] is None else source["bytes"]
            return load_rgb_image(value, timeout=timeout)
        if "image" not in source:
            raise ImageInputError(f"a row needs an 'image'; it has {', '.join(map(str, source))}")
        return load_rgb_image(source["image"], timeout=timeout)
    if isinstance(source, np.ndarray):
        return to_rgb(_from_array(source))
    if isinstance(source, Image.Image):
        return to_rgb(source, name="the image")
    if isinstance(source, (bytes, bytearray)):
        return _decode(io.BytesIO(source), "the image bytes")
    if isinstance(source, os.PathLike):
        return _open_file(Path(source))
    if isinstance(source, str):
        return _from_string(source, timeout)
    raise ImageInputError(
        f"cannot load an image from {type(source).__name__}: give a path, URL, base64 string, bytes, "
        "uint8 array or PIL image"
    )


def to_rgb(image: Image.Image, *, name: str = "the image") -> Image.Image:
    """Convert any PIL image to RGB: first frame, upright, transparency on white, 16 bit to 8.

    Args:
        image: The image; it is not changed.
        name: How to call it in errors.

    Returns:
        An RGB image.

    Raises:
        ImageInputError: If it has no pixels or its data are damaged.
    """
    if image.width == 0 or image.height == 0:
        raise ImageInputError(f"{name} has no pixels ({image.width} x {image.height})")
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        # Scaled to the model's height such a strip would take gigabytes.
        raise ImageInputError(
            f"{name} is a strip of {image.width} x {image.height} pixels: crop it, the sides may differ by "
            f"a factor of {MAX_ASPECT_RATIO} at most"
        )
    try:
        image = _first_frame(image)
        image.load()
        image = _upright(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_8_bit(image, name)
        if image.mode == "La":
            image = image.convert("LA")
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            canvas = Image.new("RGBA", rgba.size, (*_BACKGROUND, 255))
            image = Image.alpha_composite(canvas, rgba)
        rgb = image.convert("RGB")
        # The rotation has been applied; whoever loads the result must not apply it again.
        rgb.info.pop("exif", None)
        return rgb
    except ImageInputError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageInputError(f"{name} is damaged or truncated: {error}") from error


def _first_frame(image: Image.Image) -> Image.Image:
    position = image.tell()
    if position == 0:
        return image
    image.seek(0)
    try:
        return image.copy()
    finally:
        image.seek(position)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF rotation; metadata that cannot be read say nothing about it."""
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return image


def _from_string(source: str, timeout: float | None) -> Image.Image:
    if source.startswith(("http://", "https://")):
        return _decode(io.BytesIO(_download(source, timeout)), source)
    if source.startswith("data:"):
        return _from_base64(source.partition(",")[2])
    try:
        exists = bool(source) and Path(source).exists()
    except (OSError, ValueError):
        exists = False  # too long for a path: base64
    if exists:
        return _open_file(Path(source))
    if may_be_base64(source):
        return _from_base64(source)
    raise FileNotFoundError(f"no image file {source!r}")


def may_be_base64(source: str) -> bool:
    """Whether a string that is no existing path can be base64; anything shorter is a mistyped path."""
    return len(source) > 64 and "." not in source


def _open_file(path: Path) -> Image.Image:
    if path.is_dir():
        raise ImageInputError(f"{path} is a folder, not an image")
    if not path.exists():
        raise FileNotFoundError(f"no image file {str(path)!r}")
    if path.stat().st_size == 0:
        raise ImageInputError(f"{path} is empty (0 bytes)")
    with path.open("rb") as stream:
        return _decode(stream, str(path))


def _decode(stream: Any, name: str) -> Image.Image:
    try:
        with Image.open(stream) as image:
            # Pillow only warns up to twice its limit; nothing is decoded before this.
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            return to_rgb(image, name=name)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageInputError(
            f"{name} is too large to be decoded safely ({error}): scale it down first"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageInputError(f"{name} is not an image that Pillow can read") from error
    except ImageInputError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageInputError(f"{name} is damaged or truncated: {error}") from error


def _download(url: str, timeout: float | None) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": f"hf_bayesvlm/{__version__}"})
        with urllib.request.urlopen(request, timeout=timeout or DEFAULT_TIMEOUT) as response:
            data: bytes = response.read(MAX_DOWNLOAD_BYTES + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ImageInputError(f"{url} cannot be downloaded: {error}") from error
    if len(data) > MAX_DOWNLOAD_BYTES:
        raise ImageInputError(f"{url} is larger than {MAX_DOWNLOAD_BYTES >> 20} MiB")
    return data


def _from_base64(text: str) -> Image.Image:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageInputError("the string is neither a path, a URL nor base64") from error
    return _decode(io.BytesIO(data), "the base64 image")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageInputError(
            f"an image array must be uint8 (0 to 255), not {array.dtype}: scale and cast it first"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ImageInputError(
            f"an image array must be [height, width] or [height, width, 1, 3 or 4], not {array.shape}"
        )
    if array.size == 0:
        raise ImageInputError(f"the image has no pixels {array.shape}")
    return Image.fromarray(array)


def _to_8_bit(image: Image.Image, name: str) -> Image.Image:
    """Scale integer or float grey values to 8 bits, where `convert` would clip them."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageInputError(f"{name} contains NaN or infinite pixels")
    if values.min() < 0:
        raise ImageInputError(f"{name} has negative grey values: scale them to 0..255")
    if image.mode.startswith("I;16") or values.max() > 255:
        # 16-bit values use the whole range, however dark the image; wider ones are scaled by their maximum.
        values = values * (255.0 / max(values.max(), 65535.0))
    elif image.mode == "F" and values.max() <= 1.0:
        values = values * 255.0
    return Image.fromarray(np.round(values).astype(np.uint8))

"""Images of the demo's visitors: read under limits, degraded on purpose, shown small."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, UnidentifiedImageError

from .images import ImageInputError, load_rgb_image

MAX_FILE_BYTES = 10 * 2**20
"""Largest upload."""

MAX_PIXELS = 25_000_000
"""Largest image; it is refused by its header, before anything is decoded."""

WORK_SIDE = 768
"""Longer side, in pixels, that larger images are scaled to before they are degraded and classified."""

MAX_BLUR, MAX_NOISE, MAX_ROTATION = 10.0, 100.0, 180.0

# What cameras, phones and browsers make.  Pillow knows more, some of which run other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF")
_NOISE_SEED = 0
_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Degradation:
    """How an image is made worse.

    Attributes:
        blur: Standard deviation of a Gaussian blur, in per cent of the shorter side, 0 to 10.
        noise: Standard deviation of Gaussian pixel noise, in per cent of the range of values, 0 to 100.
        rotation: Degrees counter-clockwise, -180 to 180; the corners become white.

    Raises:
        ValueError: For a value out of its range.
    """

    blur: float = 0.0
    noise: float = 0.0
    rotation: float = 0.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("blur", 0.0, MAX_BLUR),
            ("noise", 0.0, MAX_NOISE),
            ("rotation", -MAX_ROTATION, MAX_ROTATION),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # NaN is in no range.
            if not number or not low <= value <= high:
                raise ValueError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")


def read_visitor_image(source: str | Path | bytes) -> Image.Image:
    """Read an uploaded image under the demo's limits.

    Args:
        source: A file that the server itself has stored, or the encoded bytes.  Never a URL.

    Returns:
        The image in RGB, its longer side at most `WORK_SIDE` pixels.

    Raises:
        ImageInputError: If it is too large, of a format that is not accepted, or no image; the message
            names no path of the server.
    """
    data = source if isinstance(source, bytes) else _read_bytes(Path(source))
    if len(data) > MAX_FILE_BYTES:
        raise ImageInputError(f"The file is larger than {MAX_FILE_BYTES >> 20} MB: scale it down.")
    if not data:
        raise ImageInputError("The file is empty.")
    # Pillow knows by name only the formats whose plugins it has loaded.
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageInputError(
                    f"The image has {image.width} x {image.height} pixels; at most "
                    f"{MAX_PIXELS // 10**6} million are accepted. Scale it down."
                )
            rgb = load_rgb_image(image)
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ImageInputError(
            "This is not an image that can be read. Use PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF."
        ) from error
    except ImageInputError as error:
        text = str(error)
        raise ImageInputError(text[:1].upper() + text[1:]) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageInputError("The image is damaged or truncated.") from error
    rgb.thumbnail((WORK_SIDE, WORK_SIDE), Image.Resampling.LANCZOS)
    return rgb


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ImageInputError("The file is not there any more: upload it again.") from error


def degrade(image: Image.Image, degradation: Degradation) -> Image.Image:
    """Rotate, blur and add noise, in this order.

    The noise is drawn from a fixed seed: the same settings give the same image.

    Args:
        image: In RGB.
        degradation: How much of each.

    Returns:
        A new image; the image itself if nothing is to be done.
    """
    if degradation.rotation:
        image = image.rotate(
            degradation.rotation, Image.Resampling.BICUBIC, expand=True, fillcolor=_WHITE
        )
    if degradation.blur:
        radius = degradation.blur / 100.0 * min(image.size)
        image = image.filter(ImageFilter.GaussianBlur(radius))
    if degradation.noise:
        generator = np.random.default_rng(_NOISE_SEED)
        noise = generator.standard_normal((image.height, image.width, 3), dtype=np.float32)
        pixels = np.asarray(image, dtype=np.float32) + noise * (255.0 * degradation.noise / 100.0)
        image = Image.fromarray(np.round(pixels.clip(0.0, 255.0)).astype(np.uint8))
    return image


def as_data_url(image: Image.Image, side: int = 224) -> str:
    """A small copy as a `data:` URL, for the page.

    Args:
        image: In RGB.
        side: Longer side in pixels at most.

    Returns:
        A WebP image in base64.
    """
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")

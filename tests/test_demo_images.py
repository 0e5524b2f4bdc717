"""Images of visitors: limits, degradation, previews."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_bayesvlm import ImageInputError, sample_images
from hf_bayesvlm.demo_images import (
    MAX_FILE_BYTES,
    WORK_SIDE,
    Degradation,
    as_data_url,
    degrade,
    read_visitor_image,
)
from hf_bayesvlm.images import load_rgb_image


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def photo(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_reads_what_cameras_and_browsers_make(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "no-ending"
    path.write_bytes(encoded(photo(), kind))
    image = read_visitor_image(path)
    assert (image.mode, image.size) == ("RGB", (60, 40))


def test_a_small_image_is_read_as_the_pipeline_reads_it() -> None:
    path = sample_images()[0].path
    assert read_visitor_image(path).tobytes() == load_rgb_image(path).tobytes()


def test_a_large_image_is_scaled_down() -> None:
    image = read_visitor_image(encoded(photo(2000, 1000)))
    assert image.size == (WORK_SIDE, WORK_SIDE // 2)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"%PDF-1.4 not an image", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        # Pillow would start Ghostscript for it.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (encoded(photo())[:-3000], "damaged"),
        (bytes(MAX_FILE_BYTES + 1), "larger than 10 MB"),
        (encoded(Image.new("1", (6000, 6000)), "PNG"), "pixels"),
        (encoded(Image.new("RGB", (600, 2))), "strip"),
    ],
)
def test_refuses_the_rest_with_a_sentence(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "secret-folder.png"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(ImageInputError, match=words) as caught:
            read_visitor_image(source)
        assert "secret-folder" not in str(caught.value)


@pytest.mark.parametrize("source", ["http://127.0.0.1:9/a.png", "data:image/png;base64,AAAA"])
def test_never_fetches(source: str) -> None:
    with pytest.raises(ImageInputError, match="not there"):
        read_visitor_image(source)


def test_no_degradation_changes_nothing() -> None:
    image = photo()
    assert degrade(image, Degradation()) is image


def test_each_degradation_does_what_it_says() -> None:
    image = Image.new("RGB", (200, 100), (128, 128, 128))
    noisy = np.asarray(degrade(image, Degradation(noise=5)), dtype=float)
    assert noisy.std() == pytest.approx(255 * 0.05, rel=0.05)
    rotated = degrade(image, Degradation(rotation=90))
    assert rotated.size == (100, 200)
    assert degrade(image, Degradation(rotation=45)).getpixel((0, 0)) == (255, 255, 255)
    edge = Image.new("RGB", (200, 200))
    edge.paste((255, 255, 255), (100, 0, 200, 200))
    profile = np.asarray(degrade(edge, Degradation(blur=5)), dtype=float)[100, :, 0]
    # The derivative of a blurred edge is the Gaussian: standard deviation 5 % of 200 pixels.
    weights = np.diff(profile)
    centre = np.average(np.arange(199), weights=weights)
    spread = np.sqrt(np.average((np.arange(199) - centre) ** 2, weights=weights))
    assert spread == pytest.approx(10, rel=0.1)


@settings(max_examples=20, deadline=None)
@given(blur=st.floats(0, 10), noise=st.floats(0, 100), rotation=st.floats(-180, 180))
def test_the_same_sliders_give_the_same_image(blur: float, noise: float, rotation: float) -> None:
    image, wanted = photo(), Degradation(blur, noise, rotation)
    first, second = degrade(image, wanted), degrade(image.copy(), wanted)
    assert first.mode == "RGB"
    assert first.tobytes() == second.tobytes()
    assert image.tobytes() == photo().tobytes()


@pytest.mark.parametrize(
    "values",
    [{"blur": -1}, {"blur": 11}, {"noise": 101}, {"rotation": 181}, {"blur": float("nan")},
     {"noise": "5"}, {"rotation": None}, {"blur": True}],
)  # fmt: skip
def test_impossible_degradations_are_refused(values: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Degradation(**values)


def test_a_preview_is_a_small_image() -> None:
    url = as_data_url(photo(400, 200), side=100)
    head, _, body = url.partition(",")
    assert head == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(body))) as image:
        assert image.size == (100, 50)

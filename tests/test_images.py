"""Images from anywhere, in any form, to RGB; what cannot be used is refused with a reason."""

from __future__ import annotations

import base64
import io
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_bayesvlm import ImageInputError, images
from hf_bayesvlm.images import load_rgb_image, to_rgb

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)


def picture(size: tuple[int, int] = (6, 4)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    picture().save(path)
    return path


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.server.files.get(self.path)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/picture.png")
            self.end_headers()
            return
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.files = {
        "/picture.png": encoded(picture()),
        "/page.html": b"<html></html>",
        "/large": b"x" * 3000,
    }
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


# ---------------------------------------------------------------------------- sources


def test_every_source_gives_the_same_pixels(file, server):
    data = file.read_bytes()
    text = base64.b64encode(data).decode()
    lines = "\n".join(text[i : i + 40] for i in range(0, len(text), 40))
    sources = [
        picture(),
        Image.open(file),
        file,
        str(file),
        data,
        bytearray(data),
        text,
        lines,
        f"data:image/png;base64,{text}",
        np.asarray(picture()),
        {"image": str(file), "label": 3},
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(file)},
        f"{server}/picture.png",
        f"{server}/moved",
    ]
    for source in sources:
        assert np.array_equal(pixels(load_rgb_image(source)), np.asarray(picture())), source


def test_relative_path(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert load_rgb_image("picture.png").size == (6, 4)


def test_the_callers_image_is_not_changed():
    image = picture().convert("RGBA")
    image.info["note"] = 1
    before = image.tobytes()
    to_rgb(image)
    assert image.mode == "RGBA"
    assert image.tobytes() == before


@pytest.mark.parametrize("source", [None, 3, 1.5, [1], object(), {"label": 1}, {}])
def test_not_an_image(source):
    with pytest.raises(ImageInputError):
        load_rgb_image(source)


@pytest.mark.parametrize("name", ["missing.png", "missing", "a/b/c.jpg", "a b", ""])
def test_missing_file(name):
    with pytest.raises(FileNotFoundError, match="no image file"):
        load_rgb_image(name)
    with pytest.raises(FileNotFoundError, match="no image file"):
        load_rgb_image(Path("/nowhere") / name / "x")


def test_folder(tmp_path):
    with pytest.raises(ImageInputError, match="is a folder"):
        load_rgb_image(tmp_path)
    with pytest.raises(ImageInputError, match="is a folder"):
        load_rgb_image(str(tmp_path))


@pytest.mark.parametrize("text", ["A" * 100, "!" * 100, "data:image/png;base64,AAAA", "data:,"])
def test_strings_that_are_not_base64_images(text):
    with pytest.raises(ImageInputError):
        load_rgb_image(text)


@pytest.mark.parametrize(
    ("path", "message"), [("/nothing", "404"), ("/page.html", "not an image that Pillow")]
)
def test_bad_urls(server, path, message):
    with pytest.raises(ImageInputError, match=message):
        load_rgb_image(server + path)


def test_unreachable_url():
    with pytest.raises(ImageInputError, match="cannot be downloaded"):
        load_rgb_image("http://127.0.0.1:1/x.png", timeout=2.0)
    with pytest.raises(ImageInputError, match="cannot be downloaded"):
        load_rgb_image("http://")


def test_large_download_is_stopped(server, monkeypatch):
    monkeypatch.setattr(images, "MAX_DOWNLOAD_BYTES", 1000)
    with pytest.raises(ImageInputError, match="is larger than"):
        load_rgb_image(f"{server}/large")


# ---------------------------------------------------------------------------- damaged


def test_empty_file(tmp_path):
    (tmp_path / "x.png").touch()
    with pytest.raises(ImageInputError, match=r"is empty \(0 bytes\)"):
        load_rgb_image(tmp_path / "x.png")
    with pytest.raises(ImageInputError, match="not an image"):
        load_rgb_image(b"")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated(form, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), form)
    path = tmp_path / "x"
    for part in (8, len(data) // 2):
        path.write_bytes(data[:part])
        for source in (path, data[:part]):
            with pytest.raises(ImageInputError):
                load_rgb_image(source)


def test_truncated_but_opened_by_the_caller():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "PNG")
    with pytest.raises(ImageInputError, match="damaged or truncated"):
        load_rgb_image(Image.open(io.BytesIO(data[: len(data) // 2])))


def test_text_file(tmp_path):
    (tmp_path / "x.png").write_text("not a picture")
    with pytest.raises(ImageInputError, match="not an image that Pillow can read"):
        load_rgb_image(tmp_path / "x.png")


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_no_pixels(size):
    with pytest.raises(ImageInputError, match="no pixels"):
        load_rgb_image(Image.new("RGB", size))
    with pytest.raises(ImageInputError, match="no pixels"):
        load_rgb_image(np.zeros((*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_decompression_bomb(factor, monkeypatch):
    # Pillow warns at the limit and refuses at twice the limit.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    side = int((1000 * factor) ** 0.5) + 1
    data = encoded(Image.new("RGB", (side, side)))
    with pytest.raises(ImageInputError, match="too large to be decoded safely"):
        load_rgb_image(data)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((4, 4, 3), dtype=np.uint16),
        np.zeros((3, 4, 5), dtype=np.uint8),
        np.zeros((2, 4, 4, 3), dtype=np.uint8),
        np.zeros(4, dtype=np.uint8),
        np.full((4, 4, 3), np.nan),
    ],
)
def test_arrays_that_are_not_images(array):
    with pytest.raises(ImageInputError, match="an image array must be"):
        load_rgb_image(array)


# ---------------------------------------------------------------------------- modes


@pytest.mark.parametrize(
    "mode",
    [
        "1",
        "L",
        "P",
        "RGB",
        "RGBA",
        "LA",
        "PA",
        "CMYK",
        "YCbCr",
        "HSV",
        "I",
        "F",
        "I;16",
        "La",
        "RGBa",
        "RGBX",
    ],
)
def test_every_mode_of_white_is_white(mode):
    if mode in ("I;16",):
        image = Image.fromarray(np.full((4, 6), 65535, dtype=np.uint16))
    elif mode == "F":
        image = Image.fromarray(np.ones((4, 6), dtype=np.float32))
    elif mode == "I":
        image = Image.new("I", (6, 4), 65535)
    elif mode == "La":
        image = Image.new("LA", (6, 4), (255, 255)).convert("La")
    elif mode == "PA":
        image = Image.new("RGBA", (6, 4), (*WHITE, 255)).convert("P").convert("PA")
    else:
        image = Image.new("RGB", (6, 4), WHITE)
        image = (image.convert("RGBA") if mode == "RGBa" else image).convert(mode)
    assert image.mode == mode
    assert pixels(to_rgb(image)).min() >= 254


def test_animated_gif_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (6, 4), color) for color in (RED, BLUE, WHITE)]
    path = tmp_path / "x.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(load_rgb_image(path)).astype(int) - RED).max() < 8
    with Image.open(path) as image:
        image.seek(2)
        assert np.abs(pixels(load_rgb_image(image)).astype(int) - RED).max() < 8
        assert image.tell() == 2


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)
    path = tmp_path / "x.png"
    Image.fromarray(values).save(path)
    expected = np.round(values / 257.0).astype(int)
    assert np.abs(pixels(load_rgb_image(path))[:, :, 0].astype(int) - expected).max() <= 1


def test_dark_16_bit_image_stays_dark():
    image = Image.fromarray(np.full((4, 6), 200, dtype=np.uint16))
    assert image.mode == "I;16"
    assert pixels(load_rgb_image(image)).max() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_float_image_that_is_not_finite(value):
    values = np.ones((4, 6), dtype=np.float32)
    values[1, 1] = value
    with pytest.raises(ImageInputError, match="NaN or infinite pixels"):
        load_rgb_image(Image.fromarray(values))


def test_float_image_of_negative_values():
    with pytest.raises(ImageInputError, match="negative grey values"):
        load_rgb_image(Image.fromarray(np.full((4, 6), -1.0, dtype=np.float32)))


def test_alpha_is_put_on_white(tmp_path):
    image = picture().convert("RGBA")
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    image.save(tmp_path / "x.png")
    result = load_rgb_image(tmp_path / "x.png")
    assert result.getpixel((0, 0)) == WHITE
    assert result.getpixel((1, 0)) == (127, 127, 127)
    assert result.getpixel((5, 3)) == BLUE


def test_transparent_palette_is_put_on_white(tmp_path):
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, *RED, *BLUE])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "x.png", transparency=0)
    result = load_rgb_image(tmp_path / "x.png")
    assert result.getpixel((0, 0)) == WHITE
    assert result.getpixel((3, 3)) == RED


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_transparent_colour_is_put_on_white(mode, tmp_path):
    image = Image.new(mode, (6, 4), 0)
    image.putpixel((0, 0), (10, 20, 30) if mode == "RGB" else 10)
    image.save(tmp_path / "x.png", transparency=(10, 20, 30) if mode == "RGB" else 10)
    result = load_rgb_image(tmp_path / "x.png")
    assert result.getpixel((0, 0)) == WHITE
    assert result.getpixel((3, 3)) == (0, 0, 0)


def test_cmyk_jpeg(tmp_path):
    picture((64, 64)).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    result = load_rgb_image(tmp_path / "x.jpg")
    assert result.getpixel((5, 5))[0] > 200
    assert result.getpixel((60, 5))[2] > 200


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    picture((64, 32)).save(tmp_path / "x.jpg", exif=exif, quality=95)
    result = load_rgb_image(tmp_path / "x.jpg")
    assert result.size == (32, 64)
    assert result.getpixel((16, 5))[0] > 200
    assert result.getpixel((16, 60))[2] > 200


def test_unreadable_metadata_are_no_reason_to_refuse(tmp_path):
    path = tmp_path / "garbage-exif.jpg"
    Image.new("RGB", (30, 20), (200, 0, 0)).save(path, exif=b"Exif\x00\x00garbage")
    once = load_rgb_image(path)
    assert once.size == (30, 20)
    assert load_rgb_image(once).size == (30, 20)


def test_strips_that_would_take_gigabytes_are_refused():
    with pytest.raises(ImageInputError, match="strip"):
        load_rgb_image(Image.new("RGB", (1, 20_000)))
    assert load_rgb_image(Image.new("RGB", (10, 1_000))).size == (10, 1_000)

"""The demo over HTTP: the endpoint `classify`, many visitors at once, and what is refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from hf_bayesvlm import sample_images
from hf_bayesvlm.demo import DEFAULT_LABELS, build_app
from hf_bayesvlm.demo_images import Degradation
from hf_bayesvlm.demo_models import Hyperparameters, ModelStore
from hf_bayesvlm.demo_service import DemoService, Request, describe

FILE = {"_type": "gradio.FileData"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = build_app()
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield url.rstrip("/")
    app.close()


@pytest.fixture(scope="module")
def client(url: str) -> Client:
    return Client(url, verbose=False, analytics_enabled=False)


@pytest.fixture(scope="module")
def service() -> DemoService:
    return DemoService(ModelStore())


def post(url: str, values: list[Any]) -> str:
    """Call the endpoint with raw values; returns the stream of events."""
    body = json.dumps({"data": values}).encode()
    request = urllib.request.Request(
        f"{url}/gradio_api/call/classify", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        event = json.load(response)["event_id"]
    address = f"{url}/gradio_api/call/classify/{event}"
    with urllib.request.urlopen(address, timeout=60) as response:
        return str(response.read().decode())


def values(image: Any, labels: Any = "a, b", **changes: Any) -> list[Any]:
    """All values of the endpoint in order."""
    fields = {
        "templates": "",
        "blur": 0,
        "noise": 0,
        "rotation": 0,
        "sure": 0.5,
        "none": 0.5,
        "model": "embedded emoji model",
        "posterior": "the model's own",
        "compare": False,
        "second": "as it is",
        **{f"choice {i}": "as it is" for i in range(5)},
    }
    return [image, labels, *(fields | changes).values()]


def test_classify_gives_what_the_service_gives(client: Client, service: DemoService) -> None:
    path = sample_images()[3].path
    result = client.predict(
        image=handle_file(path), labels="automobile\nbicycle, rocket", blur=2, api_name="/classify"
    )
    request = Request(path, "automobile, bicycle, rocket", degradation=Degradation(blur=2))
    expected = service.answer(request).result
    assert result["bayesian"]["predictions"][0]["label"] == "automobile"
    assert result == json.loads(json.dumps(expected | {"thresholds": result["thresholds"]}))


def test_classify_with_a_second_posterior(client: Client, service: DemoService) -> None:
    path = sample_images()[7].path
    result = client.predict(
        image=handle_file(path),
        labels=DEFAULT_LABELS,
        templates="a {}\na drawing of {}",
        compare=True,
        pseudo_data_count="3",
        covariance="full",
        objective="evidence",
        api_name="/classify",
    )
    changes = Hyperparameters(pseudo_data_count=3.0, covariance="full", objective="evidence")
    request = Request(
        path,
        DEFAULT_LABELS,
        "a {}\na drawing of {}",
        compare=True,
        second_hyperparameters=changes,
    )
    assert result["second"] == json.loads(json.dumps(service.answer(request).result["second"]))
    assert result["second"]["epistemic"] != result["bayesian"]["epistemic"]


def test_only_classify_is_public(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)
    assert isinstance(endpoints, dict)
    assert list(endpoints["named_endpoints"]) == ["/classify"]
    assert endpoints["unnamed_endpoints"] == {}


def test_twenty_visitors_at_once_get_their_own_answers(
    url: str, service: DemoService, tmp_path: Path
) -> None:
    names = [label.strip() for label in DEFAULT_LABELS.split(",")]
    jobs: list[tuple[str, str, float]] = []
    for i in range(20):
        path = tmp_path / f"{i}.png"
        with Image.open(sample_images()[i % 10].path) as image:
            canvas = Image.new("RGB", (256, 256), (255, 255 - 5 * i, 255))
            canvas.paste(image.convert("RGB").resize((150 + 4 * i, 150 + 4 * i)), (0, 0))
            canvas.save(path)
        chosen = [names[(i + j) % len(names)] for j in range(3 + i % 5)]
        jobs.append((str(path), ", ".join(chosen), float(i % 4)))

    def serial(job: tuple[str, str, float]) -> dict[str, Any]:
        return service.answer(Request(job[0], job[1], degradation=Degradation(blur=job[2]))).result

    expected = [serial(job) for job in jobs]

    def visit(job: tuple[str, str, float]) -> dict[str, Any]:
        visitor = Client(url, verbose=False, analytics_enabled=False)
        image = handle_file(job[0])
        return dict(visitor.predict(image=image, labels=job[1], blur=job[2], api_name="/classify"))

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(visit, jobs))
    assert len({json.dumps(answer) for answer in expected}) == 20
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer["labels"] == list(wanted["labels"])
        for variant in ("plain", "bayesian"):
            scores = {row["label"]: row["score"] for row in answer[variant]["predictions"]}
            right = {row["label"]: row["score"] for row in wanted[variant]["predictions"]}
            assert scores == pytest.approx(right, abs=1e-5)
            assert answer[variant]["epistemic"] == pytest.approx(
                wanted[variant]["epistemic"], abs=1e-4
            )


def test_errors_are_sentences(client: Client, tmp_path: Path) -> None:
    good = handle_file(sample_images()[0].path)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image": good, "labels": " , "}, "no labels"),
        ({"image": good, "labels": ",".join(map(str, range(201)))}, "at most 200"),
        ({"image": handle_file(str(bad)), "labels": "a, b"}, "not an image"),
        ({"image": good, "labels": "a, b", "templates": "no place"}, "template"),
        ({"image": good, "labels": "a, b", "model": "/etc/passwd"}, "not a Hub id"),
        ({"image": good, "labels": "a, b", "posterior": "http://x.org/p"}, "not a Hub id"),
        ({"image": good, "labels": "a, b", "blur": 99}, "blur must be"),
        ({"image": None, "labels": "a, b"}, "no image"),
    ]
    for arguments, words in cases:
        with pytest.raises(AppError, match=words) as caught:
            client.predict(**arguments, api_name="/classify")
        assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    "image",
    [
        {"path": "/etc/hostname", "meta": FILE},
        {"path": "/etc/hostname"},
        {"path": str(Path(__file__)), "meta": FILE},
        {"path": "http://127.0.0.1:9/a.png", "meta": FILE},
        {"path": "http://127.0.0.1:9/a.png"},
        {"path": "https://example.org/a.png", "url": "https://example.org/a.png", "meta": FILE},
        {"path": None, "url": "https://example.org/a.png", "meta": FILE},
        {"path": None, "url": "data:image/png;base64,AAAA", "meta": FILE},
        "/etc/hostname",
        ["/etc/hostname"],
        7,
    ],
)
def test_an_image_is_an_upload_and_nothing_else(url: str, image: Any) -> None:
    events = post(url, values(image))
    assert "event: error" in events
    assert "bayesian" not in events
    assert "Traceback" not in events


def test_urls_are_refused_in_every_value_before_anything_is_fetched(url: str) -> None:
    probe = {"path": "https://example.org/a.png", "meta": FILE}
    for position in range(17):
        sent = values(None)
        sent[position] = probe
        assert "by URL are not fetched" in post(url, sent)


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": {"a": 1}},
        {"blur": "x"},
        {"sure": None},
        {"model": ["x"]},
        {"choice 0": {}, "compare": True},
        {"choice 1": "round", "compare": True},
        {"templates": 5},
    ],
)
def test_values_of_the_wrong_kind_are_refused(
    url: str, client: Client, changes: dict[str, Any], tmp_path: Path
) -> None:
    uploaded = upload(url, sample_images()[0].path)
    labels = changes.pop("labels", "a, b")
    events = post(url, values(uploaded, labels, **changes))
    assert "event: error" in events
    assert "went wrong" not in events
    assert "Traceback" not in events


def upload(url: str, path: str) -> dict[str, Any]:
    boundary = "boundary"
    head = (
        f"--{boundary}\r\n"
        'Content-Disposition: form-data; name="files"; filename="a.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    )
    body = head.encode() + Path(path).read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{url}/gradio_api/upload", body, kind)
    with urllib.request.urlopen(request, timeout=60) as response:
        return {"path": json.load(response)[0], "meta": FILE}


def test_uploads_are_limited(url: str, tmp_path: Path) -> None:
    assert "event: complete" in post(url, values(upload(url, sample_images()[0].path)))
    large = tmp_path / "large.png"
    noise = np.random.default_rng(0).integers(0, 256, 11 * 2**20, dtype=np.uint8)
    large.write_bytes(noise.tobytes())
    with pytest.raises(urllib.error.HTTPError) as caught:
        upload(url, str(large))
    assert caught.value.code == 413


@pytest.mark.parametrize("path", ["/etc/hostname", "pyproject.toml", str(Path(__file__))])
def test_files_of_the_server_are_not_served(url: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{url}/gradio_api/file={path}", timeout=60)
    assert caught.value.code in (403, 404)


def test_the_page_says_what_was_done() -> None:
    assert describe(Degradation()) == "the image as it is"
    words = describe(Degradation(blur=1.5, noise=3, rotation=-20))
    assert words == "the image rotated by -20°, with blur 1.5 %, with noise 3 %"


def test_a_wrong_model_shows_when_the_app_is_built(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        build_app(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="labels"):
        build_app(labels=" ")


def test_the_command_serves_the_page_and_fails_with_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "hf_bayesvlm.cli", "demo", "--no-browser", "--port", str(port)]
    wrong = subprocess.run(
        [*command, "--model", str(tmp_path / "no")],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert wrong.returncode == 2
    assert "error:" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment | {"PYTHONUNBUFFERED": "1"}
    )
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http" in line)
        assert f":{port}" in line
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60) as response:
            assert b"How sure is CLIP?" in response.read()
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_without_gradio_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['gradio'] = None\n"
        "from hf_bayesvlm.demo import build_app\n"
        "try: build_app()\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.stdout.strip() == "the demo needs Gradio: pip install 'hf_bayesvlm[demo]'"

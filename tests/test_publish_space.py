"""The Space: a folder that runs as it is, pushed in one commit."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from gradio_client import Client, handle_file
from stub_hub import running_hub

import hf_bayesvlm

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "publish_space.py"
sys.path.insert(0, str(SCRIPT.parent))

import publish_space  # noqa: E402


def publish(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space") / "new"
    done = publish("me/demo", "--dry-run", str(folder), "--only-these")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # A copy: running leaves compiled files behind.
    running = tmp_path_factory.mktemp("running") / "space"
    shutil.copytree(folder, running)
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=running,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        next(line for line in process.stdout if "http" in line)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)
        process.stdout.close()


def test_the_folder_runs_as_it_is(folder: Path, server: str) -> None:
    client = Client(server, verbose=False, analytics_enabled=False)
    sample = folder / "hf_bayesvlm" / "assets" / "samples" / "rocket-flat.png"
    result = client.predict(
        image=handle_file(str(sample)), labels="rocket, house", api_name="/classify"
    )
    assert result["bayesian"]["predictions"][0]["label"] == "rocket"
    where = subprocess.run(
        [sys.executable, "-c", "import hf_bayesvlm; print(hf_bayesvlm.__file__)"],
        cwd=folder, capture_output=True, text=True, check=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(folder)


def test_the_head_of_the_readme_is_a_spaces(folder: Path) -> None:
    _, head, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    data = yaml.safe_load(head)
    assert data["sdk"] == "gradio"
    assert data["sdk_version"] == metadata.version("gradio")
    assert data["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (folder / data["app_file"]).is_file()
    assert "apache-2.0" in data["license"]
    # The Hub's limit.
    assert len(data["short_description"]) <= 60
    assert "models" not in data
    assert 'Client("me/demo")' in body


def test_requirements_are_pinned_and_enough(folder: Path) -> None:
    lines = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines)
    assert {"torch", "transformers", "gradio", "pillow", "numpy"} <= pins.keys()
    assert "hf_bayesvlm" not in pins
    assert not {"pytest", "ruff", "matplotlib"} & pins.keys()
    for name, version in pins.items():
        assert re.fullmatch(r"\d[\w.]*", version), version
        assert metadata.version(name).startswith(version)


def test_nothing_of_this_machine_goes_along(tmp_path: Path) -> None:
    # A folder of its own: other tests run the shared one, which leaves compiled files behind.
    folder = tmp_path / "new"
    done = publish("me/demo", "--dry-run", str(folder), "--only-these")
    assert done.returncode == 0, done.stderr
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not any(path.suffix in (".pyc", ".pyi", ".pt", ".bin", ".pkl") for path in files)
    for path in files:
        if path.suffix in (".py", ".md", ".txt", ".json"):
            assert str(ROOT) not in path.read_text(encoding="utf-8")
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "app.py", "requirements.txt", "hf_bayesvlm",
    }  # fmt: skip


def test_a_model_of_the_hub_is_named(tmp_path: Path) -> None:
    done = publish(
        "me/demo", "--dry-run", str(tmp_path), "--model", "me/bundle", "--posterior", "me/p"
    )
    assert done.returncode == 0, done.stderr
    head = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert yaml.safe_load(head)["models"] == ["me/bundle", "me/p"]
    app = (tmp_path / "app.py").read_text(encoding="utf-8")
    assert "model='me/bundle', posterior='me/p', allow_hub=True" in app


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["../x", "--dry-run", "DIR"], "repo"), (["me/demo", "--dry-run", "DIR", "--model", "/models/mine"], "Hub id"),
     (["me/demo", "--dry-run", str(ROOT / "tests")], "not empty")],
)  # fmt: skip
def test_mistakes_get_a_sentence(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "new")
    assert publish_space.main([folder if a == "DIR" else a for a in arguments]) == 2
    assert words.lower() in capsys.readouterr().err.lower()


def test_it_is_pushed_in_one_commit(tmp_path: Path) -> None:
    with running_hub(tmp_path / "hub") as hub:
        done = publish(
            "me/demo",
            "--private",
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path / "home"),
            HF_TOKEN="hf_secret",
            HF_HUB_DISABLE_XET="1",
            HF_HUB_OFFLINE="0",
        )
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    assert len(hub.commits) == 1
    [created] = hub.created
    assert (created["type"], created["sdk"]) == ("space", "gradio")
    # Which of the two is sent depends on the version of huggingface_hub.
    assert created.get("visibility") == "private" or created.get("private") is True
    rows = [json.loads(line) for line in hub.commits[0].splitlines()]
    files = {row["value"]["path"]: row["value"] for row in rows if row["key"] == "file"}
    assert hf_bayesvlm.__version__ in rows[0]["value"]["summary"]
    package = Path(hf_bayesvlm.__file__).parent
    for path in ("demo.py", "assets/emoji-styles-clip/model.safetensors"):
        sent = base64.b64decode(files[f"hf_bayesvlm/{path}"]["content"])
        assert sent == (package / path).read_bytes()
    assert {"app.py", "README.md", "requirements.txt"} <= files.keys()

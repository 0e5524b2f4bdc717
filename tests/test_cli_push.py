"""`bayesvlm push`, as a process against a Hub."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hub_server import HubDouble, Outcome
from hub_store import READ_TOKEN, WRITE_TOKEN
from tiny import fitted, save_bundle, tiny_vlm
from typer.testing import CliRunner

from hf_bayesvlm.cli import app


def push(hub: HubDouble, *arguments: str, token: str | None = WRITE_TOKEN) -> Outcome:
    command = [sys.executable, "-m", "hf_bayesvlm.cli", "push", *arguments]
    return hub.call(command, env=hub.environment(token=token), check=False)


@pytest.fixture
def posterior(tmp_path: Path) -> Path:
    saved = fitted("clip").posterior
    assert saved is not None
    saved.save_pretrained(tmp_path / "posterior")
    return tmp_path / "posterior"


def test_a_posterior(hub: HubDouble, posterior: Path) -> None:
    (posterior / "README.md").write_text("---\ntags: [mine]\n---\n# Mine")
    (posterior / "training_args.bin").write_bytes(b"a pickle")
    done = push(hub, str(posterior), "alice/posterior", "--private", "--message", "Share it")
    assert done.returncode == 0, done.stderr
    commit = hub.log("alice/posterior")[0]
    assert done.stdout.strip() == f"{hub.endpoint}/alice/posterior/commit/{commit.sha}"
    assert commit.title == "Share it"
    assert hub.store.repos["model", "alice/posterior"].private
    files = hub.files("alice/posterior")
    assert files.keys() == {"posterior.safetensors", "posterior_config.json", "README.md"}
    assert files["README.md"].endswith(b"# Mine")


def test_a_bundle_as_a_pull_request(hub: HubDouble, tmp_path: Path) -> None:
    folder = save_bundle(fitted("clip"), tmp_path / "bundle")
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    (folder / "notes.json").write_text("{}")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "model.safetensors").write_bytes(b"old")
    hub.put("alice/bundle", {"README.md": "# Theirs"})
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    done = push(hub, str(folder), "alice/bundle", "--create-pr")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.endpoint}/alice/bundle/discussions/1"
    files = hub.files("alice/bundle", "refs/pr/1")
    assert {"model.safetensors", "config.json", "tokenizer.json", "remote_code.py"} <= files.keys()
    assert not {"optimizer.pt", "notes.json", "checkpoint-10/model.safetensors"} & files.keys()
    assert files["README.md"] == b"# Theirs"
    assert {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()} == before


def test_anything_else_is_refused(posterior: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    tiny_vlm("clip").save_pretrained(tmp_path / "plain")
    save_bundle(fitted("clip"), tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    factors = posterior / "posterior.safetensors"
    factors.write_bytes(factors.read_bytes()[:-100])
    for name, words in (
        ("missing", "there is no folder"),
        ("empty", "neither a posterior nor a bundle"),
        ("plain", "not a bundle"),
        ("cut", "truncated or damaged"),
        ("posterior", "truncated or not a safetensors file"),
    ):
        done = CliRunner().invoke(app, ["push", str(tmp_path / name), "alice/new"])
        assert done.exit_code == 2, name
        assert words in done.output, name


def test_what_the_hub_refuses_is_an_error_in_words(hub: HubDouble, posterior: Path) -> None:
    hub.put("alice/open", {"a.txt": "a"})
    before = hub.state()
    for token, words in ((None, "hf auth login"), (READ_TOKEN, "may not write")):
        done = push(hub, str(posterior), "alice/open", token=token)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert READ_TOKEN not in done.stderr
        assert not done.stdout
    done = push(hub, str(posterior), "alice/open", "--revision", "dev", "--create-pr")
    assert done.returncode == 2
    assert "leave revision out" in done.stderr
    assert hub.state() == before

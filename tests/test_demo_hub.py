"""What visitors may name: public Hub ids under limits, in a fresh process against a local Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_hub import StubHub, running_hub
from tiny import fitted, save_bundle, tiny_vlm

from hf_bayesvlm.demo_hub import DemoError, check_metadata, check_repo_id

PROBE = """
import json, sys
from hf_bayesvlm.demo_hub import DemoError
from hf_bayesvlm.demo_models import ModelStore

results = []
for model, posterior in json.loads(sys.argv[1]):
    store = ModelStore()
    try:
        loaded = store.load(model)
        variants = store.variants(loaded, posterior)
        results.append([variant.model.is_fitted for variant in variants])
    except DemoError as error:
        results.append(str(error))
print(json.dumps(results))
"""


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StubHub]:
    root = tmp_path_factory.mktemp("hub")
    model = fitted()
    assert model.posterior is not None
    save_bundle(model, root / "me" / "bundle")
    save_bundle(tiny_vlm(), root / "me" / "plain")
    save_bundle(tiny_vlm("siglip"), root / "me" / "siglip", "siglip")
    model.posterior.save_pretrained(root / "me" / "posterior")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(root / "me" / "plain", root / "me" / name))

    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    edit_json(copy("bert") / "config.json", model_type="bert")
    coded = copy("coded")
    edit_json(coded / "config.json", model_type="mine", auto_map={"AutoModel": "evil.Model"})
    (coded / "evil.py").write_text("raise SystemExit('remote code ran')")
    deep = json.loads((copy("deep") / "config.json").read_text())["vision_config"]
    edit_json(root / "me/deep/config.json", vision_config=deep | {"num_hidden_layers": 10**7})
    wide = copy("wide") / "config.json"
    edit_json(wide, vision_config=deep | {"hidden_size": 40_000, "intermediate_size": 40_000})
    edit_json(copy("reading") / "tokenizer_config.json", vocab_file="/etc/passwd")
    edit_json(copy("pixels") / "preprocessor_config.json", size={"shortest_edge": 100_000})
    truncated = copy("truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:2000])
    copy("huge")
    with running_hub(root) as hub:
        hub.sizes["me/huge/model.safetensors"] = 10**12
        yield hub


def ask(hub: StubHub, tmp_path: Path, *cases: tuple[str, str | None]) -> list[Any]:
    # A folder of the server that is called like a Hub id.
    (tmp_path / "me").mkdir(exist_ok=True)
    shutil.copytree(hub.root / "me" / "bundle", tmp_path / "me" / "local", dirs_exist_ok=True)
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_the_operators_secret",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(cases)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_public_models_and_posteriors_load_without_the_operators_token(
    hub: StubHub, tmp_path: Path
) -> None:
    results = ask(
        hub,
        tmp_path,
        ("me/bundle", None),
        ("me/plain", None),
        ("me/plain", "me/posterior"),
        ("me/siglip", None),
    )
    assert results == [[False, True], [False, False], [False, True], [False, False]]
    assert hub.tokens == []


def test_the_rest_is_refused_with_a_sentence(hub: StubHub, tmp_path: Path) -> None:
    cases: dict[tuple[str, str | None], str] = {
        ("me/missing", None): "no public model",
        ("me/local", None): "no public model",
        ("me/pickled", None): "no safetensors",
        ("me/bert", None): "of type 'bert'",
        ("me/coded", None): "of type 'mine'",
        ("me/deep", None): "more than 128 layers",
        ("me/wide", None): "billion parameters",
        ("me/huge", None): "larger than 4 GB",
        ("me/reading", None): "outside of the repository",
        ("me/pixels", None): "image size",
        ("me/truncated", None): "cannot be loaded",
        ("me/posterior", None): "no config.json",
        ("me/plain", "me/bundle"): "no posterior_config.json",
        ("me/siglip", "me/posterior"): "image.A|softmax|shape|features|weights",
    }
    results = ask(hub, tmp_path, *cases)
    for (case, words), result in zip(cases.items(), results, strict=True):
        assert isinstance(result, str), case
        assert any(word in result for word in words.split("|")), (case, result)
        # Nothing about the server.
        assert str(tmp_path) not in result
        assert "snapshots" not in result
    fetched = [request for request in hub.requests if "/resolve/" in request]
    assert not any(request.endswith((".bin", ".py")) for request in fetched)
    for name in ("huge", "wide", "deep"):
        assert not any(f"me/{name}/" in r and r.endswith(".safetensors") for r in fetched)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../..", "./me", "me/..", "../etc", "a/b/c", "https://x.org/a", "C:\\x", "", "one", "~/x",
     "file:a/b", "a/" + "b" * 200, "a b/c", "a/b\n"],
)  # fmt: skip
def test_only_hub_ids_are_names(name: str) -> None:
    with pytest.raises(DemoError, match="not a Hub id"):
        check_repo_id(name)
    assert check_repo_id("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"


def test_shards_outside_of_the_repository_are_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    check_metadata("me/x", tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../../other/model.safetensors"}}))
    with pytest.raises(DemoError, match="no weights"):
        check_metadata("me/x", tmp_path)

"""Bundles on a Hub: pushed whole, loaded with and without the package, in fresh processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubDouble
from hub_store import WRITE_TOKEN
from tiny import fitted, tiny_image_processor, tiny_tokenizer
from transformers import CLIPProcessor, SiglipProcessor

LABELS = ["cat", "dog", "a car"]
PUSH = """
import json
from transformers import AutoProcessor
from hf_bayesvlm import BayesVLMForZeroShot, HubError

def attempt(*args, **kwargs):
    try:
        info = model.push_to_hub(*args, **kwargs)
    except HubError as error:
        return f"HubError: {error}"
    return {"url": str(info), "oid": info.oid, "pr": info.pr_url}

model = BayesVLMForZeroShot.from_pretrained(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)
"""
# Both tasks, in a process that may or may not know the package.
USE = """
import json
import numpy as np
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
labels = ["cat", "dog", "a car"]
options = {"model": WHERE, "trust_remote_code": TRUST}
ours = pipeline("bayesvlm-zero-shot-image-classification", **options)
stock = pipeline("zero-shot-image-classification", **options)
found = {
    "ours": ours(image, candidate_labels=labels, return_uncertainty=True),
    "stock": stock(image, candidate_labels=labels),
    "modules": sorted({type(o).__module__.split(".")[0] for o in (ours, ours.model, stock.model)}),
    "same class": type(ours.model) is type(stock.model),
    "fitted": ours.model.is_fitted,
}
"""


def processor(family: str) -> Any:
    """Tokenizer and image processor in one."""
    cls = SiglipProcessor if family == "siglip" else CLIPProcessor
    return cls(image_processor=tiny_image_processor(family), tokenizer=tiny_tokenizer(64))


def bundle(folder: Path, family: str = "clip") -> Path:
    """A saved model with its processor, without code."""
    fitted(family, base_model="alice/base").save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return folder


def push(hub: HubDouble, folder: Path, *pushes: str) -> list[Any]:
    """Results of `attempt(...)`s in one fresh process, with `model` and `processor` at hand."""
    code = f"FOLDER = {str(folder)!r}\n{PUSH}\nfound = []\n"
    code += "".join(f"found.append(attempt({arguments}))\n" for arguments in pushes)
    return hub.run(f"{code}print(json.dumps(found))", token=WRITE_TOKEN).value


def use(hub: HubDouble, where: str, *, installed: bool, more: str = "", **options: Any) -> Any:
    """What both pipelines say in a fresh process."""
    code = f"WHERE = {where!r}\nTRUST = {None if installed else True}\n"
    code += "import hf_bayesvlm\n" if installed else ""
    blocked = () if installed else ("hf_bayesvlm",)
    return hub.run(f"{code}{USE}{more}\nprint(json.dumps(found))", blocked=blocked, **options).value


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_bundle_works_with_and_without_the_package(
    hub: HubDouble, tmp_path: Path, family: str
) -> None:
    folder = bundle(tmp_path / "bundle", family)
    assert not list(folder.glob("*.py"))
    (found,) = push(hub, folder, '"alice/bundle", processor=processor')
    assert found["oid"] == hub.log("alice/bundle")[0].sha
    assert len(hub.log("alice/bundle")) == 2
    installed = use(hub, "alice/bundle", installed=True)
    again = tmp_path / "again"
    # What was loaded without the package is saved whole, and pushed whole, without the package.
    alone = use(
        hub,
        "alice/bundle",
        installed=False,
        token=WRITE_TOKEN,
        more=f"""
model = AutoModel.from_pretrained(WHERE, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(WHERE, trust_remote_code=True)
model.save_pretrained({str(again)!r})
processor.save_pretrained({str(again)!r})
found["again"] = str(model.push_to_hub("alice/again", processor=processor))
found["pipe"] = str(stock.model.push_to_hub("alice/again"))
""",
    )
    assert installed["modules"] == ["hf_bayesvlm"]
    assert alone["modules"] == ["transformers_modules"]
    assert installed["fitted"]
    assert alone["fitted"]
    assert alone["same class"]
    for task in ("ours", "stock"):
        assert alone[task] == installed[task]
    assert alone["ours"]["mutual_information"] > 0
    total = sum(prediction["score"] for prediction in alone["stock"])
    assert (abs(total - 1) < 1e-5) == (family == "clip")
    first, second = hub.files("alice/bundle"), hub.files("alice/again")
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} <= {
        *("README.md", "config.json", "tokenizer_config.json")
    }
    # Where it was loaded from on this machine is nobody's business.
    assert not [name for name in second if str(tmp_path).encode() in second[name]]
    config = json.loads(second["config.json"])
    assert config["auto_map"]["AutoModel"] == "remote_code.BayesVLMForZeroShot"
    assert alone["again"] == alone["pipe"]
    assert {file.name for file in again.iterdir()} == first.keys() - {"README.md"}
    elsewhere = use(hub, str(again), installed=False)
    assert elsewhere["stock"] == installed["stock"]
    assert elsewhere["ours"] == installed["ours"]


def test_no_code_runs_without_trust(hub: HubDouble, tmp_path: Path) -> None:
    push(hub, bundle(tmp_path / "bundle"), '"alice/bundle", processor=processor')
    found = hub.run(
        """
import json
from transformers import pipeline
found = []
for task in ("zero-shot-image-classification", "bayesvlm-zero-shot-image-classification"):
    try:
        pipeline(task, model="alice/bundle", trust_remote_code=False)
    except ValueError as error:
        found.append("trust_remote_code" in str(error))
print(json.dumps(found))
""",
        blocked=("hf_bayesvlm",),
    ).value
    assert found == [True, True]


def test_a_push_is_one_commit_with_all_that_is_needed(hub: HubDouble, tmp_path: Path) -> None:
    folder = bundle(tmp_path / "bundle")
    hub.put("alice/half", {"README.md": "# Mine", "model-00001-of-00002.safetensors": "old"})
    hub.put("alice/half", {"model.safetensors.index.json": "{}", "other.safetensors": "other"})
    refused, image_only, done, same, small, split = push(
        hub,
        folder,
        '"alice/half"',
        '"alice/new", processor=processor.image_processor',
        '"alice/half", processor=processor, commit_message="All", private=False',
        '"alice/half"',
        '"alice/small", processor=processor, include_code=False, private=True',
        '"alice/half", max_shard_size="60KB", revision="split"',
    )
    assert "AutoProcessor.from_pretrained" in refused
    assert "tokenizer" in refused
    assert "tokenizer" in image_only
    assert ("model", "alice/new") not in hub.store.repos
    assert done["oid"] == same["oid"] == hub.log("alice/half")[0].sha
    assert hub.log("alice/half")[0].title == "All"
    files = hub.files("alice/half")
    assert files["README.md"] == b"# Mine"
    assert {name for name in files if name.endswith((".safetensors", ".index.json"))} == {
        *("model.safetensors", "other.safetensors")
    }
    assert "remote_code.py" in files
    assert not {"cli.py", "estimation.py", "embedded.py"} & files.keys()
    plain = hub.files("alice/small")
    assert small["oid"] == hub.log("alice/small")[0].sha
    assert not [name for name in plain if name.endswith(".py")]
    assert "auto_map" not in json.loads(plain["config.json"])
    assert hub.store.repos["model", "alice/small"].private
    assert b"library_name: transformers" in plain["README.md"]
    assert b"base_model: alice/base" in plain["README.md"]
    assert split["oid"] == hub.log("alice/half", "split")[0].sha
    weights = {name for name in hub.files("alice/half", "split") if name.startswith("model")}
    assert "model.safetensors" not in weights
    assert "model.safetensors.index.json" in weights


def test_a_failed_push_publishes_nothing_and_the_next_goes_on(
    hub: HubDouble, tmp_path: Path
) -> None:
    folder = bundle(tmp_path / "bundle")
    hub.put("alice/bundle", {"a.txt": "a"})
    before = hub.state()
    hub.fail("/commit/", status=403, message="Storage limit reached", times=1)
    hub.cut_upload("/commit/", after=10_000, times=1)
    hub.fail("GET /api/models", times=2)
    full, done = push(hub, folder, *['"alice/bundle", processor=processor'] * 2)
    # The first try was cut and repeated; then the account was full.
    assert "no room" in full
    assert done["oid"] == hub.log("alice/bundle")[0].sha
    assert len(hub.log("alice/bundle")) == 3
    assert hub.state() != before
    assert len(hub.seen("PUT /_upload")) == 1


def test_saving_adds_code_only_when_asked(tmp_path: Path) -> None:
    model = fitted("clip")
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "whole", include_code=True)
    assert {file.name for file in (tmp_path / "plain").iterdir()} == {
        *("config.json", "model.safetensors")
    }
    whole = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {"remote_code.py", "pipeline.py", "modeling_bayesvlm.py", "posterior.py"} <= whole
    configs = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "whole")
    ]
    assert configs[1].pop("auto_map")
    assert configs[1].pop("custom_pipelines")
    assert configs[0] == configs[1]
    assert not hasattr(model.config, "auto_map")

"""A posterior brings its base along: from folders and from a Hub, in fresh processes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubDouble
from hub_store import READ_TOKEN, WRITE_TOKEN
from tiny import fitted, random_posterior, tiny_inputs, tiny_vlm

from hf_bayesvlm import BayesVLMForZeroShot, BayesVLMPosterior, HubError, PosteriorError

LOAD = """
import json, sys
import torch
from hf_bayesvlm import BayesVLMForZeroShot
sys.path.insert(0, TESTS)
from tiny import tiny_inputs

def load(function, *args, **kwargs):
    try:
        model = function(*args, **kwargs)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    if isinstance(model, tuple):
        model = model[0]
    with torch.no_grad():
        output = model(**tiny_inputs("clip"))
    return [round(float(output.logits_var.float().mean()), 5), model.is_fitted, str(model.dtype)]

of_id, of_vlm = BayesVLMForZeroShot.from_pretrained, BayesVLMForZeroShot.from_vlm
found = []
"""


def load(hub: HubDouble, *calls: str, **options: Any) -> list[Any]:
    """Results of `load(...)`s in one fresh process."""
    code = f"TESTS = {str(Path(__file__).parent)!r}\n{LOAD}"
    code += "".join(f"found.append(load({call}))\n" for call in calls)
    return hub.run(f"{code}print(json.dumps(found))", **options).value


def posterior_of(vlm: Any, base: str | None, seed: int = 0, **values: Any) -> BayesVLMPosterior:
    """A posterior that knows the fingerprint of its base."""
    model = BayesVLMForZeroShot.from_vlm(vlm)
    model.set_posterior(random_posterior(model, seed))
    assert model.posterior is not None
    assert model.posterior.fingerprint is not None
    return dataclasses.replace(model.posterior, base_model=base, **values)


def variance(model: BayesVLMForZeroShot) -> float:
    with torch.no_grad():
        return round(float(model(**tiny_inputs("clip")).logits_var.mean()), 5)


def test_a_folder_with_a_posterior_is_a_model(tmp_path: Path) -> None:
    vlm = tiny_vlm("clip")
    vlm.save_pretrained(tmp_path / "base")
    posterior = posterior_of(vlm, str(tmp_path / "base"))
    posterior.save_pretrained(tmp_path / "posterior" / "deep")
    expected = variance(BayesVLMForZeroShot.from_vlm(vlm, posterior))
    model = BayesVLMForZeroShot.from_pretrained(tmp_path / "posterior" / "deep")
    assert model.is_fitted
    assert variance(model) == expected
    model, info = BayesVLMForZeroShot.from_pretrained(
        tmp_path / "posterior", subfolder="deep", dtype=torch.bfloat16, output_loading_info=True
    )
    assert model.dtype == torch.bfloat16
    assert info["missing_keys"] == set()
    model = BayesVLMForZeroShot.from_vlm(
        tmp_path / "base", tmp_path / "posterior", posterior_subfolder="deep"
    )
    assert variance(model) == expected
    # A bundle beside a posterior is a bundle.
    fitted("clip", seed=3).save_pretrained(tmp_path / "posterior" / "deep")
    assert (
        variance(BayesVLMForZeroShot.from_pretrained(tmp_path / "posterior" / "deep")) != expected
    )


def test_errors_of_a_posterior_that_finds_no_base(tmp_path: Path) -> None:
    vlm = tiny_vlm("clip")
    posterior_of(vlm, None).save_pretrained(tmp_path / "none")
    with pytest.raises(PosteriorError, match=r"does not say which model.*from_vlm"):
        BayesVLMForZeroShot.from_pretrained(tmp_path / "none")
    posterior_of(vlm, str(tmp_path / "gone")).save_pretrained(tmp_path / "lost")
    with pytest.raises(HubError, match=r"gone.*cannot be loaded.*from_vlm"):
        BayesVLMForZeroShot.from_pretrained(tmp_path / "lost")
    tiny_vlm("clip", seed=1).save_pretrained(tmp_path / "other")
    posterior_of(vlm, str(tmp_path / "other")).save_pretrained(tmp_path / "wrong")
    with pytest.raises(PosteriorError, match="other weights"):
        BayesVLMForZeroShot.from_pretrained(tmp_path / "wrong")
    # A posterior of a posterior: no endless search.
    posterior_of(vlm, str(tmp_path / "loop")).save_pretrained(tmp_path / "loop")
    with pytest.raises(HubError, match="cannot be loaded"):
        BayesVLMForZeroShot.from_pretrained(tmp_path / "loop")


def test_options_that_belong_nowhere_are_refused(tmp_path: Path) -> None:
    vlm = tiny_vlm("clip")
    posterior = posterior_of(vlm, None)
    with pytest.raises(TypeError, match="token"):
        BayesVLMForZeroShot.from_vlm(vlm, posterior, token="hf_x")
    with pytest.raises(TypeError, match="dtype"):
        BayesVLMForZeroShot.from_vlm(vlm, str(tmp_path), dtype=torch.float16)
    with pytest.raises(TypeError, match="posterior_revision"):
        BayesVLMForZeroShot.from_vlm(vlm, posterior, posterior_revision="main")


def test_pickles_are_not_loaded_unasked(tmp_path: Path) -> None:
    vlm = tiny_vlm("clip")
    vlm.config.save_pretrained(tmp_path)
    torch.save(vlm.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="pickled ones are not loaded unasked"):
        BayesVLMForZeroShot.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights_only=False"):
        BayesVLMForZeroShot.from_pretrained(tmp_path, weights_only=False)
    assert not BayesVLMForZeroShot.from_pretrained(tmp_path, use_safetensors=False).is_fitted


def test_a_posterior_on_the_hub_brings_its_base(hub: HubDouble, tmp_path: Path) -> None:
    vlm, later = tiny_vlm("clip"), tiny_vlm("clip", seed=1)
    vlm.save_pretrained(tmp_path / "base")
    later.save_pretrained(tmp_path / "later")
    old = hub.put("alice/base", tmp_path / "base", private=True).sha
    hub.put("alice/base", tmp_path / "later")
    for name, seed in (("first", 0), ("second", 7)):
        posterior = posterior_of(vlm, "alice/base", seed, revision=old)
        posterior.save_pretrained(tmp_path / name)
    hub.put("alice/posterior", tmp_path / "first", private=True)
    second = {f"deep/{file.name}": file for file in (tmp_path / "second").iterdir()}
    hub.put("alice/posterior", second, revision="dev")
    expected = [
        variance(
            BayesVLMForZeroShot.from_vlm(vlm, BayesVLMPosterior.from_pretrained(tmp_path / name))
        )
        for name in ("first", "second")
    ]
    token, cache = f"token={READ_TOKEN!r}", f"cache_dir={str(tmp_path / 'cache')!r}"
    dev = 'revision="dev", subfolder="deep"'
    dev_of_vlm = 'posterior_revision="dev", posterior_subfolder="deep"'
    found = load(
        hub,
        'of_id, "alice/posterior"',
        f'of_id, "alice/posterior", {token}, {cache}',
        f'of_id, "alice/posterior", {cache}, local_files_only=True',
        f'of_id, "alice/posterior", {token}, {cache}, {dev}, dtype=torch.bfloat16, device_map="cpu"',
        f'of_vlm, "alice/base", "alice/posterior", {token}, {cache}',
        f'of_vlm, "alice/base", "alice/posterior", {token}, {cache}, revision={old!r}, {dev_of_vlm}',
        f'of_vlm, "alice/base", "alice/posterior", {cache}, revision={old!r}, local_files_only=True',
    )
    assert found[0].startswith("OSError")
    assert found[1] == found[2] == found[6] == [expected[0], True, "torch.float32"]
    assert found[3][1:] == [True, "torch.bfloat16"]
    assert found[3][0] == pytest.approx(expected[1], rel=0.1)
    assert "other weights" in found[4]
    assert found[5] == [expected[1], True, "torch.float32"]
    seen = hub.seen("resolve/")
    assert {request.token for request in hub.seen("alice/") if request.status < 400} == {READ_TOKEN}
    assert not [
        r for r in seen if "alice/base/resolve/dev" in r.path or "/base/resolve/main/deep" in r.path
    ]
    assert {path.name for path in (tmp_path / "cache").glob("models--*")} == {
        *("models--alice--base", "models--alice--posterior")
    }


def test_errors_of_posteriors_on_the_hub(hub: HubDouble, tmp_path: Path) -> None:
    vlm = tiny_vlm("clip")
    for name, base in (("gone", "alice/gone"), ("path", "/etc"), ("nothing", None)):
        posterior_of(vlm, base).save_pretrained(tmp_path / name)
        hub.put(f"alice/{name}", tmp_path / name)
    posterior_of(vlm, "bob/gated").save_pretrained(tmp_path / "gated-posterior")
    hub.put("alice/gated-posterior", tmp_path / "gated-posterior")
    vlm.save_pretrained(tmp_path / "base")
    hub.put("bob/gated", tmp_path / "base", gated=True)
    hub.put("alice/empty", {"README.md": "# Nothing"})
    vlm.config.save_pretrained(tmp_path / "pickled")
    torch.save(vlm.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    hub.put("alice/pickled", tmp_path / "pickled")
    names = ["gone", "gated-posterior", "path", "nothing", "empty", "pickled", "missing"]
    found = dict(
        zip(
            names,
            load(
                hub,
                *(f'of_id, "alice/{name}"' for name in names),
                DISABLE_SAFETENSORS_CONVERSION="1",
            ),
            strict=True,
        )
    )
    assert "a posterior of alice/gone, which cannot be loaded" in found["gone"]
    assert "from_vlm" in found["gone"]
    assert "a posterior of bob/gated, which cannot be loaded" in found["gated-posterior"]
    assert "gated" in found["gated-posterior"].replace("bob/gated", "").replace(
        "gated-posterior", ""
    )
    assert "names the folder '/etc'" in found["path"]
    assert "does not say which model" in found["nothing"]
    assert "config.json" in found["empty"]
    assert "pickled ones are not loaded unasked" in found["pickled"]
    assert found["missing"].startswith("OSError")
    assert not hub.seen("GET .*pytorch_model")
    assert WRITE_TOKEN not in json.dumps(found)


def test_a_bad_connection_while_loading_a_bundle(hub: HubDouble, tmp_path: Path) -> None:
    model = fitted("clip")
    model.save_pretrained(tmp_path / "bundle")
    hub.put("alice/bundle", tmp_path / "bundle")
    hub.slow("HEAD", seconds=0.3, times=3)
    hub.cut("GET /_cdn", after=1000, times=2)
    (found,) = load(hub, 'of_id, "alice/bundle"')
    assert found == [variance(model), True, "torch.float32"]
    assert len(hub.seen("GET /_cdn")) == 3
    hub.mend()
    hub.cut("GET /_cdn", after=1000)
    (found,) = load(hub, 'of_id, "alice/bundle"')
    assert found.startswith("OSError")

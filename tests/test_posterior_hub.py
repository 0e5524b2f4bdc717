"""Publishing and loading posteriors through a Hub, in fresh processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubDouble
from hub_store import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN
from tiny import fitted

FILES = {"posterior.safetensors", "posterior_config.json", "README.md"}
PUSH = """
import json
from hf_bayesvlm import BayesVLMPosterior, HubError, PosteriorError

def attempt(*args, **kwargs):
    try:
        info = posterior.push_to_hub(*args, **kwargs)
    except (HubError, PosteriorError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return {"url": str(info), "oid": info.oid, "pr": info.pr_url}

posterior = BayesVLMPosterior.from_pretrained(FOLDER)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved posterior."""
    posterior = fitted("clip", base_model="alice/base").posterior
    assert posterior is not None
    posterior.save_pretrained(tmp_path / "posterior")
    return tmp_path / "posterior"


def push(hub: HubDouble, folder: Path, *pushes: str, token: str | None = WRITE_TOKEN) -> list[Any]:
    """Results of `attempt(...)`s in one fresh process; the posterior is at hand as `posterior`."""
    code = f"FOLDER = {str(folder)!r}\n{PUSH}\nfound = []\n"
    code += "".join(f"found.append(attempt({arguments}))\n" for arguments in pushes)
    found = hub.run(f"{code}print(json.dumps(found))", token=token).value
    assert token is None or token not in json.dumps(found)
    return found


def test_a_push_is_one_commit_and_repeating_it_is_none(hub: HubDouble, folder: Path) -> None:
    mine = '"alice/posterior", private=True'
    first, second, third = push(
        hub, folder, f'{mine}, commit_message="Share it"', mine, '"posterior"'
    )
    assert hub.store.repos["model", "alice/posterior"].private
    commits = hub.log("alice/posterior")
    assert [commit.title for commit in commits] == ["Share it", "initial commit"]
    assert first["oid"] == second["oid"] == third["oid"] == commits[0].sha
    assert first["url"] == f"{hub.endpoint}/alice/posterior/commit/{commits[0].sha}"
    files = hub.files("alice/posterior")
    assert files.keys() == FILES
    assert files["posterior.safetensors"] == (folder / "posterior.safetensors").read_bytes()
    assert b"library_name: transformers" in files["README.md"]
    assert b"base_model: alice/base" in files["README.md"]
    assert [len(hub.seen(what)) for what in ("PUT /_upload", "/commit/", "repos/create")] == [
        1,
        1,
        1,
    ]


def test_branch_pull_request_subfolder_and_the_users_card(hub: HubDouble, folder: Path) -> None:
    hub.put("alice/mine", {"README.md": "# My own words", "other.txt": "x"})
    hub.put("bob/theirs", {"a.txt": "a"})
    main = hub.log("alice/mine")[0].sha
    branch, proposal, elsewhere, wrong, again = push(
        hub,
        folder,
        f'"alice/mine", revision="dev", subfolder="clip/", token={WRITE_TOKEN!r}',
        f'"alice/mine", create_pr=True, commit_message="Please", token={WRITE_TOKEN!r}',
        f'"bob/theirs", create_pr=True, token={WRITE_TOKEN!r}',
        f'"alice/mine", create_pr=True, revision="dev", token={WRITE_TOKEN!r}',
        f'"alice/mine", revision="refs/pr/1", token={WRITE_TOKEN!r}',
        token=READ_TOKEN,
    )
    assert hub.log("alice/mine")[0].sha == main
    dev = hub.files("alice/mine", "dev")
    assert dev.keys() == {
        *("README.md", "other.txt", "clip/posterior.safetensors", "clip/posterior_config.json")
    }
    assert dev["README.md"] == b"# My own words"
    assert branch["oid"] == hub.log("alice/mine", "dev")[0].sha
    assert proposal["pr"] == f"{hub.endpoint}/alice/mine/discussions/1"
    assert hub.log("alice/mine", "refs/pr/1")[0].title == "Please"
    assert hub.files("alice/mine", "refs/pr/1").keys() == FILES | {"other.txt"}
    assert hub.files("bob/theirs", "refs/pr/1").keys() == FILES | {"a.txt"}
    assert elsewhere["pr"] == f"{hub.endpoint}/bob/theirs/discussions/1"
    assert wrong.startswith("ValueError: create_pr")
    assert again["oid"] == proposal["oid"]
    # The token of the call is used everywhere, not that of the environment.
    assert {request.token for request in hub.seen("/api/")} == {WRITE_TOKEN}


def test_errors_say_what_to_do_and_change_nothing(hub: HubDouble, folder: Path) -> None:
    hub.put("alice/Open", {"a.txt": "a"})
    hub.put("bob/theirs", {"a.txt": "a"})
    hub.put("bob/secret", {"a.txt": "a"}, private=True)
    before = hub.state()
    attempts = {
        '"bob/theirs"': "create_pr=True",
        '"bob/secret"': "may not write",
        '"bob/new"': "namespace of your own",
        '"alice/open"': "another spelling",
        '"datasets/alice/open"': "datasets/",
        '"alice/Open", private=True': "exists and is public, not private",
        '"alice/Open", exist_ok=False': "exists already",
        '"alice/Open", revision="refs/pr/7"': "no revision 'refs/pr/7'",
        '"no/such name"': "give `user/name`",
        '"alice/Open", token=False': "hf auth login",
        '"alice/Open", token="hf_bad\\n"': "no token has",
        '"alice/Open", token="hf_wrong"': "the token is not valid",
        f'"alice/Open", token={READ_TOKEN!r}': "may not write",
    }
    for (arguments, words), found in zip(
        attempts.items(), push(hub, folder, *attempts), strict=True
    ):
        assert found.startswith("HubError: "), arguments
        assert words in found, arguments
        assert "hf_" not in found
        assert "Traceback" not in found
    assert hub.state() == before
    (found,) = push(hub, folder, '"alice/Open"', token=None)
    assert "no Hub token" in found
    (found,) = push(hub, folder, f'"alice/Open", token={OTHER_TOKEN!r}', token=None)
    assert "may not write" in found
    assert hub.state() == before


def test_a_failing_hub_gets_another_chance(hub: HubDouble, folder: Path) -> None:
    hub.put("alice/open", {"a.txt": "a"})
    # Each of these once; the answer of the commit is lost, but it was made.
    for match in ("GET /api/models", "preupload", "objects/batch", "PUT /_upload", "verify"):
        hub.fail(match, times=1)
    hub.fail("/commit/", status=500, times=1)
    hub.lose_answer("/commit/")
    (found,) = push(hub, folder, '"alice/open"')
    assert found["oid"] == hub.log("alice/open")[0].sha
    assert len(hub.log("alice/open")) == 3
    assert hub.files("alice/open").keys() == FILES | {"a.txt"}
    assert len(hub.seen("PUT /_upload")) == 2


def test_someone_else_pushes_at_the_same_time(hub: HubDouble, folder: Path) -> None:
    hub.put("alice/open", {"a.txt": "a"})
    # The answer to the first commit is a conflict; meanwhile a card appears.
    hub.fail("/commit/", status=412, times=1)
    (found,) = push(hub, folder, '"alice/open"')
    assert found["oid"] == hub.log("alice/open")[0].sha


@pytest.mark.parametrize("branch", ["main", "dev"])
def test_a_failed_push_publishes_nothing(hub: HubDouble, folder: Path, branch: str) -> None:
    hub.put("alice/open", {"a.txt": "a"})
    before = hub.state()
    # One after the other, each push gets as far as the next fault; three tries where it may help.
    hub.fail("objects/batch", status=413, message="Payload too large", times=1)
    hub.fail("PUT /_upload", status=403, message="Denied", times=1)
    hub.cut_upload("/commit/", after=100, times=3)
    hub.fail("/commit/", status=403, message="Storage quota exceeded", times=1)
    hub.fail("/commit/", status=400, message="Odd", times=1)
    hub.fail("/commit/", status=500, times=3)
    words = [
        "no room",
        "may not write",
        "connection to the Hub was lost",
        "no room",
        "status 400",
        "Nothing was published; push again later",
    ]
    found = push(hub, folder, *[f'"alice/open", revision="{branch}"'] * len(words))
    for i, word in enumerate(words):
        assert found[i].startswith("HubError: "), found[i]
        assert word in found[i]
    assert hub.state() == before
    # A branch that was made for the push is taken back.
    assert len(hub.seen("DELETE .*/branch/dev")) == (0 if branch == "main" else 4)
    hub.store.quota = 100
    hub.store.repos["model", "alice/open"].large.clear()
    (failed,) = push(hub, folder, f'"alice/open", revision="{branch}"')
    assert "no room" in failed
    assert hub.state() == before
    # What stood in the way is gone: the same push goes through.
    hub.store.quota = None
    (done,) = push(hub, folder, f'"alice/open", revision="{branch}"')
    assert done["oid"] == hub.log("alice/open", branch)[0].sha
    assert hub.files("alice/open", branch).keys() == FILES | {"a.txt"}


def test_what_would_mislead_others_is_not_published(hub: HubDouble, tmp_path: Path) -> None:
    posterior = fitted("clip", base_model="/home/me/clip").posterior
    assert posterior is not None
    posterior.save_pretrained(tmp_path / "local")
    (found,) = push(hub, tmp_path / "local", '"alice/new"')
    assert found.startswith("PosteriorError")
    assert "Hub id" in found
    assert not hub.store.repos


def test_every_option_of_loading_reaches_the_hub(
    hub: HubDouble, folder: Path, tmp_path: Path
) -> None:
    hub.put("alice/posterior", folder, private=True)
    old = hub.log("alice/posterior")[0].sha
    other = fitted("clip", seed=5, base_model="alice/base").posterior
    assert other is not None
    other.save_pretrained(tmp_path / "other")
    hub.put("alice/posterior", tmp_path / "other", revision="dev")
    nested = {f"deep/er/{file.name}": file for file in folder.iterdir()}
    hub.put("alice/posterior", nested, revision="nested")
    cache = str(tmp_path / "cache")
    found = hub.run(
        f"""
import json
from pathlib import Path
from hf_bayesvlm import BayesVLMPosterior

def load(**kwargs):
    try:
        posterior = BayesVLMPosterior.from_pretrained("alice/posterior", **kwargs)
    except OSError as error:
        return type(error).__name__
    return round(float(posterior.image.A[0, 0]), 4)

T = {WRITE_TOKEN!r}
found = [
    load(),
    load(local_files_only=True),
    load(token=T, cache_dir={cache!r}),
    load(local_files_only=True),
    load(local_files_only=True, cache_dir={cache!r}),
    load(token=T, revision="dev"),
    load(token=T, revision={old!r}),
    load(token=T, revision="nested", subfolder="deep/er"),
    load(token=T, subfolder="none"),
    load(token=T, revision="none"),
    load(token=T, force_download=True, revision="dev"),
]
print(json.dumps([found, sorted(p.name for p in Path({cache!r}).iterdir())]))
"""
    ).value
    values, cached = found
    mine = round(float(fitted("clip").posterior.image.A[0, 0]), 4)  # type: ignore[union-attr]
    theirs = round(float(other.image.A[0, 0]), 4)
    assert values == [
        *("RepositoryNotFoundError", "FileNotFoundError", mine, "FileNotFoundError", mine),
        *(theirs, mine, mine, "FileNotFoundError", "RevisionNotFoundError", theirs),
    ]
    assert "models--alice--posterior" in cached
    large = hub.seen("GET /_cdn")
    # dev is downloaded twice, the second time by force; main and the old commit into two caches.
    assert len(large) == 4
    assert hub.seen("HEAD .*resolve/nested/deep/er/posterior.safetensors")
    assert all(request.token is None for request in large)


def test_a_bad_connection_while_loading(hub: HubDouble, folder: Path) -> None:
    hub.put("alice/posterior", folder)
    code = """
import json
from hf_bayesvlm import BayesVLMPosterior
try:
    print(json.dumps(BayesVLMPosterior.from_pretrained("alice/posterior").base_model))
except OSError as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""
    hub.slow("HEAD", seconds=0.3, times=2)
    hub.cut("GET /_cdn", after=1000, times=2)
    home = folder.parent / "kept"
    assert hub.run(code, home=home).value == "alice/base"
    hub.mend()
    # What is in the cache is used while the Hub is in trouble, as everywhere in transformers.
    hub.fail(status=503)
    assert hub.run(code, home=home).value == "alice/base"
    hub.mend()
    assert "the Hub cannot be asked" in hub.run(code, HF_HUB_OFFLINE="1").value
    # Too slow at first: huggingface_hub asks again with more patience.
    hub.slow("HEAD", seconds=2, times=1)
    assert hub.run(code, HF_HUB_ETAG_TIMEOUT="1").value == "alice/base"
    hub.cut("GET /_cdn", after=1000)
    found = hub.run(code).value
    assert found.startswith("HubError")
    assert "connection to the Hub was lost" in found

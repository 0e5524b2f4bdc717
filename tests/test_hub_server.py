"""The Hub double itself: huggingface_hub and datasets find in it what they find on the real one."""

from __future__ import annotations

from hub_server import HubDouble
from hub_store import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN

API = """
import json
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
)

def error(call):
    try:
        call()
    except HfHubHTTPError as problem:
        return [type(problem).__name__, problem.response.status_code]

api = HfApi()
"""


def test_a_life_of_a_repository(hub: HubDouble) -> None:
    found = hub.run(
        API
        + """
repo = api.create_repo("alice/thing", private=True)
first = api.create_commit("alice/thing", [
    CommitOperationAdd("README.md", b"---\\ntags: [a]\\n---\\n# A"),
    CommitOperationAdd("x/big.safetensors", b"0123456789" * 1000),
], commit_message="one")
api.create_tag("alice/thing", tag="v1")
api.create_branch("alice/thing", branch="dev")
api.create_commit("alice/thing", [
    CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("x/", is_folder=True)
], commit_message="two", revision="dev")
proposal = api.create_commit(
    "alice/thing", [CommitOperationAdd("p.txt", b"p")], commit_message="pr", create_pr=True
)
same = api.create_commit(
    "alice/thing", [CommitOperationAdd("x/big.safetensors", b"0123456789" * 1000)], commit_message="no"
)
refs = api.list_repo_refs("alice/thing", include_pull_requests=True)
big = hf_hub_download("alice/thing", "x/big.safetensors", revision="v1")
print(json.dumps({
    "user": api.whoami()["name"],
    "main": api.list_repo_files("alice/thing"),
    "dev": api.list_repo_files("alice/thing", revision="dev"),
    "pr": api.list_repo_files("alice/thing", revision=proposal.pr_revision),
    "same": same.oid == first.oid,
    "refs": [len(refs.branches), len(refs.tags), len(refs.pull_requests)],
    "big": len(open(big, "rb").read()),
    "snapshot": sorted(f.name for f in __import__("pathlib").Path(
        snapshot_download("alice/thing", revision="dev")).iterdir()),
    "private": api.model_info("alice/thing").private,
    "tags": api.model_info("alice/thing", files_metadata=True).tags,
    "paths": [f.path for f in api.get_paths_info("alice/thing", ["README.md", "none", "x"])],
    "log": [c.title for c in api.list_repo_commits("alice/thing", revision="dev")],
    "exists": [api.repo_exists("alice/thing"), api.file_exists("alice/thing", "no")],
    "again": error(lambda: api.create_repo("alice/thing")),
    "clash": error(lambda: api.create_repo("alice/THING")),
    "reused": str(api.create_repo("alice/thing", exist_ok=True)),
}))
""",
        token=WRITE_TOKEN,
    ).value
    assert found["user"] == "alice"
    assert found["main"] == [".gitattributes", "README.md", "x/big.safetensors"]
    assert found["dev"] == [".gitattributes", "README.md", "new.txt"]
    assert found["pr"] == [".gitattributes", "README.md", "p.txt", "x/big.safetensors"]
    assert found["same"]
    assert found["refs"] == [2, 1, 1]
    assert found["big"] == 10000
    assert found["snapshot"] == [".gitattributes", "README.md", "new.txt"]
    assert found["private"]
    assert found["tags"] == ["a"]
    assert found["paths"] == ["README.md", "x"]
    assert found["log"] == ["two", "one", "initial commit"]
    assert found["exists"] == [True, False]
    assert found["again"] == found["clash"] == ["HfHubHTTPError", 409]
    assert found["reused"] == f"{hub.endpoint}/alice/thing"
    # The large file was uploaded once, and the other host never saw the token.
    assert len(hub.seen("PUT /_upload")) == 1
    assert all(request.token is None for request in hub.seen("_upload|_cdn"))


def test_who_may_do_what(hub: HubDouble) -> None:
    hub.put("alice/secret", {"a.txt": "a"}, private=True)
    hub.put("alice/gated", {"a.txt": "a"}, gated=True)
    hub.put("alice/open", {"a.txt": "a"})
    code = (
        API
        + """
add = lambda: [CommitOperationAdd("b.txt", b"b")]
print(json.dumps([
    error(lambda: hf_hub_download("alice/secret", "a.txt")),
    error(lambda: hf_hub_download("alice/none", "a.txt")),
    error(lambda: hf_hub_download("alice/gated", "a.txt")),
    error(lambda: hf_hub_download("alice/open", "none.txt")),
    error(lambda: hf_hub_download("alice/open", "a.txt", revision="none")),
    error(lambda: api.create_repo("alice/new")),
    error(lambda: api.create_commit("alice/open", add(), commit_message="m")),
    error(lambda: api.create_commit("alice/open", add(), commit_message="m", create_pr=True)),
]))
"""
    )
    missing, entry, revision = (
        ["RepositoryNotFoundError", 404],
        ["RemoteEntryNotFoundError", 404],
        ["RevisionNotFoundError", 404],
    )
    forbidden, unknown = ["HfHubHTTPError", 403], ["RepositoryNotFoundError", 401]
    before = hub.state()
    assert hub.run(code).value == [
        *(unknown, unknown, ["GatedRepoError", 401], entry, revision),
        *[["HfHubHTTPError", 401]] * 3,
    ]
    assert hub.run(code, token=READ_TOKEN).value == [
        *(None, missing, None, entry, revision, forbidden, forbidden, forbidden)
    ]
    assert hub.state() == before
    assert hub.run(code, token=OTHER_TOKEN).value == [
        *(missing, missing, ["GatedRepoError", 403], entry, revision, forbidden, forbidden, None)
    ]


def test_faults_are_as_on_a_real_network(hub: HubDouble) -> None:
    data = bytes(range(256)) * 4000
    hub.put("alice/open", {"a.bin": data})
    hub.cut("GET /_cdn", after=300_000, times=2)
    hub.fail("POST .*preupload", status=503, times=1)
    hub.cut_upload("PUT /_upload", after=1000, times=1)
    found = hub.run(
        API
        + """
got = open(hf_hub_download("alice/open", "a.bin"), "rb").read()
api.create_commit("alice/open", [CommitOperationAdd("b.bin", got[::-1])], commit_message="m")
print(len(got))
""",
        token=WRITE_TOKEN,
    ).value
    assert found == len(data)
    assert hub.files("alice/open")["b.bin"] == data[::-1]
    assert hub.seen("GET /_cdn")[0].headers.get("range") is None
    assert len(hub.seen("GET /_cdn")) == 3
    assert [request.status for request in hub.seen("preupload")] == [503, 200]
    assert [request.status for request in hub.seen("PUT /_upload")] == [0, 200]


def test_a_data_set_loads_and_streams(hub: HubDouble) -> None:
    hub.page_size = 2
    found = hub.run(
        """
import io, json, tarfile
import numpy as np
from datasets import Dataset, Image, load_dataset
from huggingface_hub import HfApi
from PIL import Image as Pictures

def picture(i):
    file = io.BytesIO()
    Pictures.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(file, "PNG")
    return file.getvalue()

Dataset.from_dict({"text": ["a", "b", "c"]}).push_to_hub("alice/table")
api = HfApi()
api.create_repo("alice/folder", repo_type="dataset")
for i in range(3):
    api.upload_file(repo_id="alice/folder", repo_type="dataset", path_or_fileobj=picture(i),
                    path_in_repo=f"train/cat/{i}.png")
archive = io.BytesIO()
with tarfile.open(fileobj=archive, mode="w") as tar:
    for i in range(3):
        for name, data in ((f"{i}.png", picture(i)), (f"{i}.txt", f"text {i}".encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
api.create_repo("alice/shards", repo_type="dataset")
api.upload_file(repo_id="alice/shards", repo_type="dataset", path_or_fileobj=archive.getvalue(),
                path_in_repo="train-0000.tar")
api.create_tag("alice/shards", tag="v1", repo_type="dataset")
print(json.dumps({
    "table": load_dataset("alice/table", split="train")["text"][:],
    "stream": [row["text"] for row in load_dataset("alice/table", split="train", streaming=True)],
    "folder": len(load_dataset("alice/folder", split="train")),
    "folder stream": sum(1 for _ in load_dataset("alice/folder", split="train", streaming=True)),
    "shards": [row["png"].size for row in load_dataset("alice/shards", split="train", revision="v1")],
    "shards stream": [row["txt"] for row in
                      load_dataset("alice/shards", split="train", streaming=True)],
}))
""",
        token=WRITE_TOKEN,
    ).value
    assert found["table"] == found["stream"] == ["a", "b", "c"]
    assert found["folder"] == found["folder stream"] == 3
    assert found["shards"] == [[8, 8]] * 3
    assert found["shards stream"] == ["text 0", "text 1", "text 2"]

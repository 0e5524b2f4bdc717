"""Publish the demo as a Hugging Face Space, in one commit.

    python scripts/publish_space.py owner/name --dry-run build/space   # writes the folder; `python app.py` runs it
    python scripts/publish_space.py owner/name

The package goes along as a folder beside `app.py`: a Space installs `requirements.txt` before its own files are there,
so that a wheel in the repository could not be installed, and the package need not be on an index.
Everything else is pinned to the versions that are installed here.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, SpaceCardData
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id

import hf_bayesvlm
from hf_bayesvlm.demo_hub import DemoError, check_repo_id

SHORT_DESCRIPTION = "CLIP that says how sure it is"
_PACKAGE = Path(hf_bayesvlm.__file__).parent

_APP = '''\
"""The demo of hf_bayesvlm. Its code is in the folder beside this file."""

from hf_bayesvlm.demo import build_app

demo = build_app(model={model!r}, posterior={posterior!r}, allow_hub={allow_hub!r})

if __name__ == "__main__":
    demo.launch()
'''

_README = """\
---
{metadata}
---

# How sure is CLIP?

A plain model beside the same model with a Laplace posterior over its last layers
([arXiv:2412.06014](https://arxiv.org/abs/2412.06014)): scores with error bars, and the entropy of the prediction split into
what the image leaves open and what the model does not know. Sliders make the image worse.

The endpoint `/classify` gives the same as JSON:

```python
from gradio_client import Client, handle_file

client = Client("{space}")
client.predict(image=handle_file("photo.png"), labels="cat, dog", api_name="/classify")
```

The folder `hf_bayesvlm` is version {version} of the package (Apache-2.0). The embedded weights are CC-BY-SA-4.0, the
sample drawings MIT: see `hf_bayesvlm/assets`.
"""


def write_space(
    folder: Path,
    space: str,
    *,
    model: str | None = None,
    posterior: str | None = None,
    allow_hub: bool = True,
) -> None:
    """Write everything that the Space needs.

    Args:
        folder: Is made; must be empty if it is there.
        space: Id of the Space.
        model: Hub id of the model that is shown first; None for the embedded one.
        posterior: Hub id of a posterior for it.
        allow_hub: Whether visitors may load other models.

    Raises:
        FileExistsError: If the folder is not empty.
        DemoError: If model or posterior is no Hub id: a Space sees no folder of this machine.
    """
    for name in (model, posterior):
        if name is not None:
            check_repo_id(name)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(
        _PACKAGE,
        folder / _PACKAGE.name,
        ignore=shutil.ignore_patterns("__pycache__", "*.py[co]", "*.pyi"),
    )
    app = _APP.format(model=model, posterior=posterior, allow_hub=allow_hub)
    (folder / "app.py").write_text(app, encoding="utf-8")
    pins = "".join(f"{name}=={version}\n" for name, version in requirements().items())
    (folder / "requirements.txt").write_text(pins, encoding="utf-8")
    text = _README.format(
        metadata=card_data(space, [name for name in (model, posterior) if name]).to_yaml().strip(),
        space=space,
        version=hf_bayesvlm.__version__,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def requirements() -> dict[str, str]:
    """What the package and its demo need, each in the version that is installed here.

    Returns:
        Distribution -> version, without local labels such as `+cpu`.
    """
    pins: dict[str, str] = {}
    for line in [*(metadata.requires("hf_bayesvlm") or []), "gradio"]:
        requirement, _, marker = line.partition(";")
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        if match is not None and "extra" not in marker:
            pins[match.group()] = metadata.version(match.group()).partition("+")[0]
    return dict(sorted(pins.items()))


def card_data(space: str, models: list[str]) -> SpaceCardData:
    """The Space's metadata.

    Args:
        space: Its id.
        models: Hub ids that it shows.

    Returns:
        For the head of `README.md`.
    """
    values: dict[str, Any] = {
        "title": "How sure is CLIP?",
        "emoji": "🎯",
        "colorFrom": "blue",
        "colorTo": "indigo",
        "sdk": "gradio",
        "sdk_version": metadata.version("gradio"),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "license": ["apache-2.0", "cc-by-sa-4.0", "mit"],
        "models": models or None,
        "short_description": SHORT_DESCRIPTION,
        "tags": ["bayesvlm", "uncertainty", "zero-shot-image-classification"],
        "pinned": False,
    }
    return SpaceCardData(**values)


def push(folder: Path, space: str, *, private: bool) -> str:
    """Create the Space if need be and replace its files in one commit.

    Args:
        folder: From `write_space`.
        space: Id of the Space.
        private: Make a new Space private; an existing one stays as it is.

    Returns:
        URL of the commit.
    """
    api = HfApi()
    api.create_repo(space, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=space,
        repo_type="space",
        folder_path=folder,
        commit_message=f"Demo of hf_bayesvlm {hf_bayesvlm.__version__}",
        # What an earlier version had and this one has not.
        delete_patterns="*",
    )
    return str(commit.commit_url)


def main(arguments: list[str] | None = None) -> int:
    """Write or publish the Space; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("space", help="id of the Space, owner/name")
    parser.add_argument(
        "--dry-run", type=Path, metavar="DIR", help="write the folder, push nothing"
    )
    parser.add_argument("--model", help="Hub id of the first model (default: the embedded one)")
    parser.add_argument("--posterior", help="Hub id of a posterior for it")
    parser.add_argument(
        "--only-these", action="store_true", help="visitors cannot load other models"
    )
    parser.add_argument("--private", action="store_true", help="make a new Space private")
    chosen = parser.parse_args(arguments)
    options = {
        "model": chosen.model,
        "posterior": chosen.posterior,
        "allow_hub": not chosen.only_these,
    }
    try:
        validate_repo_id(chosen.space)
        if chosen.dry_run is not None:
            write_space(chosen.dry_run, chosen.space, **options)
            print(f"wrote {chosen.dry_run}: python app.py runs it")
            return 0
        with tempfile.TemporaryDirectory() as folder:
            write_space(Path(folder), chosen.space, **options)
            print(push(Path(folder), chosen.space, private=chosen.private))
    except (DemoError, HFValidationError, HfHubHTTPError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Models and posteriors that visitors of the demo name: fetched from the Hub under limits, never run as code.

A visitor's word is only ever a Hub id.  It is fetched without a token (the operator's private repositories
stay private), file by file from a list of safe formats, and loaded from the cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .configuration_bayesvlm import MODEL_TYPE, BayesVLMConfig, wrap_config_dict
from .modeling_bayesvlm import BayesVLMForZeroShot

MAX_DOWNLOAD_BYTES = 4 * 2**30
MAX_POSTERIOR_BYTES = 256 * 2**20
MAX_PARAMETERS = 1_000_000_000
MAX_INPUT_SIDE = 1024
_MAX_LAYERS = 128
_MODEL_TYPES = {
    MODEL_TYPE,
    "clip",
    "siglip",
    "siglip2",
    "metaclip_2",
    "chinese_clip",
    "altclip",
    "vision-text-dual-encoder",
}
_POSTERIOR_FILES = ("posterior.safetensors", "posterior_config.json")
_MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


class DemoError(ValueError):
    """Something a visitor asked for cannot be had; the message is for the visitor."""


def check_repo_id(name: str) -> str:
    """Refuse anything but `owner/name`.

    Args:
        name: What a visitor typed.

    Returns:
        The id.

    Raises:
        DemoError: If it is anything else, such as a path or a URL.
    """
    hint = "Give a Hub id such as owner/name; paths and URLs are not accepted."
    if name.count("/") != 1 or len(name) > 96:
        raise DemoError(f"{_shown(name)} is not a Hub id. {hint}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise DemoError(f"{_shown(name)} is not a Hub id. {hint}") from error
    return name


def fetch_model(repo_id: str) -> Path:
    """Fetch the files of a model: safetensors and JSON only, of a supported type, not too large.

    Args:
        repo_id: From `check_repo_id`.

    Returns:
        A folder in the Hub's cache.

    Raises:
        DemoError: If it is not there, not public, not supported or too large.
    """
    revision = _check_sizes(repo_id, _MODEL_FILES, MAX_DOWNLOAD_BYTES, needed="config.json")
    folder = _download(repo_id, revision, ("config.json",))
    _check_model_config(repo_id, _read_json(repo_id, folder / "config.json"))
    folder = _download(repo_id, revision, _MODEL_FILES)
    check_metadata(repo_id, folder)
    return folder


def fetch_posterior(repo_id: str) -> Path:
    """Fetch the two files of a posterior.

    Args:
        repo_id: From `check_repo_id`.

    Returns:
        A folder in the Hub's cache.

    Raises:
        DemoError: If it is not there, not public, no posterior or too large.
    """
    revision = _check_sizes(
        repo_id, _POSTERIOR_FILES, MAX_POSTERIOR_BYTES, needed="posterior_config.json"
    )
    return _download(repo_id, revision, _POSTERIOR_FILES)


def check_metadata(repo_id: str, folder: Path) -> None:
    """Refuse metadata that would make a loader read other files, or take endless memory.

    Args:
        repo_id: For the message.
        folder: With the downloaded files.

    Raises:
        DemoError: Naming the entry.
    """
    for path in sorted(folder.glob("*.json")):
        if path.name in ("tokenizer.json", "vocab.json"):
            continue
        content = _read_json(repo_id, path)
        if path.name == "model.safetensors.index.json":
            shards = content.get("weight_map")
            names = shards.values() if isinstance(shards, dict) else [None]
            if not all(isinstance(name, str) and _SHARD.fullmatch(name) for name in names):
                raise DemoError(f"{repo_id}: {path.name} names files that are no weights.")
        for keys, value in _leaves(content):
            key = keys[-1] if keys else ""
            # An old entry that is not read any more; many models have it.
            named = key.endswith("_file") and key != "special_tokens_map_file"
            if named and isinstance(value, str) and re.search(r"[/\\]|\.\.", value):
                raise DemoError(f"{repo_id}: {path.name} names a file outside of the repository.")
            sized = {"size", "crop_size", "max_image_size", "max_num_patches"} & set(keys)
            if sized and isinstance(value, (int, float)) and value > MAX_INPUT_SIDE:
                raise DemoError(
                    f"{repo_id}: the image size of {path.name} is larger than {MAX_INPUT_SIDE}."
                )


def _check_model_config(repo_id: str, config: dict[str, Any]) -> None:
    """Refuse unsupported and huge models by their configuration, before any weights are fetched."""
    model_type = str(config.get("model_type", ""))
    inner = config.get("vlm_config")
    types = [model_type]
    if model_type == MODEL_TYPE and isinstance(inner, dict):
        types.append(str(inner.get("model_type", "")))
    if not set(types) <= _MODEL_TYPES:
        raise DemoError(
            f"{repo_id} is a model of type {_shown(types[-1])}, which the demo does not support. Use a CLIP, "
            "SigLIP, SigLIP 2, MetaCLIP 2, Chinese-CLIP, AltCLIP or a bundle of hf_bayesvlm."
        )
    for keys, value in _leaves(config):
        if keys and keys[-1].endswith("layers") and isinstance(value, int) and value > _MAX_LAYERS:
            raise DemoError(f"{repo_id} has more than {_MAX_LAYERS} layers.")
    try:
        wrapped = BayesVLMConfig.from_dict(wrap_config_dict(config))
        with torch.device("meta"):
            model = BayesVLMForZeroShot(wrapped)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise DemoError(f"{repo_id}: config.json is not that of a usable model.") from error
    # Buffers too: the configuration says how large the posterior's factors are.
    count = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if count > MAX_PARAMETERS:
        raise DemoError(
            f"{repo_id} has {count / 1e9:.1f} billion parameters; the demo takes up to "
            f"{MAX_PARAMETERS / 1e9:g} billion."
        )


def _check_sizes(repo_id: str, patterns: tuple[str, ...], most: int, needed: str) -> str:
    """Ask the Hub what there is; returns the commit."""
    try:
        info = HfApi().model_info(repo_id, files_metadata=True, token=False)
    except (HfHubHTTPError, OSError) as error:
        raise _hub_error(repo_id, error) from error
    files = [
        file
        for file in info.siblings or []
        if any(
            fnmatch(file.rfilename, pattern) and "/" not in file.rfilename for pattern in patterns
        )
    ]
    names = {file.rfilename for file in files}
    if needed not in names:
        raise DemoError(f"{repo_id} has no {needed}.")
    if not any(name.endswith(".safetensors") for name in names):
        raise DemoError(f"{repo_id} has no safetensors weights; other formats are not loaded.")
    if sum(file.size or 0 for file in files) > most:
        raise DemoError(f"{repo_id} is larger than {most / 2**30:.2g} GB.")
    return info.sha or "main"


def _download(repo_id: str, revision: str, patterns: tuple[str, ...]) -> Path:
    try:
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=list(patterns), token=False
        )
    except (HfHubHTTPError, OSError) as error:
        raise _hub_error(repo_id, error) from error
    return Path(folder)


def _hub_error(repo_id: str, error: Exception) -> DemoError:
    if isinstance(error, GatedRepoError):
        return DemoError(f"{repo_id} is gated: the demo loads public models only.")
    if isinstance(error, RepositoryNotFoundError):
        return DemoError(f"There is no public model {repo_id} on the Hub.")
    return DemoError(f"The Hub cannot be reached for {repo_id}. Try again later.")


def _read_json(repo_id: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DemoError(f"{repo_id}: {path.name} is missing or damaged.") from error
    if not isinstance(content, dict):
        raise DemoError(f"{repo_id}: {path.name} is no JSON object.")
    return content


def _leaves(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*keys, str(key)))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, keys)
    else:
        yield keys, value


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")

"""Files of a posterior: finding, reading and checking them."""

from __future__ import annotations

import json
import os
import pickle
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ._version import __version__
from .fingerprint import tensor_digest
from .hub_errors import HubError
from .kronecker import symmetric_eigvalsh

FORMAT_VERSION = 1
POSTERIOR_CONFIG_NAME = "posterior_config.json"
POSTERIOR_WEIGHTS_NAME = "posterior.safetensors"

CHOICES: dict[str, tuple[str, ...]] = {
    "likelihood": ("softmax", "sigmoid"),
    "covariance": ("diagonal", "full"),
    "damping": ("factored", "exact"),
    "modalities": ("both", "image", "text"),
    "objective": ("reference", "evidence", "manual"),
}


class PosteriorError(ValueError):
    """A posterior's files or values are damaged, or it does not belong to the model."""


def check_config(config: Any) -> None:
    """Refuse a `posterior_config.json` that this version cannot read.

    Args:
        config: Parsed JSON.

    Raises:
        PosteriorError: Naming what is wrong and what to do.
    """
    if not isinstance(config, dict):
        raise PosteriorError(f"a posterior config is a JSON object, not {type(config).__name__}")
    version = config.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise PosteriorError(f"posterior config: format_version must be 1 or more, not {version!r}")
    if version > FORMAT_VERSION:
        raise PosteriorError(
            f"this posterior has format version {version}, this hf_bayesvlm reads up to "
            f"{FORMAT_VERSION}: upgrade with `pip install -U hf_bayesvlm`"
        )
    for name, choices in CHOICES.items():
        if name in config and config[name] not in choices:
            raise PosteriorError(
                f"posterior config: {name} is {config[name]!r}, not one of {', '.join(choices)}"
            )
    if "likelihood" not in config:
        raise PosteriorError("posterior config: likelihood is missing")
    for name in ("image", "text"):
        part = config.get(name)
        if not isinstance(part, dict):
            raise PosteriorError(f"posterior config: the section {name!r} is missing")
        for key in ("features", "in_features", "pseudo_data_count", "prior_precision"):
            value = part.get(key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise PosteriorError(
                    f"posterior config: {name}.{key} must be a positive number, not {value!r}"
                )
            if key.endswith("features") and not isinstance(value, int):
                raise PosteriorError(
                    f"posterior config: {name}.{key} must be a positive whole number, not {value!r}"
                )
        norm = part.get("weight_norm_squared")
        if norm is not None and (isinstance(norm, bool) or not isinstance(norm, (int, float))):
            raise PosteriorError(
                f"posterior config: {name}.weight_norm_squared must be a number, not {norm!r}"
            )
    for name in ("fingerprint", "provenance"):
        if not isinstance(config.get(name) or {}, dict):
            raise PosteriorError(f"posterior config: {name} must be an object")


def hub_id(source: str | os.PathLike[str] | None) -> str | None:
    """What names a model or posterior, if it can be a Hub id; None for a path.

    Args:
        source: As users give it, or as transformers keeps it in `name_or_path`.

    Returns:
        The id, or None for nothing, an existing file or folder, or anything written like a path.
    """
    text = str(source or "")
    written_as_path = Path(text).is_absolute() or text.startswith((".", "~")) or "\\" in text
    if not text or written_as_path or text.count("/") > 1 or Path(text).exists():
        return None
    return text


def read_posterior_files(
    source: str | os.PathLike[str], download: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check the two files of a posterior.

    Args:
        source: Folder or Hub id.
        download: Arguments for `hf_hub_download`, `subfolder` among them.

    Returns:
        The parsed config and the factors.

    Raises:
        FileNotFoundError: If there is no such folder or no posterior in it.
        PosteriorError: If the files are truncated, changed or of a newer format.
    """
    config_file, weights_file = (
        _resolve_file(source, name, download)
        for name in (POSTERIOR_CONFIG_NAME, POSTERIOR_WEIGHTS_NAME)
    )
    config = _read_config(config_file)
    try:
        factors = load_file(str(weights_file))
    except (SafetensorError, OSError) as error:
        raise PosteriorError(
            f"{weights_file} cannot be read ({error}): it is truncated or not a safetensors file; "
            "download or save it again"
        ) from error
    stated = config.get("factors_sha256")
    if stated is not None and stated != tensor_digest(factors):
        raise PosteriorError(
            f"the factors in {weights_file} are not those that {POSTERIOR_CONFIG_NAME} was written "
            "for: one of the files was changed; download or save both again"
        )
    return config, factors


def read_reference_files(
    directory: str | os.PathLike[str],
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Read the factors published with arXiv:2412.06014.

    Args:
        directory: Folder with the four `.pt` files and `prior_precision_analytic.json`.

    Returns:
        `lambda_img`, `n_img`, `lambda_txt` and `n_txt`, and the factors as `image.A` and so on, float32.

    Raises:
        FileNotFoundError: If a file is missing.
        PosteriorError: If a file is damaged.
    """
    folder = Path(directory)
    scalars = _read_reference_scalars(folder / "prior_precision_analytic.json")
    factors = {
        f"{name}.{letter}": _load_reference_factor(folder / f"{letter}_{short}_analytic.pt")
        for name, short in (("image", "img"), ("text", "txt"))
        for letter in ("A", "B")
    }
    return scalars, factors


def library_versions() -> dict[str, str]:
    """Versions of what a posterior depends on."""
    import transformers

    return {
        "hf_bayesvlm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _resolve_file(source: str | os.PathLike[str], filename: str, download: dict[str, Any]) -> Path:
    folder, text = Path(source), str(source)
    if text and folder.is_dir():
        file = folder / (download["subfolder"] or "") / filename
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no posterior: {filename} is missing")
        return file
    if hub_id(text) is None or "/" not in text:
        raise FileNotFoundError(f"no folder {text!r}, and it is not a Hub id of the form user/name")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(hf_hub_download(text, filename, **download))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{text} is no folder, and the Hub cannot be asked for {filename}: {error}"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{text} on the Hub holds no posterior: no {filename}") from error
    except HfHubHTTPError:
        raise
    except HTTPError as error:
        raise HubError(
            f"{text}: the connection to the Hub was lost while loading {filename} "
            f"({type(error).__name__}); try again"
        ) from error


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PosteriorError(f"{file} is not valid JSON ({error}): it is damaged") from error
    check_config(config)
    return config


def _read_reference_scalars(file: Path) -> dict[str, float]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: not a folder of published factors")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return {key: float(values[key]) for key in ("lambda_img", "n_img", "lambda_txt", "n_txt")}
    except (KeyError, TypeError, ValueError) as error:
        raise PosteriorError(f"{file} lacks lambda_img, n_img, lambda_txt or n_txt") from error


def _load_reference_factor(file: Path) -> Tensor:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: not a folder of published factors")
    try:
        value = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The message of torch.load explains how to run such a file; nobody should.
        raise PosteriorError(
            f"{file} is not a plain tensor file: it is damaged, or holds objects that could run code, "
            "which are not loaded"
        ) from error
    except Exception as error:
        raise PosteriorError(
            f"{file} is not a plain tensor file ({error}): it is truncated or damaged, get it again"
        ) from error
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise PosteriorError(f"{file} holds {type(value).__name__}, not a floating-point tensor")
    if value.layout is not torch.strided or value.is_meta:
        raise PosteriorError(f"{file} holds a tensor without dense values, not a factor")
    try:
        symmetric_eigvalsh(value)
    except ValueError as error:
        raise PosteriorError(f"{file}: {error}") from error
    return value.to(torch.float32)

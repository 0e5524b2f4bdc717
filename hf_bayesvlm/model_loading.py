"""Loading a model together with its posterior: from a base and a posterior, or from the posterior alone."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME

from .backbones import inspect_backbone, watch_projections
from .configuration_bayesvlm import BayesVLMConfig
from .hub_errors import HubError
from .posterior import BayesVLMPosterior
from .posterior_files import POSTERIOR_CONFIG_NAME, PosteriorError, hub_id

if TYPE_CHECKING:
    from .modeling_bayesvlm import BayesVLMForZeroShot

# What says how to reach the Hub, and holds for every repository.
_ACCESS = ("token", "cache_dir", "local_files_only", "force_download")
# What says where in one repository.
_PLACE = ("revision", "subfolder")


class ModelLoading:
    """Mix-in of `BayesVLMForZeroShot`: puts posteriors on models while loading."""

    @classmethod
    def from_vlm(
        cls,
        vlm: PreTrainedModel | str | os.PathLike[str],
        posterior: BayesVLMPosterior | str | os.PathLike[str] | None = None,
        *,
        strict_base: bool = True,
        posterior_revision: str | None = None,
        posterior_subfolder: str | None = None,
        **kwargs: Any,
    ) -> BayesVLMForZeroShot:
        """Put a posterior on a vision-language model.

        Args:
            vlm: A loaded model (its weights are shared, its configuration is copied), a folder or a Hub id.
            posterior: A posterior, a folder or a Hub id; None for a model without one.
            strict_base: Refuse a posterior that was estimated for other weights.
            posterior_revision: Branch, tag or commit of the posterior's repository.
            posterior_subfolder: Folder in it.
            **kwargs: For `from_pretrained`, where `vlm` is a folder or id; `token`, `cache_dir`,
                `local_files_only` and `force_download` hold for the posterior too.

        Returns:
            The model; one around a loaded model is in the mode (evaluation or training) that this is in.

        Raises:
            TypeError: If `vlm` is not a transformers model, or is a `BayesVLMForZeroShot` already.
            UnsupportedBackboneError: If the model does not end in two linear maps.
            PosteriorError: If the posterior does not belong to the model.
            OSError: If one of them cannot be found.
        """
        from_name = isinstance(posterior, (str, os.PathLike))
        if not from_name and (posterior_revision or posterior_subfolder):
            raise TypeError(
                "posterior_revision and posterior_subfolder: only for a Hub id or folder"
            )
        access = {name: kwargs[name] for name in _ACCESS if name in kwargs}
        if isinstance(vlm, PreTrainedModel):
            others = kwargs.keys() - (access.keys() if from_name else set())
            if others:
                raise TypeError(f"{', '.join(sorted(others))}: only for a folder or Hub id")
            model = cls._around(vlm)
        elif isinstance(vlm, (str, os.PathLike)):
            model = cls.from_pretrained(vlm, **kwargs)
        else:
            raise TypeError(
                f"vlm must be a transformers model, a folder or a Hub id, not {type(vlm).__name__}"
            )
        if posterior is not None:
            # Not by the posterior's class: remote code has classes of its own.
            if isinstance(posterior, (str, os.PathLike)):
                posterior = BayesVLMPosterior.from_pretrained(
                    posterior,
                    revision=posterior_revision,
                    subfolder=posterior_subfolder,
                    **access,
                )
            fitted = model[0] if isinstance(model, tuple) else model
            fitted.set_posterior(posterior, strict_base=strict_base)
        return model

    @classmethod
    def _around(cls, vlm: PreTrainedModel) -> BayesVLMForZeroShot:
        if hasattr(vlm, "encode_image"):
            raise TypeError("the model is a BayesVLMForZeroShot already: use model.set_posterior()")
        inspect_backbone(vlm)
        config = BayesVLMConfig(vlm_config=copy.deepcopy(vlm.config), dtype=vlm.dtype)
        config._attn_implementation = vlm.config._attn_implementation
        config.name_or_path = vlm.config.name_or_path
        # Built without memory: the weights are those of the model that was passed.
        with torch.device("meta"):
            model: Any = cls(config)  # type: ignore[call-arg]
        model.vlm = vlm
        watch_projections(vlm, model._spec)
        model.training = vlm.training
        return model

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, of safetensors only; a posterior brings its base along.

        Args:
            source: Folder or Hub id of a model or of a posterior.
            *args: As `PreTrainedModel.from_pretrained`.
            **kwargs: As `PreTrainedModel.from_pretrained`.

        Returns:
            The model.

        Raises:
            ValueError: If pickles are to be executed.
            PosteriorError: If a posterior names no base, or does not belong to it.
            OSError: If there is no such repository, it holds no model, or the base cannot be loaded.
        """
        if not kwargs.get("weights_only", True):
            raise ValueError("weights_only=False would execute code from the weights: leave it out")
        if Path(source or "").is_dir():
            posterior = _posterior_at(source, kwargs)
            if posterior is not None:
                return cls._from_posterior(source, posterior, *args, **kwargs)
        try:
            return cls._load(source, *args, **kwargs)
        except OSError as error:
            # Without a connection only what is in the cache counts.
            reached = "does not appear to have a file named" in str(error)
            options = kwargs if reached else kwargs | {"local_files_only": True}
            posterior = _posterior_at(source, options)
            if posterior is None:
                raise
        return cls._from_posterior(source, posterior, *args, **kwargs)

    @classmethod
    def _load(cls, source: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        safe = {"use_safetensors": True, **kwargs}
        try:
            return super().from_pretrained(source, *args, **safe)  # type: ignore[misc]
        except OSError as error:
            if "use_safetensors" in kwargs or not _has_pickled_weights(source, kwargs, error):
                raise
            raise OSError(
                f"{source} has no safetensors weights, and pickled ones are not loaded unasked. Convert it "
                "once with transformers: AutoModel.from_pretrained(...).save_pretrained(folder); or, if you "
                "trust its origin, pass use_safetensors=False"
            ) from error

    @classmethod
    def _from_posterior(
        cls,
        source: str | os.PathLike[str],
        posterior: BayesVLMPosterior,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        base = posterior.base_model
        other = f"BayesVLMForZeroShot.from_vlm(base, posterior={str(source)!r})"
        if not base:
            raise PosteriorError(
                f"{source} is a posterior that does not say which model it is for: load it with {other}"
            )
        if not Path(source).is_dir() and hub_id(base) is None:
            # A stranger's posterior does not choose among the files of this machine.
            raise PosteriorError(
                f"{source} names the folder {base!r} as its base model: load it with {other}"
            )
        kwargs = {name: value for name, value in kwargs.items() if name not in _PLACE}
        if posterior.revision is not None and hub_id(base) is not None:
            kwargs["revision"] = posterior.revision
        where = f"{base}" + (f" (revision {posterior.revision})" if posterior.revision else "")
        try:
            loaded = cls._load(base, *args, **kwargs)
        except OSError as error:
            raise HubError(
                f"{source} is a posterior of {where}, which cannot be loaded: "
                f"{str(error).strip().splitlines()[0]} If you have a copy of it, use {other}"
            ) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.set_posterior(posterior)
        return loaded


def _posterior_at(
    source: str | os.PathLike[str], kwargs: dict[str, Any]
) -> BayesVLMPosterior | None:
    """The posterior at a place that holds no model; None if there is none."""
    if source is None or kwargs.get("config") is not None:
        return None
    options = {name: kwargs[name] for name in (*_ACCESS, *_PLACE) if kwargs.get(name) is not None}
    if Path(source).is_dir():
        folder = Path(source) / (options.get("subfolder") or "")
        found = [(folder / name).exists() for name in (POSTERIOR_CONFIG_NAME, CONFIG_NAME)]
    else:
        found = [_is_on_hub(source, POSTERIOR_CONFIG_NAME, options)]
        found.append(found[0] and _is_on_hub(source, CONFIG_NAME, options))
    return BayesVLMPosterior.from_pretrained(source, **options) if found == [True, False] else None


def _is_on_hub(source: str | os.PathLike[str], name: str, options: dict[str, Any]) -> bool:
    if hub_id(source) is None or "/" not in str(source):
        return False
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    try:
        hf_hub_download(str(source), name, **options)
    except (EntryNotFoundError, HTTPError, OSError, ValueError):
        # What is wrong is in the error that led here.
        return False
    return True


def _has_pickled_weights(
    source: str | os.PathLike[str], kwargs: dict[str, Any], error: OSError
) -> bool:
    subfolder = kwargs.get("subfolder") or ""
    if Path(source).is_dir():
        return any((Path(source) / subfolder).glob("pytorch_model*.bin*"))
    # transformers says so of a repository whose configuration it has read.
    return "cannot be loaded with `safetensors`" in str(error)

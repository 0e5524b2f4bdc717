"""Configuration of a vision-language model with a Laplace posterior."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .posterior_files import CHOICES, check_config, hub_id

MODEL_TYPE = "bayesvlm"


class BayesVLMConfig(PreTrainedConfig):
    """Configuration of `BayesVLMForZeroShot`.

    `config.json` says `"model_type": "bayesvlm"`.  An instance says `"bayesvlm_clip"`,
    `"bayesvlm_siglip"` and so on: the stock zero-shot pipeline looks for "siglip" in the type to choose
    sigmoid scores and 64-token padding.

    Args:
        vlm_config: Configuration of the vision-language model, or its dictionary with a `model_type`.
        posterior: Content of `posterior_config.json`, or None for a model without a posterior.
        modalities: Whose uncertainty counts, `"both"`, `"image"` or `"text"`; None follows the posterior.
        hypothesis_template: Default prompt (or prompts) of our pipeline, with `{}` for the label.
        num_samples: Weight samples for the entropies of our pipeline.

    Raises:
        ValueError: For an unknown base, a damaged or too new posterior, or an impossible option.
    """

    model_type = MODEL_TYPE

    vlm_config: dict[str, Any] | PreTrainedConfig | None = None
    posterior: dict[str, Any] | None = None
    modalities: str | None = None
    hypothesis_template: str | list[str] | None = None
    num_samples: int = 100

    def __post_init__(self, **kwargs: Any) -> None:
        self.vlm_config = _as_config(self.vlm_config)
        if self.posterior is not None:
            check_config(self.posterior)
        self.check_options()
        if not __name__.startswith("transformers_modules"):
            # A bundle may carry its code for those who have not installed the package.  Those who have get
            # the installed classes, without a question of trust.
            for key in ("auto_map", "custom_pipelines"):
                kwargs.pop(key, None)
        super().__post_init__(**kwargs)
        # On the instance: `to_dict`, and so a file, takes the class's.
        vars(self)["model_type"] = f"{MODEL_TYPE}_{self.vlm_config.model_type}"

    def check_options(self) -> None:
        """Refuse impossible options; loading sets some after the configuration is made.

        Raises:
            ValueError: Naming the option.
        """
        if self.modalities not in (None, *CHOICES["modalities"]):
            raise ValueError(
                f"modalities must be None or one of {', '.join(CHOICES['modalities'])}; "
                f"got {self.modalities!r}"
            )
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {self.num_samples}")

    def to_dict(self) -> dict[str, Any]:
        """As `PreTrainedConfig.to_dict`; folders of this machine are not written into a shared file."""
        output = super().to_dict()
        base = output["vlm_config"]
        if isinstance(base, dict) and "_name_or_path" in base:
            base["_name_or_path"] = hub_id(base["_name_or_path"]) or ""
        return output

    @property
    def sub_configs(self) -> dict[str, type[PreTrainedConfig]]:
        """Lets `attn_implementation` and `dtype` reach the base model's configuration."""
        return {"vlm_config": type(_as_config(self.vlm_config))}

    def get_text_config(
        self, decoder: bool | None = None, encoder: bool | None = None
    ) -> PreTrainedConfig:
        """That of the base's text tower."""
        return _as_config(self.vlm_config).get_text_config(decoder=decoder, encoder=encoder)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a `config.json`; that of a plain vision-language model is wrapped.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            **kwargs: As `PreTrainedConfig.get_config_dict`.

        Returns:
            The dictionary of this class and the unused arguments.

        Raises:
            OSError: If there is no `config.json`.
            ValueError: If it is damaged.
        """
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not isinstance(config_dict, dict):
            raise ValueError(
                f"config.json of {pretrained_model_name_or_path} is no JSON object: it is damaged"
            )
        if not config_dict and not (folder / "config.json").exists():
            raise OSError(
                f"{pretrained_model_name_or_path} does not appear to have a file named config.json: it is "
                "no model"
            )
        wrapped = wrap_config_dict(config_dict)
        if wrapped.get("vlm_config") is not None and "vlm_config" not in config_dict:
            # Which base a posterior is estimated for.
            wrapped["vlm_config"]["_name_or_path"] = hub_id(pretrained_model_name_or_path) or ""
        return wrapped, kwargs


def wrap_config_dict(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Turn the dictionary of a plain vision-language model into one of `BayesVLMConfig`.

    Args:
        config_dict: A parsed `config.json`; one of this class is returned as it is.

    Returns:
        A dictionary for `BayesVLMConfig`.
    """
    if str(config_dict.get("model_type", "")).split("_")[0] == MODEL_TYPE:
        # An instance's type names its base; the class attribute is what belongs in a file.
        return {key: value for key, value in config_dict.items() if key != "model_type"}
    wrapped: dict[str, Any] = {"vlm_config": copy.deepcopy(config_dict)}
    for key in ("dtype", "torch_dtype", "_commit_hash"):
        if config_dict.get(key) is not None:
            wrapped[key] = config_dict[key]
    return wrapped


def _as_config(value: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    if value is None:
        value = {"model_type": "clip"}
    model_type = value.get("model_type")
    if not model_type:
        raise ValueError(
            "the configuration names no model_type: it is not that of a transformers model"
        )
    try:
        return AutoConfig.for_model(
            model_type, **{key: item for key, item in value.items() if key != "model_type"}
        )
    except ValueError as error:
        if "Unrecognized model identifier" not in str(error):
            raise
        raise ValueError(
            f"transformers does not know the model type {model_type!r}: check config.json, or upgrade "
            "transformers if the model is newer"
        ) from error

"""Labels as Gaussian embeddings, encoded once and kept."""

from __future__ import annotations

import json
import string
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .cosine import GaussianEmbedding
from .modeling_bayesvlm import BayesVLMForZeroShot
from .predictive import sample_text_directions

logger = logging.get_logger(__name__)

DEFAULT_TEMPLATE = "This is a photo of {}."
# Prompts that are tokenised and encoded at once.
_PROMPT_CHUNK = 256
# SigLIP was trained on texts of exactly this many tokens.
_SIGLIP_TOKENS = 64
_TEXT_SEED = 0


@dataclass
class LabelSet:
    """A set of labels, ready to score images.

    Attributes:
        labels: The labels.
        embedding: One Gaussian embedding a label.
        directions: Joint samples of the labels' directions by number of samples.
    """

    labels: tuple[str, ...]
    embedding: GaussianEmbedding
    directions: dict[int, Tensor] = field(default_factory=dict)

    def sampled_directions(self, model: BayesVLMForZeroShot, num_samples: int) -> Tensor:
        """Joint samples of the directions, `[samples, labels, features]`; the same at every call."""
        directions = self.directions.get(num_samples)
        if directions is None:
            dtype = self.embedding.mean.dtype
            directions = sample_text_directions(
                self.embedding,
                model.covariance("text", dtype),
                model.covariance("image", dtype),
                num_samples,
                generator=torch.Generator().manual_seed(_TEXT_SEED),
            )
            # Only the last: they are as large as samples x labels x features.
            self.directions = {num_samples: directions}
        return directions


class LabelCache:
    """Least-recently-used cache of label sets.

    An entry is found again only for the same labels, templates and tokenizer settings on the same weights,
    posterior, device and dtype.

    Args:
        max_entries: Label sets that are kept.
    """

    def __init__(self, max_entries: int = 16) -> None:
        if max_entries < 1:
            raise ValueError(f"max_entries must be at least 1, not {max_entries}")
        self.max_entries = max_entries
        self._entries: OrderedDict[tuple[Any, ...], LabelSet] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()

    def get(
        self,
        model: BayesVLMForZeroShot,
        tokenizer: Any,
        labels: Sequence[str],
        templates: Sequence[str],
        tokenizer_kwargs: dict[str, Any] | None = None,
    ) -> LabelSet:
        """Return the embedded labels, encoding them if need be.

        Args:
            model: Encodes the prompts.
            tokenizer: Tokenises them.
            labels: From `check_labels`.
            templates: From `check_templates`; several are fused into one embedding a label.
            tokenizer_kwargs: Overrides of the tokenizer's settings.

        Returns:
            The label set.
        """
        settings = tokenizer_settings(model, tokenizer) | dict(tokenizer_kwargs or {})
        key = (
            tuple(labels),
            tuple(templates),
            json.dumps(settings, sort_keys=True, default=str),
            model.device,
            model.dtype,
            model.state_version(),
        )
        # Encoding is inside of the lock: a fast tokenizer cannot serve two threads at once.
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
            entry = LabelSet(
                tuple(labels), encode_labels(model, tokenizer, labels, templates, settings)
            )
            self._entries[key] = entry
            while len(self._entries) > self.max_entries:
                self._entries.popitem(last=False)
            return entry

    def __getstate__(self) -> dict[str, Any]:
        """Without the entries, which belong to this process, and the lock, which cannot be pickled."""
        return {"max_entries": self.max_entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start empty."""
        LabelCache.__init__(self, **state)


def check_labels(labels: str | Iterable[str] | None) -> tuple[str, ...]:
    """Candidate labels as a tuple.

    Args:
        labels: Strings, or one string with commas between the labels.

    Returns:
        The labels, stripped of surrounding space.

    Raises:
        ValueError: If there are none, or one is empty, not a string, or there twice.
    """
    if labels is None:
        raise ValueError("candidate_labels are missing: pass a list such as ['cat', 'dog']")
    items = labels.split(",") if isinstance(labels, str) else list(labels)
    wrong = [item for item in items if not isinstance(item, str)]
    if wrong:
        raise ValueError(
            f"candidate_labels must be strings, not {type(wrong[0]).__name__} ({wrong[0]!r})"
        )
    stripped = tuple(item.strip() for item in items)
    if not stripped or stripped == ("",):
        raise ValueError("candidate_labels are empty: pass at least one label")
    if "" in stripped:
        raise ValueError(f"candidate label number {stripped.index('') + 1} is empty")
    repeated = sorted({label for label in stripped if stripped.count(label) > 1})
    if repeated:
        raise ValueError(
            f"candidate_labels contain {', '.join(map(repr, repeated))} more than once: the probability "
            "of one class would be split between its copies"
        )
    return stripped


def check_templates(templates: str | Iterable[str] | None) -> tuple[str, ...]:
    """Prompt templates as a tuple.

    Args:
        templates: One template or several, each with `{}` for the label; None for the stock prompt.

    Returns:
        The templates.

    Raises:
        ValueError: If there are none, or one has no `{}` or cannot be filled in.
    """
    if templates is None:
        return (DEFAULT_TEMPLATE,)
    items = (templates,) if isinstance(templates, str) else tuple(templates)
    if not items:
        raise ValueError("hypothesis_template is an empty list: pass at least one template")
    for template in items:
        if not isinstance(template, str):
            raise ValueError(f"hypothesis_template must be strings, not {type(template).__name__}")
        try:
            fields = [
                part[1:] for part in string.Formatter().parse(template) if part[1] is not None
            ]
        except ValueError as error:
            raise ValueError(
                f"hypothesis_template {template!r} cannot be filled in ({error}): it takes one {{}}"
            ) from error
        # Anything else could cut a label ({:.1}, {[0]}) without a word.
        if fields not in ([], [("", "", None)]) and set(fields) != {("0", "", None)}:
            raise ValueError(
                f"hypothesis_template {template!r} cannot be filled in: write the label's place as one bare "
                "{}, and other braces twice"
            )
        if not fields:
            raise ValueError(
                f"hypothesis_template {template!r} has no {{}} where the label goes, so that all labels "
                "would read the same"
            )
    return items


def tokenizer_settings(model: BayesVLMForZeroShot, tokenizer: Any) -> dict[str, Any]:
    """How the model's texts are tokenised: cut to what it can read, and padded as in its training."""
    text_config = getattr(model.config.vlm_config, "text_config", None)
    positions = getattr(text_config, "max_position_embeddings", None)
    known = [n for n in (positions, tokenizer.model_max_length) if n is not None and n < 10**6]
    settings: dict[str, Any] = {"padding": True, "truncation": True}
    if known:
        settings["max_length"] = min(known)
    else:
        settings["truncation"] = False
    if "siglip" in model.config.vlm_config.model_type:
        length = min(_SIGLIP_TOKENS, positions or _SIGLIP_TOKENS)
        settings |= {"padding": "max_length", "max_length": length}
    return settings


def encode_labels(
    model: BayesVLMForZeroShot,
    tokenizer: Any,
    labels: Sequence[str],
    templates: Sequence[str],
    settings: dict[str, Any],
) -> GaussianEmbedding:
    """Embed labels in all templates, `[labels]` Gaussian embeddings."""
    prompts = [template.format(label) for label in labels for template in templates]
    _warn_about_prompts(tokenizer, prompts, settings)
    if settings.get("padding") is True and getattr(tokenizer, "pad_token", None) is None:
        chunks = _of_one_length(tokenizer, prompts, settings)
        settings = settings | {"padding": False}
    else:
        chunks = [list(range(len(prompts)))]
    rows: list[int] = []
    parts: list[GaussianEmbedding] = []
    for indices in chunks:
        for start in range(0, len(indices), _PROMPT_CHUNK):
            chunk = indices[start : start + _PROMPT_CHUNK]
            texts = [prompts[i] for i in chunk]
            tokens = tokenizer(texts, return_tensors="pt", **settings).to(model.device)
            parts.append(model.encode_text(**tokens))
            rows += chunk
    embedding = GaussianEmbedding.cat(parts)
    if rows != sorted(rows):
        embedding = embedding[torch.tensor(rows).argsort().to(embedding.mean.device)]
    return model.fuse_templates(embedding, len(templates))


def _of_one_length(tokenizer: Any, prompts: list[str], settings: dict[str, Any]) -> list[list[int]]:
    """Indices of the prompts with the same number of tokens: they need no padding token."""
    tokens = tokenizer(prompts, **(settings | {"padding": False}))["input_ids"]
    groups: dict[int, list[int]] = {}
    for index, ids in enumerate(tokens):
        groups.setdefault(len(ids), []).append(index)
    return list(groups.values())


def _warn_about_prompts(tokenizer: Any, prompts: list[str], settings: dict[str, Any]) -> None:
    """Point out prompts that read the same to the model, and prompts that are cut."""
    tokens = tokenizer(prompts, verbose=False)["input_ids"]
    limit = settings.get("max_length") if settings.get("truncation") else None
    # The last token of a cut text is the end token again.
    read = [
        tuple(ids if limit is None or len(ids) <= limit else ids[: limit - 1]) for ids in tokens
    ]
    first: dict[tuple[int, ...], str] = {}
    for prompt, ids in zip(prompts, read, strict=True):
        if first.setdefault(ids, prompt) != prompt:
            logger.warning(
                f"The model cannot tell {first[ids][:80]!r} from {prompt[:80]!r}: they are the same tokens, "
                "and share the probability of one label"
            )
            break
    if limit is None:
        return
    cut = [prompt for prompt, ids in zip(prompts, tokens, strict=True) if len(ids) > limit]
    if cut:
        logger.warning(
            f"{len(cut)} of {len(prompts)} prompts are longer than the {limit} tokens the model reads and "
            f"are cut; the first is {cut[0][:80]!r}"
        )

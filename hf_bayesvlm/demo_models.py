"""The demo's models: loaded once, shared by all visitors, with as many posteriors as are asked for."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoTokenizer

from .demo_hub import DemoError, check_repo_id, fetch_model, fetch_posterior
from .demo_scoring import Variant
from .embedded import EMBEDDED_MODEL
from .modeling_bayesvlm import BayesVLMForZeroShot
from .pipeline import BayesVLMZeroShotImageClassificationPipeline
from .posterior import BayesVLMPosterior
from .posterior_files import PosteriorError

EMBEDDED_NAME = "embedded emoji model"
OWN_POSTERIOR = "the model's own"
_MAX_VARIANTS = 8
_LABEL_SETS = 32


@dataclass(frozen=True)
class Hyperparameters:
    """Changes to a posterior's hyperparameters; None leaves one as it is.

    Attributes:
        pseudo_data_count: For both projections.
        covariance: `"diagonal"` or `"full"`.
        damping: `"factored"` or `"exact"`.
        modalities: `"both"`, `"image"` or `"text"`.
        objective: `"reference"` or `"evidence"`, to choose the prior precisions again.
    """

    pseudo_data_count: float | None = None
    covariance: str | None = None
    damping: str | None = None
    modalities: str | None = None
    objective: str | None = None

    def changes(self) -> dict[str, Any]:
        """What differs from the posterior, as arguments of `with_hyperparameters`."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


class LoadedModel:
    """A base model with its pipeline and the posteriors that were put on it.

    Attributes:
        name: What the visitor called it.
        pipe: Around the model as it was loaded.
        plain: Without a posterior; shares the base.
    """

    def __init__(self, name: str, pipe: BayesVLMZeroShotImageClassificationPipeline) -> None:
        self.name = name
        self.pipe = pipe
        self.plain = BayesVLMForZeroShot.from_vlm(pipe.bayes_model.vlm)
        self._variants: OrderedDict[tuple[Any, ...], BayesVLMForZeroShot] = OrderedDict()
        self._lock = threading.Lock()

    def variant(
        self, key: tuple[Any, ...], posterior: Callable[[], BayesVLMPosterior]
    ) -> BayesVLMForZeroShot:
        """The base with a posterior, made once for every key.

        Args:
            key: Names the posterior and its hyperparameters.
            posterior: Gives the posterior, where it is not there yet.

        Returns:
            A model that shares the base.

        Raises:
            PosteriorError: If the posterior does not belong to the model.
        """
        with self._lock:
            model = self._variants.get(key)
            if model is None:
                model = BayesVLMForZeroShot.from_vlm(self.pipe.bayes_model.vlm)
                model.config.modalities = self.pipe.bayes_model.config.modalities
                model.config.num_samples = self.pipe.bayes_model.config.num_samples
                model.set_posterior(posterior())
                self._variants[key] = model
                while len(self._variants) > _MAX_VARIANTS:
                    self._variants.popitem(last=False)
            self._variants.move_to_end(key)
            return model


class ModelStore:
    """What visitors may choose from.

    Args:
        models: Name -> folder or Hub id, of the operator; the first is the default.  They are trusted as far
            as any other argument of `from_pretrained` is: safetensors and no remote code.
        posteriors: Name -> folder or Hub id, of the operator.
        allow_hub: Let visitors name any public Hub id.
        max_loaded: Visitors' models that are kept in memory; the operator's always are.
        device: As for `pipeline`.

    Raises:
        ValueError: Without models.
    """

    def __init__(
        self,
        models: Mapping[str, str | Path] | None = None,
        posteriors: Mapping[str, str | Path] | None = None,
        *,
        allow_hub: bool = True,
        max_loaded: int = 2,
        device: str | None = None,
    ) -> None:
        self.models = {EMBEDDED_NAME: EMBEDDED_MODEL} if models is None else dict(models)
        if not self.models:
            raise ValueError("models is empty: name at least one model")
        self.posteriors = dict(posteriors or {})
        self.allow_hub = allow_hub
        self.max_loaded = max_loaded
        self.device = device
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()
        self._lock = threading.Lock()
        # Loading takes memory and time: one at a time, while the others go on being used.
        self._loading = threading.Lock()

    @property
    def default_model(self) -> str:
        """Name of the first model."""
        return next(iter(self.models))

    def load(self, name: str | None = None) -> LoadedModel:
        """A model, loaded if need be.

        Args:
            name: One of the operator's names, or a Hub id where these are allowed; None for the default.

        Returns:
            The model.

        Raises:
            DemoError: If it cannot be had; the message is for the visitor.
        """
        name = (name or "").strip() or self.default_model
        found = self._find(name)
        if found is not None:
            return found
        if name not in self.models:
            self._check_visitor_id(name, "model")
        with self._loading:
            found = self._find(name)
            if found is not None:
                return found
            if name in self.models:
                model = self._open(name, self.models[name], trusted=True)
            else:
                model = self._open(name, fetch_model(name), trusted=False)
            with self._lock:
                self._loaded[name] = model
                foreign = [key for key in self._loaded if key not in self.models]
                for key in foreign[: max(0, len(foreign) - self.max_loaded)]:
                    del self._loaded[key]
            return model

    def variants(
        self,
        loaded: LoadedModel,
        posterior: str | None = None,
        second: tuple[str | None, Hyperparameters] | None = None,
    ) -> list[Variant]:
        """The ways to score that a visitor asked for.

        Args:
            loaded: From `load`.
            posterior: A name of the operator's, a Hub id, or None for the model's own.
            second: Posterior and hyperparameters of one more.

        Returns:
            Plain, Bayesian, and the second posterior if asked for.

        Raises:
            DemoError: If a posterior cannot be had or does not belong to the model.
        """
        first = self._variant(loaded, posterior, Hyperparameters())
        result = [
            Variant("Plain model", "one set of weights, no uncertainty", loaded.plain),
            Variant("Bayesian", _describe(first), first),
        ]
        if second is not None:
            model = self._variant(loaded, second[0] or posterior, second[1])
            if not model.is_fitted:
                raise DemoError(
                    f"{loaded.name} has no posterior of its own: name one to compare with."
                )
            result.append(Variant("Second posterior", _describe(model), model))
        return result

    def _variant(
        self, loaded: LoadedModel, posterior: str | None, hyperparameters: Hyperparameters
    ) -> BayesVLMForZeroShot:
        name = (posterior or "").strip()
        name = "" if name == OWN_POSTERIOR else name
        changes = hyperparameters.changes()
        own = loaded.pipe.bayes_model
        if not name and not (changes and own.is_fitted):
            return own
        count = changes.get("pseudo_data_count", 1.0)
        number = isinstance(count, (int, float)) and math.isfinite(count)
        if not number or not 1e-3 <= count <= 1e6:
            raise DemoError("The pseudo-data count must be from 0.001 to 1,000,000.")
        if name and name not in self.posteriors:
            self._check_visitor_id(name, "posterior")

        def make() -> BayesVLMPosterior:
            chosen = self._read_posterior(name) if name else cast(BayesVLMPosterior, own.posterior)
            return chosen.with_hyperparameters(**changes)

        try:
            return loaded.variant((name, *sorted(changes.items())), make)
        except PosteriorError as error:
            raise DemoError(_sentence(error)) from error

    def _read_posterior(self, name: str) -> BayesVLMPosterior:
        if name in self.posteriors:
            return BayesVLMPosterior.from_pretrained(self.posteriors[name])
        folder = fetch_posterior(name)
        try:
            return BayesVLMPosterior.from_pretrained(folder)
        except (PosteriorError, OSError) as error:
            raise DemoError(_sentence(error).replace(str(folder), name)) from error

    def _check_visitor_id(self, name: str, what: str) -> None:
        if not self.allow_hub:
            raise DemoError(f"This demo does not load other {what}s: choose one from the list.")
        check_repo_id(name)

    def _find(self, name: str) -> LoadedModel | None:
        with self._lock:
            model = self._loaded.get(name)
            if model is not None:
                self._loaded.move_to_end(name)
            return model

    def _open(self, name: str, source: str | Path, *, trusted: bool) -> LoadedModel:
        options: dict[str, Any] = {"trust_remote_code": False}
        if not trusted:
            # It lies in the cache by now; nothing may be fetched with the operator's token.
            options |= {"local_files_only": True, "token": False}
        try:
            model = BayesVLMForZeroShot.from_vlm(source, use_safetensors=True, **options)
            pipe = BayesVLMZeroShotImageClassificationPipeline(
                model=model,
                tokenizer=AutoTokenizer.from_pretrained(source, **options),
                image_processor=AutoImageProcessor.from_pretrained(source, **options),
                device=self.device,
                label_cache_size=_LABEL_SETS,
            )
        except (
            ValueError,
            OSError,
            ImportError,
            RuntimeError,
            TypeError,
            KeyError,
            AttributeError,
            SafetensorError,
        ) as error:
            if trusted:
                raise
            # The error's text may name files of the server.
            raise DemoError(
                f"{name} cannot be loaded as a CLIP- or SigLIP-like model: its files are incomplete, damaged "
                "or of a kind that is not supported."
            ) from error
        return LoadedModel(name, pipe)


def _describe(model: BayesVLMForZeroShot) -> str:
    config = model.config.posterior
    if config is None:
        return "no posterior: the same as plain"
    counts = {config[part]["pseudo_data_count"] for part in ("image", "text")}
    count = " / ".join(f"{value:g}" for value in sorted(counts))
    unsure = {"both": "both towers", "image": "image tower", "text": "text tower"}[model.modalities]
    return f"{unsure}, {config['covariance']}, {config['damping']} damping, pseudo-data × {count}"


def _sentence(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text[:1].upper() + text[1:]

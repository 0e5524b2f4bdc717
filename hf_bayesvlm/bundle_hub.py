"""Saving and sharing a bundle: weights, posterior, processor, card and code."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, ModelCardData
from safetensors import SafetensorError, safe_open

from .bundle_code import code_files, is_remote_code, with_code
from .configuration_bayesvlm import MODEL_TYPE
from .hub_errors import HubError
from .hub_push import CARD_NAME, push_files
from .posterior_files import POSTERIOR_CONFIG_NAME, POSTERIOR_WEIGHTS_NAME, hub_id

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
_IMAGES = {"preprocessor_config.json", "processor_config.json"}
# Named one by one: whatever else lies in the folder, a trainer's pickles or notes, is nobody's business.
_FILES = {
    *("config.json", POSTERIOR_CONFIG_NAME, POSTERIOR_WEIGHTS_NAME),
    *_TOKENIZER,
    *_IMAGES,
    *("vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
}
_ENDINGS = {".model", ".jinja"}


class BundleHub:
    """Mix-in of `BayesVLMForZeroShot`: saving with code, and publishing."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        include_code: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save weights, posterior and configuration; the processor is saved with its own method.

        Args:
            save_directory: Folder, made if needed.
            *args: As `PreTrainedModel.save_pretrained`.
            include_code: Add the modules with which transformers can load the bundle where this package is
                not installed (`trust_remote_code=True`).  By default only if the model itself was loaded so.
            **kwargs: As `PreTrainedModel.save_pretrained`.
        """
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if is_remote_code() if include_code is None else include_code:
            folder = Path(save_directory)
            for name, file in code_files().items():
                shutil.copyfile(file, folder / name)
            config = folder / "config.json"
            config.write_text(with_code(config.read_text(encoding="utf-8")), encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        processor: Any = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload model",
        exist_ok: bool = True,
        include_code: bool = True,
        max_shard_size: int | str = "50GB",
    ) -> CommitInfo:
        """Publish the whole bundle in a model repository on the Hub, in one commit.

        Weights with the posterior, configuration, processor, the code with which transformers can load it
        where this package is not installed and, if the repository has no card, a `README.md`.  What is there
        already is not uploaded again; if that is all, no commit is made.

        Args:
            repo_id: `user/name`; made if it does not exist.
            processor: Tokenizer and image processor in one, as from `AutoProcessor.from_pretrained`; needed
                unless the repository has them.
            private: Make a new repository private.
            token: Hub token, or None for the one of `hf auth login`.
            revision: Branch to commit to, made if it does not exist.
            create_pr: Open a pull request instead of committing.
            commit_message: Title of the commit.
            exist_ok: Push to a repository that exists.
            include_code: Publish the code too.
            max_shard_size: Split larger weights into several files.

        Returns:
            The commit; as a string, its URL.

        Raises:
            HubError: Without a processor, a token or the right, on a full account, when names or visibility
                clash, and when the Hub or the network fails.  Nothing has been published then.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_code=False, max_shard_size=max_shard_size)
            if processor is not None:
                processor.save_pretrained(folder)
            return push_bundle_folder(
                folder,
                repo_id,
                include_code=include_code,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                exist_ok=exist_ok,
            )


def push_bundle_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    include_code: bool = True,
    commit_message: str = "Upload model",
    **options: Any,
) -> CommitInfo:
    """Publish a saved bundle, and its `README.md` if it has one.

    Only files that a bundle consists of are published, nothing else that lies in the folder.

    Args:
        folder: As written by `save_pretrained` of model and processor.
        repo_id: `user/name`.
        include_code: Publish the code too.
        commit_message: Title of the commit.
        **options: Further options of `push_to_hub`.

    Returns:
        The commit.

    Raises:
        FileNotFoundError: If the folder holds no bundle.
        HubError: As `BayesVLMForZeroShot.push_to_hub`.
    """
    source = Path(folder)
    files = bundle_files(source)
    card = source / CARD_NAME
    text = (source / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    if include_code:
        files |= code_files()
        files["config.json"] = with_code(text).encode()

    def check_processor(present: set[str]) -> None:
        there = present | files.keys()
        if not (there & _TOKENIZER and there & _IMAGES):
            missing = "image processor" if there & _TOKENIZER else "tokenizer"
            raise HubError(
                f"{repo_id} would have no {missing}, and no pipeline could load it: pass "
                "processor=AutoProcessor.from_pretrained(...) of the base model, or save it into the folder"
            )

    return push_files(
        repo_id,
        files,
        card=card.read_text(encoding="utf-8") if card.is_file() else bundle_card(config),
        commit_message=commit_message,
        required=check_processor,
        # Weights of an earlier push, split otherwise, would be found first.
        outdated=lambda path: bool(_WEIGHTS.fullmatch(path)),
        **options,
    )


def bundle_files(folder: Path) -> dict[str, Path | bytes]:
    """What belongs to a saved bundle, without its card.

    Args:
        folder: As written by `save_pretrained` of model and processor.

    Returns:
        File names and files.

    Raises:
        FileNotFoundError: If configuration or weights are missing.
    """
    found: dict[str, Path | bytes] = {}
    wanted = _FILES | code_files().keys()
    for file in sorted(folder.glob("*")):
        known = file.name in wanted or file.suffix in _ENDINGS or _WEIGHTS.fullmatch(file.name)
        if file.is_file() and known:
            found[file.name] = file
    if "config.json" not in found or not any(_WEIGHTS.fullmatch(name) for name in found):
        raise FileNotFoundError(
            f"{folder} holds no bundle: config.json or model.safetensors is missing; write both with "
            "model.save_pretrained()"
        )
    return found


def check_bundle_folder(folder: Path) -> None:
    """Refuse a folder that others could not load as a bundle.

    Args:
        folder: As written by `save_pretrained`.

    Raises:
        FileNotFoundError: If configuration or weights are missing.
        ValueError: If it is another model, or damaged.
    """
    names = bundle_files(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not valid JSON: it is damaged") from error
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{folder} is another model, not a bundle: load it with BayesVLMForZeroShot.from_pretrained(), "
            "put a posterior on it and save that"
        )
    tensors: set[str] = set()
    for name in names:
        if name.endswith(".safetensors") and _WEIGHTS.fullmatch(name):
            try:
                with safe_open(folder / name, framework="pt") as file:
                    tensors.update(file.keys())
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{folder / name} cannot be read ({error}): it is truncated or damaged; save it again"
                ) from error
    if config.get("posterior") and not any(tensor.startswith("factors.") for tensor in tensors):
        raise ValueError(
            f"{folder}: config.json announces a posterior that the weights lack; save the model again"
        )


def bundle_card(config: dict[str, Any]) -> str:
    """A minimal card for a bundle.

    Args:
        config: Its `config.json`.

    Returns:
        Text of a `README.md`.
    """
    posterior = config.get("posterior") or {}
    known = (config.get("vlm_config") or {}).get("_name_or_path") or posterior.get("base_model")
    base = hub_id(known)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        base_model=base,
        tags=["bayesvlm", "uncertainty", "laplace"],
    )
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {base or 'A vision-language model'} with uncertainty\n\n"
        "A vision-language model with a Laplace posterior over its final projections, after "
        "[arXiv:2412.06014](https://arxiv.org/abs/2412.06014), for use with `hf_bayesvlm` or, with "
        "`trust_remote_code=True`, with transformers alone.\n"
    )

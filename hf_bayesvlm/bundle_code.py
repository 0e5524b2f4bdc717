"""The code that a bundle carries for those who have not installed the package."""

from __future__ import annotations

import ast
import json
from pathlib import Path

_ENTRY = "remote_code"
_MODEL = f"{_ENTRY}.BayesVLMForZeroShot"
_PIPELINE = f"{_ENTRY}.BayesVLMZeroShotImageClassificationPipeline"
_AUTO_MODEL = "AutoModelForZeroShotImageClassification"
CONFIG_KEYS = {
    "auto_map": {
        "AutoConfig": f"{_ENTRY}.BayesVLMConfig",
        "AutoModel": _MODEL,
        _AUTO_MODEL: _MODEL,
    },
    # A task name of its own: under a stock one, transformers would demand trust of those too who have
    # installed the package.
    "custom_pipelines": {
        "bayesvlm-zero-shot-image-classification": {
            "impl": _PIPELINE,
            "pt": [_AUTO_MODEL],
            "type": "multimodal",
        }
    },
}


def is_remote_code() -> bool:
    """Whether this is the code of a bundle, and not the installed package."""
    return __name__.startswith("transformers_modules.")


def code_files(folder: Path | None = None) -> dict[str, Path]:
    """The modules that a bundle needs: `remote_code.py` and all that it imports, directly or not.

    Args:
        folder: Where they are; by default where this module is.

    Returns:
        File names and files.

    Raises:
        FileNotFoundError: If one is missing.
    """
    folder = Path(__file__).parent if folder is None else folder
    found: dict[str, Path] = {}
    waiting = [_ENTRY]
    while waiting:
        file = folder / f"{waiting.pop()}.py"
        if file.name in found:
            continue
        if not file.is_file():
            raise FileNotFoundError(
                f"{file.name} is not in {folder}: the code of the bundle is incomplete; load it again, or "
                "install hf_bayesvlm"
            )
        found[file.name] = file
        waiting += _relative_imports(file)
    return found


def with_code(config: str) -> str:
    """The text of a `config.json` that tells transformers about the code beside it.

    Args:
        config: Text of a bundle's `config.json`.

    Returns:
        The same with `auto_map` and `custom_pipelines`.
    """
    return json.dumps(json.loads(config) | CONFIG_KEYS, indent=2, sort_keys=True) + "\n"


def _relative_imports(file: Path) -> list[str]:
    return [
        node.module
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level and node.module
    ]

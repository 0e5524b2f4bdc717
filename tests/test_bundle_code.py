"""The code that a bundle carries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

import hf_bayesvlm
from hf_bayesvlm.bundle_code import CONFIG_KEYS, code_files, is_remote_code, with_code
from hf_bayesvlm.pipeline import TASK

PACKAGE = Path(hf_bayesvlm.__file__).parent


def test_the_code_is_what_transformers_would_look_for() -> None:
    entry = PACKAGE / "remote_code.py"
    expected = {entry, *map(Path, get_relative_import_files(entry))}
    assert set(code_files().values()) == expected
    assert not is_remote_code()


def test_commands_and_estimation_stay_at_home() -> None:
    names = code_files().keys()
    assert {"remote_code.py", "modeling_bayesvlm.py", "pipeline.py", "cosine.py"} <= names
    assert not [name for name in names if name.startswith(("cli", "estimation", "plotting"))]


def test_missing_code_is_an_error(tmp_path: Path) -> None:
    for name, file in code_files().items():
        if name != "kronecker.py":
            shutil.copyfile(file, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="kronecker"):
        code_files(tmp_path)


def test_the_config_names_classes_that_exist() -> None:
    from hf_bayesvlm import remote_code

    classes = [*CONFIG_KEYS["auto_map"].values()]
    classes += [task["impl"] for task in CONFIG_KEYS["custom_pipelines"].values()]  # type: ignore[index]
    for name in classes:
        module, _, attribute = name.partition(".")  # type: ignore[union-attr]
        assert module == "remote_code"
        assert hasattr(remote_code, attribute)
    assert list(CONFIG_KEYS["custom_pipelines"]) == [TASK]


def test_the_rest_of_a_config_is_kept() -> None:
    config = {"model_type": "bayesvlm", "x": [1], "auto_map": {"AutoConfig": "a/b--old.Config"}}
    assert json.loads(with_code(json.dumps(config))) == config | CONFIG_KEYS

"""Rules about the modules that hold for all of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hf_bayesvlm

PACKAGE = Path(hf_bayesvlm.__file__).parent
MODULES = sorted(PACKAGE.glob("*.py"))
NUMERICS = {"curvature", "kronecker", "laplace", "cosine", "predictive", "acquisition", "metrics"}
# What may import what: a module sees its own row and the rows above it.
ROWS = [
    {"_version", *NUMERICS},
    {
        "fingerprint",
        "hub_errors",
        "hub_push",
        "posterior_files",
        "posterior_modality",
        "posterior_hub",
        "posterior",
    },
    {
        "configuration_bayesvlm",
        "backbones",
        "base_access",
        "base_check",
        "bundle_code",
        "bundle_hub",
        "model_loading",
        "posterior_buffers",
        "tower_inputs",
        "outputs",
        "modeling_bayesvlm",
    },
    {
        "images",
        "label_cache",
        "pipeline",
        "estimation",
        "registration",
        "pairs",
        "slots",
        "sources",
        "pair_embedding",
        "pair_blocks",
        "block_fold",
        "distributed",
        "checkpoint",
        "estimation_identity",
        "embedded",
        "plotting",
        "features",
        "tuning",
        "tuning_grid",
        "tuning_result",
        "plotting_tuning",
        "remote_code",
    },
    {"demo_images", "demo_scoring", "demo_figures", "demo_hub", "demo_models", "demo_service"},
    {"demo_style", "demo_server", "demo_handlers", "demo_page", "demo"},
    # With every `cli_*`.
    {"cli", "__init__"},
]


def imports(path: Path) -> list[tuple[int, str]]:
    """Level and module of every import."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
        elif isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
    return found


def row_of(module: str) -> int:
    if module.startswith("cli_"):
        return len(ROWS) - 1
    return next(i for i, row in enumerate(ROWS) if module in row)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_are_flat_and_point_one_way(path: Path) -> None:
    for level, module in imports(path):
        if level == 0:
            assert not module.startswith("hf_bayesvlm"), "remote code has another package name"
            continue
        # `from . import x` and `from .a.b import x` do not survive as remote code.
        assert level == 1
        assert module
        assert "." not in module
        assert row_of(module) <= row_of(path.stem)


@pytest.mark.parametrize("name", sorted(NUMERICS))
def test_numerics_need_torch_only(name: str) -> None:
    outside = {
        module.split(".")[0] for level, module in imports(PACKAGE / f"{name}.py") if level == 0
    }
    standard = {"__future__", "math", "dataclasses", "typing", "collections"}
    assert outside <= standard | {"torch"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 480

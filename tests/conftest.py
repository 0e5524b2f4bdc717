"""Fixtures shared by the test modules."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import HubDouble

# Read when Gradio is imported; servers that tests start inherit it.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

_ROOT = Path(__file__).resolve().parents[1]
_PUBLISHED = _ROOT.parent / "shared" / "reference" / "clip-vit-b-32-laion2b"


@pytest.fixture(autouse=True)
def _no_accelerator_left() -> Iterator[None]:
    """An `Accelerator` is global to a process: the next test must be able to make another one."""
    yield
    if "accelerate.state" in sys.modules:
        AcceleratorState = sys.modules["accelerate.state"].AcceleratorState
        if AcceleratorState._shared_state:
            AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded source of randomness of the test's own."""
    return torch.Generator().manual_seed(20240612)


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Directory of the posterior published by the paper's authors."""
    override = os.environ.get("BAYESVLM_REFERENCE_DIR")
    directory = Path(override) if override else _PUBLISHED
    if not (directory / "A_img_analytic.pt").is_file():
        pytest.skip(f"no published posterior in {directory}: set BAYESVLM_REFERENCE_DIR")
    return directory


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubDouble]:
    """A Hub of the test's own, empty, with the users of `hub_store`."""
    double = HubDouble(tmp_path)
    yield double
    double.close()

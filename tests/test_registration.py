"""What importing the package does to a fresh interpreter: register, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import tiny
from transformers import AutoModelForZeroShotImageClassification
from transformers.pipelines import PIPELINE_REGISTRY

import hf_bayesvlm
from hf_bayesvlm.registration import TASK, register

STATE = """
import json, logging, random, sys, warnings
import numpy, torch, transformers
from transformers.utils import logging as hf_logging

def state():
    loggers = {name: (value.level, value.propagate, len(value.handlers), value.disabled)
               for name, value in logging.root.manager.loggerDict.items()
               if isinstance(value, logging.Logger) and not name.startswith("hf_bayesvlm")
               and value.level}
    return {
        "root": (logging.root.level, len(logging.root.handlers)),
        "hf": hf_logging.get_verbosity(),
        "loggers": loggers,
        "filters": [str(f) for f in warnings.filters],
        "random": hash(random.getstate()),
        "numpy": numpy.random.get_state()[1].tolist(),
        "torch": torch.random.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "dtype": str(torch.get_default_dtype()),
    }
"""


def run(code: str, *arguments: str) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_changes_nothing_but_the_registry():
    # Everything the package imports is imported before: it is the package that is looked at.
    code = (
        STATE
        + """
import accelerate, datasets, evaluate, safetensors.torch, torch.utils.data
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, Pipeline
from transformers import initialization, pipelines
from transformers.modeling_utils import PreTrainedModel
before = state()
import hf_bayesvlm
after = state()
assert before == after, {k: (before[k], after[k]) for k in before if before[k] != after[k]}
"""
    )
    assert run(code) == ""


def test_import_prints_nothing():
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:hf_bayesvlm", "-c", "import hf_bayesvlm"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert done.stdout == done.stderr == ""


def test_registering_again_is_harmless():
    before = PIPELINE_REGISTRY.supported_tasks[TASK]
    register()
    register()
    assert PIPELINE_REGISTRY.supported_tasks[TASK] is before
    assert (
        AutoModelForZeroShotImageClassification._model_mapping[hf_bayesvlm.BayesVLMConfig]
        is hf_bayesvlm.BayesVLMForZeroShot
    )


def test_both_tasks_in_a_fresh_interpreter(tmp_path):
    tiny.save_bundle(tiny.fitted("clip"), tmp_path)
    code = """
import json, sys
from PIL import Image
from transformers import pipeline
import hf_bayesvlm
image = Image.new("RGB", (40, 30), (200, 30, 30))
for task in ("zero-shot-image-classification", "bayesvlm-zero-shot-image-classification"):
    pipe = pipeline(task, model=sys.argv[1])
    assert type(pipe.model) is hf_bayesvlm.BayesVLMForZeroShot
    print(json.dumps([type(pipe).__name__, pipe(image, candidate_labels=["cat", "dog"])]))
"""
    rows = [json.loads(line) for line in run(code, str(tmp_path)).splitlines()]
    assert [row[0] for row in rows] == [
        "ZeroShotImageClassificationPipeline",
        "BayesVLMZeroShotImageClassificationPipeline",
    ]
    stock, ours = ({entry["label"]: entry["score"] for entry in row[1]} for row in rows)
    assert stock.keys() == ours.keys() == {"cat", "dog"}
    assert abs(stock["cat"] - ours["cat"]) < 1e-5


def test_importing_leaves_data_sets_and_plots_alone() -> None:
    code = (
        "import sys, hf_bayesvlm; heavy = {'datasets', 'matplotlib', 'gradio'}; "
        "print(sorted(heavy & set(sys.modules)), hf_bayesvlm.open_dataset.__name__, "
        "'estimate_posterior' in dir(hf_bayesvlm))"
    )
    assert run(code).split() == ["[]", "open_dataset", "True"]

"""Card of the embedded model, filled in from its evaluation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

_METHODS = {
    "map": "MAP (plain softmax)",
    "temperature": "temperature scaling",
    "bayes": "**Bayesian**",
}
_TASKS = {"full": "all names", "names-105": "about 105 names", "coarse": "18 everyday words"}

_TEXT = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
license: cc-by-sa-4.0
tags:
- bayesvlm
- uncertainty
- calibration
- clip
- laplace
datasets:
- emoji-styles
metrics:
- accuracy
model-index:
- name: emoji-styles-clip
  results:
{index}
---

# EmojiStyles CLIP with a Laplace posterior

A CLIP of {parameters:.1f} million parameters, trained from scratch on emoji drawn by five artists, with a
Laplace posterior over its two final projections ([arXiv:2412.06014](https://arxiv.org/abs/2412.06014)).
It ships inside of the `hf_bayesvlm` package so that uncertainty-aware zero-shot classification can be
tried, tested and studied without a download. It knows emoji and nothing else: **do not use it on photos**.

## Use

```python
import hf_bayesvlm
from transformers import pipeline

pipe = pipeline("bayesvlm-zero-shot-image-classification", model=hf_bayesvlm.EMBEDDED_MODEL)
image = hf_bayesvlm.sample_images()[0].path
pipe(image, candidate_labels=["dog face", "pizza", "rocket"], return_uncertainty=True)
```

The stock task `zero-shot-image-classification` works as well; its scores are the predictive probabilities.

## How it was made

* **Data**: EmojiStyles (`scripts/build_emoji_styles.py`). Five styles for training (Noto, Noto v1, Twemoji,
  EmojiOne, FxEmoji), OpenMoji and a held-out part of the training styles for validation, Fluent Emoji Flat
  and Fluent Emoji High Contrast for testing. A tenth of the concepts is held out of training in every style.
* **Training**: `scripts/train_emoji_clip.py`, {steps} steps in {minutes:.0f} minutes on {device}.
* **Posterior**: `scripts/build_embedded_model.py`, from {num_pairs} training pairs in one block. Of {tried}
  combinations the one with the lowest validation NLPD among those that keep the plain model's accuracy was
  taken; test styles were not looked at.

| hyperparameter | value |
|---|---|
| pseudo-data count | {pseudo_data_count:g} |
| objective of the prior precision | {objective} |
| prior precision (image / text) | {image_prior_precision:.4g} / {text_prior_precision:.4g} |
| covariance | {covariance} |
| damping | {damping} |
| modalities whose uncertainty counts | {modalities} |

## Results

Zero-shot with the stock prompt "This is a photo of {{}}.". NLPD in nats, ECE with 20 equal-width bins, all on
the images named; ± is one standard error of the accuracy over images. Temperature scaling uses the labels
of the validation split (temperature {temperature:.3f}), as the choice of the posterior's hyperparameters does.

### Test: styles never seen in training

{test}

### Validation

{validation}

Held-out rows are concepts that were in no training style; their candidates are the held-out names only.

## Limits

* Drawings of 64 x 64 pixels on plain backgrounds; anything else is out of distribution, and the variance
  of a last-layer posterior says little about that.
* OpenMoji, a black-outlined style, and Fluent High Contrast, a black-and-white one, are hard for it: see above.
* One training run with one seed.

## Licence

The weights were trained on drawings under Apache-2.0 (Noto, FxEmoji), CC BY 4.0 (Twemoji, EmojiOne), and
validated on CC BY-SA 4.0 (OpenMoji); attributions are in the data card. To be on the safe side the weights
are under CC BY-SA 4.0. Citation of the method:

```bibtex
@inproceedings{{baumann2026posthoc,
  title     = {{Post-hoc Probabilistic Vision-Language Models}},
  author    = {{Baumann, Anton and Li, Rui and Klasson, Marcus and Mentu, Santeri and Karthik, Shyamgopal
               and Akata, Zeynep and Solin, Arno and Trapp, Martin}},
  booktitle = {{International Conference on Learning Representations}},
  year      = {{2026}},
  note      = {{arXiv:2412.06014}}
}}
```
"""


def write_card(report: dict[str, Any], path: Path) -> None:
    """Write the card.

    Args:
        report: What `build_embedded_model.py` measured.
        path: Where to write it.
    """
    training = report["training"]
    text = _TEXT.format(
        index=_model_index(report["results"]["test"]["bayes"]),
        parameters=training.get("parameters", 0) / 1e6,
        steps=training.get("steps_done", "?"),
        minutes=training.get("wall_seconds", 0) / 60,
        device=f"{training.get('threads', '?')} threads of a {training.get('device', '?').upper()}",
        tried=len(report["tried"]),
        temperature=report["temperature"],
        test=_table(report["results"]["test"]),
        validation=_table(report["results"]["validation"]),
        **report["chosen"],
    )
    path.write_text(text, encoding="utf-8")


def _table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| images | task | method | accuracy | NLPD | ECE |",
        "|---|---|---|---|---|---|",
    ]
    for row in range(len(results["map"])):
        if _is_repeat(results["map"], row):
            continue
        for method, name in _METHODS.items():
            score = results[method][row]
            values, images = score["values"], score["images"]
            error = math.sqrt(values["accuracy"] * (1 - values["accuracy"]) / images)
            lines.append(
                f"| {score['slice']} ({images}) | {_TASKS.get(score['task'], score['task'])} "
                f"({score['classes']}-way) | {name} | {values['accuracy']:.3f} ± {error:.3f} "
                f"| {values['nlpd']:.3f} | {values['ece']:.3f} |"
            )
    return "\n".join(lines)


def _is_repeat(scores: list[dict[str, Any]], row: int) -> bool:
    """Held-out concepts are few: their task of about 105 names is the task of all names."""
    score = scores[row]
    return score["task"] == "names-105" and any(
        other["slice"] == score["slice"]
        and other["task"] == "full"
        and other["classes"] == score["classes"]
        for other in scores
    )


def _model_index(scores: list[dict[str, Any]]) -> str:
    lines: list[str] = []
    for score in scores:
        if score["task"] != "full" or score["slice"].endswith("held-out"):
            continue
        lines += [
            "  - task:",
            "      type: zero-shot-image-classification",
            "    dataset:",
            f"      name: EmojiStyles {score['slice']}",
            "      type: emoji-styles",
            "      split: test",
            "    metrics:",
        ]
        for metric in ("accuracy", "nlpd", "ece"):
            lines += [
                f"    - type: {metric}",
                f"      value: {score['values'][metric]:.4f}",
            ]
    return "\n".join(lines)

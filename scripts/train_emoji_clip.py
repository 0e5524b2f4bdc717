"""Train a small CLIP from scratch on the emoji-styles data set.

    python scripts/train_emoji_clip.py emoji-styles emoji-clip --test

Only the `train` split is trained on; `validation` is looked at along the way; `test` only with
`--test`, once, at the end. A run that was stopped goes on from its last checkpoint with the same
command and ends with the same weights as one that was not stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from emoji_augment import AugmentConfig
from emoji_captions import train_tokenizer
from emoji_clip_batch import (
    Batch,
    TrainConfig,
    batch_loss,
    data_fingerprint,
    draw_batch,
    load_train_data,
)
from emoji_clip_model import (
    ModelConfig,
    build_model,
    build_optimizers,
    build_processor,
    clip_logit_scale,
    stack_pixels,
    zero_shot_accuracy,
)
from emoji_styles import IMAGE_SIZE, load_emoji_styles
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import DatasetDict


class Progress:
    """Where a run stands: all that a resumed run needs besides weights and optimizers."""

    def __init__(self, seed: int) -> None:
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.generator = torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "history": list(self.history),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = list(state["history"])
        self.generator.set_state(state["generator"].cpu())


def schedule(step: int, config: TrainConfig) -> float:
    """Return the factor on the peak learning rates: linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def train_step(
    accelerator: Accelerator, model: Any, tokenizer: Any, optimizers: list, batch: Batch,
    config: TrainConfig, factor: float,
) -> Tensor:  # fmt: skip
    """Take one step with learning rates scaled by `factor`; return the loss."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
    with accelerator.autocast():
        loss = batch_loss(model, tokenizer, batch, config.broad_weight)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    clip_logit_scale(model)
    return loss.detach()


def save_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Replace the checkpoint; a run stopped in between still finds a whole one."""
    partial, old = folder.with_name("checkpoint-partial"), folder.with_name("checkpoint-old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    accelerator.save_state(str(partial))
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(output: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, if there is one."""
    for name in ("checkpoint", "checkpoint-old"):
        if (output / name).is_dir():
            return output / name
    return None


def export(model: Any, processor: Any, folder: Path) -> None:
    """Save float16 weights, configuration and processor as a plain CLIP checkpoint."""
    copy.deepcopy(model).half().save_pretrained(folder)
    processor.save_pretrained(folder)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that the weights depend on."""
    import accelerate
    import datasets
    import transformers

    modules = (torch, transformers, accelerate, datasets)
    found = {module.__name__: module.__version__ for module in modules}
    return {"python": platform.python_version(), **found}


class Trainer:
    """One run: builds everything, resumes, trains, evaluates and exports.

    Args:
        dataset: The whole data set.
        output: Folder of the model; checkpoints go below it.
        config: Settings of the run.
        shape: Shape of the model.
        augmentation: Strength of the augmentation.
    """

    def __init__(
        self,
        dataset: DatasetDict,
        output: Path,
        config: TrainConfig,
        shape: ModelConfig,
        augmentation: AugmentConfig | None = None,
    ) -> None:
        from accelerate import Accelerator

        self.dataset, self.output, self.config, self.shape = dataset, output, config, shape
        self.augmentation = augmentation or AugmentConfig()
        self.data = load_train_data(dataset)
        self.tokenizer = train_tokenizer(self.data.captions, shape.vocabulary)
        self.processor = build_processor(self.tokenizer)
        self.accelerator = Accelerator(mixed_precision="bf16")
        model = build_model(shape, self.tokenizer, config.seed)
        optimizers = build_optimizers(model, config.muon_lr, config.adamw_lr)
        self.model, *self.optimizers = self.accelerator.prepare(model, *optimizers)
        self.progress = Progress(config.seed)
        self.accelerator.register_for_checkpointing(self.progress)
        self.validation_pixels = stack_pixels(dataset["validation"])

    def settings(self) -> dict[str, Any]:
        """Return every setting of the run, as written to the summary."""
        return {
            "train": asdict(self.config),
            "model": asdict(self.shape),
            "augmentation": asdict(self.augmentation),
        }

    def resume(self) -> bool:
        """Load the last checkpoint, if any; return whether there was one."""
        checkpoint = find_checkpoint(self.output)
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint))
        return checkpoint is not None

    def train(self, until: int | None = None) -> None:
        """Train up to step `until` (default: the end), with checkpoints on the way."""
        from tqdm import tqdm

        last = min(until or self.config.steps, self.config.steps)
        bar = tqdm(total=self.config.steps, initial=self.progress.step, mininterval=5)
        started = time.monotonic() - self.progress.seconds
        while self.progress.step < last:
            loss = self.step()
            bar.update()
            self.progress.seconds = time.monotonic() - started
            if self.progress.step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if self.progress.step % self.config.evaluate_every == 0 or self.progress.step == last:
                self.report(loss.item())
                save_checkpoint(self.accelerator, self.output / "checkpoint")
        bar.close()

    def step(self) -> Tensor:
        """Take the next step; return its loss."""
        progress = self.progress
        whole = progress.step >= self.config.steps - self.config.whole_steps
        patches = None if whole else (IMAGE_SIZE // self.shape.patch) ** 2
        batch = draw_batch(self.data, self.config, self.augmentation, progress.generator, patches)
        factor = schedule(progress.step, self.config)
        progress.step += 1
        return train_step(
            self.accelerator, self.model, self.tokenizer, self.optimizers, batch,
            self.config, factor,
        )  # fmt: skip

    def evaluate(self, split: str) -> dict[str, float]:
        """Return zero-shot accuracies of a split with the stock prompt."""
        pixels = (
            self.validation_pixels if split == "validation" else stack_pixels(self.dataset[split])
        )
        self.model.eval()
        found = zero_shot_accuracy(self.model, self.tokenizer, self.dataset, split, pixels)
        self.model.train()
        return found

    def report(self, loss: float) -> None:
        """Evaluate on the validation split, keep the figures and write the model so far."""
        figures = self.evaluate("validation")
        entry = {"step": self.progress.step, "loss": loss, "validation": figures}
        self.progress.history.append(entry)
        self.write()

    def write(self, **more: Any) -> None:
        """Write the model so far and `training_summary.json`, with `more` entries."""
        export(self.accelerator.unwrap_model(self.model), self.processor, self.output)
        summary = {
            "steps_done": self.progress.step,
            "wall_seconds": round(self.progress.seconds, 1),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "settings": self.settings(),
            "versions": versions(),
            "device": str(self.accelerator.device),
            "threads": torch.get_num_threads(),
            "data_fingerprint": data_fingerprint(self.data.pixels, self.data.captions),
            "history": self.progress.history,
            **more,
        }
        path = self.output / "training_summary.json"
        path.write_text(json.dumps(summary, indent=2) + "\n", "utf-8")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; every setting of the run and the model is an option."""
    parser = argparse.ArgumentParser(description="Train a small CLIP on the emoji-styles data set.")
    parser.add_argument("data", help="folder or Hub repository of the data set")
    parser.add_argument("output", type=Path, help="folder to write the model to")
    parser.add_argument("--threads", type=int, help="number of CPU threads")
    parser.add_argument("--until", type=int, help="stop after this step; a later call goes on")
    parser.add_argument("--test", action="store_true", help="evaluate on `test` at the end")
    for settings in (TrainConfig(), ModelConfig()):
        for name, value in asdict(settings).items():
            option = "--" + name.replace("_", "-")
            parser.add_argument(option, type=type(value), default=value, help="(%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the training; return the exit code."""
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        dataset = load_emoji_styles(options.data)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    settings = vars(options)
    config = TrainConfig(**{name: settings[name] for name in asdict(TrainConfig())})
    shape = ModelConfig(**{name: settings[name] for name in asdict(ModelConfig())})
    options.output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(dataset, options.output, config, shape)
    trainer.resume()
    trainer.train(options.until)
    more = {"test": trainer.evaluate("test")} if options.test else {}
    trainer.write(**more)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

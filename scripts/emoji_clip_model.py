"""The small CLIP: its shape, its optimizers, its loss and its zero-shot accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from emoji_augment import composite, normalize, premultiplied
from emoji_captions import MAX_TOKENS
from emoji_styles import (
    IMAGE_SIZE,
    STOCK_TEMPLATE,
    evaluation_slices,
    zero_shot_tasks,
)
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

MAX_LOGIT_SCALE = math.log(100.0)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model.

    Attributes:
        patch: Side of a patch in pixels.
        vision_width: Width of the vision tower.
        vision_layers: Depth of the vision tower.
        text_width: Width of the text tower.
        text_layers: Depth of the text tower.
        projection: Size of the joint embedding.
        vocabulary: Number of tokens.
    """

    patch: int = 8
    vision_width: int = 256
    vision_layers: int = 4
    text_width: int = 128
    text_layers: int = 2
    projection: int = 128
    vocabulary: int = 2048


def build_model(config: ModelConfig, tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """Create an untrained model without touching the caller's random state."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.text_width,
        "intermediate_size": 4 * config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_width // 64,
        "hidden_act": "gelu",
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": config.projection,
    }
    vision = {
        "hidden_size": config.vision_width,
        "intermediate_size": 4 * config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_width // 64,
        # Exact GELU is one fused kernel; CLIP's quick GELU is three.
        "hidden_act": "gelu",
        "image_size": IMAGE_SIZE,
        "patch_size": config.patch,
        "projection_dim": config.projection,
    }
    clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.projection)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Eager attention: its backward pass is twice as fast as SDPA's on a CPU at this size.
        return CLIPModel._from_config(clip, attn_implementation="eager")


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """Create the processor that goes with :func:`build_model`."""
    from transformers import CLIPImageProcessor, CLIPProcessor

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def build_optimizers(model: CLIPModel, muon_lr: float, adamw_lr: float) -> list:
    """Muon for the weight matrices of the layers and projections, AdamW for everything else.

    Each group keeps its peak learning rate in `peak_lr`, which the schedule scales.
    """
    matrices, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embedding" not in name:
            matrices.append(parameter)
        elif parameter.ndim >= 2:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.1)
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=adamw_lr, betas=(0.9, 0.98))
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def embed_images(model: CLIPModel, images: Tensor, kept: Tensor | None = None) -> Tensor:
    """Embed normalised images.

    Args:
        model: The model.
        images: Normalised images [B, 3, H, W].
        kept: Numbers of the patches that the tower gets to see [B, K] (FLIP, arXiv:2212.00794);
            all by default.

    Returns:
        Unit image embeddings [B, D].
    """
    tower = model.vision_model
    if kept is None:
        pooled = tower(pixel_values=images).pooler_output
    else:
        tokens = tower.embeddings(images)
        # Token 0 is the class token.
        index = functional.pad(kept + 1, (1, 0)).to(tokens.device)
        tokens = tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))
        encoded = tower.encoder(inputs_embeds=tower.pre_layrnorm(tokens)).last_hidden_state
        pooled = tower.post_layernorm(encoded[:, 0])
    return functional.normalize(model.visual_projection(pooled).float(), dim=-1)


def embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Return unit text embeddings [B, D]."""
    tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    tokens = tokens.to(model.device)
    pooled = model.text_model(**tokens).pooler_output
    return functional.normalize(model.text_projection(pooled).float(), dim=-1)


def contrastive_loss(logits: Tensor, positive: Tensor, ignored: Tensor) -> Tensor:
    """CLIP's symmetric loss where captions may repeat or be true of several images.

    Args:
        logits: Scores [B, T] of B images and T captions; caption i belongs to image i, captions
            beyond B are of no image in the batch.
        positive: Which captions say the same as the image's own [B, T], bool.
        ignored: Which other captions are true of the image too [B, T], bool. They are left out:
            as negatives they would be wrong, as positives they would compete with the name
            (`bird` with `swan`).

    Returns:
        Mean of the image-to-text and the text-to-image cross-entropy.
    """
    count = len(logits)
    # Not -inf: a target of 0 times a log-probability of -inf is NaN.
    logits = logits.masked_fill(ignored, -1e4)
    targets = positive.float()
    images = functional.cross_entropy(logits, targets / targets.sum(dim=1, keepdim=True))
    columns = targets[:, :count].T
    texts = functional.cross_entropy(
        logits[:, :count].T, columns / columns.sum(dim=1, keepdim=True)
    )
    return (images + texts) / 2


def clip_logit_scale(model: Any) -> None:
    """Keep the logit scale of a CLIP (wrapped or not) at or below 100, as CLIP does."""
    with torch.no_grad():
        model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def stack_pixels(dataset: Dataset) -> Tensor:
    """Decode all drawings of a split into one tensor [N, 4, H, W], uint8, RGBA."""
    arrays = [np.asarray(image.convert("RGBA")) for image in dataset["image"]]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def zero_shot_accuracy(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    dataset: DatasetDict,
    split: str,
    pixels: Tensor,
    template: str = STOCK_TEMPLATE,
) -> dict[str, float]:
    """Zero-shot top-1 accuracy by slice and task, drawings on white.

    Args:
        model: To be evaluated.
        tokenizer: Its tokenizer.
        dataset: The whole data set.
        split: `validation` or `test`.
        pixels: Drawings of that split, from :func:`stack_pixels`.
        template: Prompt.

    Returns:
        `<slice> <task>` -> accuracy in 0 to 1.
    """
    images = torch.cat(
        [
            embed_images(model, normalize(composite(premultiplied(part), 1.0)).to(model.device))
            for part in pixels.split(256)
        ]
    )
    hits: dict[str, list[bool]] = {}
    for piece in evaluation_slices(dataset[split], split):
        for task in zero_shot_tasks(dataset, piece):
            prompts = [template.format(label.lower()) for label in task.labels]
            texts = embed_texts(model, tokenizer, prompts)
            best = (images[list(task.rows)] @ texts.T).argmax(dim=1).cpu()
            right = (best == torch.tensor(task.targets)).tolist()
            hits.setdefault(f"{piece.name} {task.name}", []).extend(right)
    return {name: sum(right) / len(right) for name, right in hits.items() if right}

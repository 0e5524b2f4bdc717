"""The training data in memory, the batches drawn from it, and the loss of a batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from emoji_augment import AugmentConfig, augment
from emoji_captions import Captions, collect_captions, draw_words, fill_templates
from emoji_clip_model import contrastive_loss, embed_images, embed_texts, stack_pixels
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from datasets import DatasetDict


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run.

    Attributes:
        steps: Number of steps.
        batch: Images per step, all of different concepts.
        negatives: Further names per step, of concepts that are not in the batch.
        muon_lr: Peak learning rate of Muon.
        adamw_lr: Peak learning rate of AdamW.
        warmup: Steps of linear warm-up; a cosine to zero follows.
        keyword_share: How often a keyword replaces the name in a caption.
        broad_weight: Weight of the loss on broader labels (coarse words, sub-groups, groups).
        keep_patches: Share of the patches that the vision tower sees, drawn anew for each image.
        whole_steps: The last so many steps see all patches, as every later use does.
        evaluate_every: Steps between looks at the validation split and checkpoints.
        seed: Fixes the weights, the batches, the captions and the augmentation.
    """

    steps: int = 4200
    batch: int = 256
    negatives: int = 256
    muon_lr: float = 2e-3
    adamw_lr: float = 1e-3
    warmup: int = 100
    keyword_share: float = 0.2
    broad_weight: float = 0.2
    keep_patches: float = 0.5
    whole_steps: int = 200
    evaluate_every: int = 400
    seed: int = 0


@dataclass(frozen=True)
class TrainData:
    """The training split in memory.

    Attributes:
        pixels: Drawings [N, 4, H, W], uint8, RGBA.
        drawings: For each of the C concepts the row numbers of its drawings.
        captions: Of the C concepts.
    """

    pixels: Tensor
    drawings: tuple[tuple[int, ...], ...]
    captions: Captions


@dataclass(frozen=True)
class Batch:
    """One training step's input.

    Attributes:
        images: Normalised images [B, 3, H, W].
        texts: T captions; caption i belongs to image i.
        positive: Which captions say the same as the image's own [B, T].
        ignored: Which other captions are true of the image too [B, T].
        labels: Prompts of one set of broader labels.
        targets: Index of each image's broader label [B], -1 where it has none.
        kept: Patches of each image that the vision tower sees [B, K], or None for all.
    """

    images: Tensor
    texts: list[str]
    positive: Tensor
    ignored: Tensor
    labels: list[str]
    targets: Tensor
    kept: Tensor | None = None


def load_train_data(dataset: DatasetDict) -> TrainData:
    """Read the training split into memory."""
    split = dataset["train"]
    captions = collect_captions(split)
    index = {concept: number for number, concept in enumerate(captions.concepts)}
    drawings: list[list[int]] = [[] for _ in captions.concepts]
    for row, concept in enumerate(split["concept"]):
        drawings[index[concept]].append(row)
    return TrainData(stack_pixels(split), tuple(map(tuple, drawings)), captions)


def draw_batch(
    data: TrainData,
    config: TrainConfig,
    augmentation: AugmentConfig,
    generator: torch.Generator,
    patches: int | None = None,
) -> Batch:
    """Draw different concepts, one drawing and one caption of each, and further names.

    Args:
        data: The training split.
        config: Settings of the run.
        augmentation: Strength of the augmentation.
        generator: Source of all randomness.
        patches: Number of patches of an image, to show a part of them; None to show all.

    Returns:
        The batch.
    """
    captions = data.captions
    order = torch.randperm(len(captions.concepts), generator=generator)
    inside, outside = order[: config.batch], order[config.batch :][: config.negatives]
    luck = torch.rand(len(inside), generator=generator).tolist()
    options = [data.drawings[concept] for concept in inside.tolist()]
    rows = [rows[int(chance * len(rows))] for rows, chance in zip(options, luck, strict=True)]
    chosen = draw_words(captions, inside, config.keyword_share, generator)
    words = torch.cat([chosen, captions.names[outside]])
    positive = chosen[:, None] == words[None]
    texts = fill_templates([captions.words[word] for word in words.tolist()], generator)
    pick = int(torch.randint(len(captions.label_sets), (), generator=generator))
    labels, targets = captions.label_sets[pick]
    return Batch(
        images=augment(data.pixels[rows], augmentation, generator),
        texts=texts,
        positive=positive,
        ignored=captions.says[inside][:, words] & ~positive,
        labels=fill_templates(labels, generator),
        targets=targets[inside],
        kept=None if patches is None else _draw_patches(len(inside), patches, config, generator),
    )


def _draw_patches(
    images: int, patches: int, config: TrainConfig, generator: torch.Generator
) -> Tensor:
    """Different patches of each image, in random order [images, kept]."""
    kept = max(1, round(config.keep_patches * patches))
    return torch.rand(images, patches, generator=generator).argsort(dim=1)[:, :kept]


def batch_loss(model: Any, tokenizer: Any, batch: Batch, broad_weight: float) -> Tensor:
    """Contrastive loss on names and keywords plus cross-entropy on broader labels."""
    images = embed_images(model, batch.images.to(model.device), batch.kept)
    texts = embed_texts(model, tokenizer, batch.texts + batch.labels)
    logits = model.logit_scale.exp() * images @ texts.T
    names, broad = logits.split([len(batch.texts), len(batch.labels)], dim=1)
    loss = contrastive_loss(names, batch.positive.to(names.device), batch.ignored.to(names.device))
    targets = batch.targets.to(broad.device)
    if bool((targets >= 0).any()):
        loss = loss + broad_weight * functional.cross_entropy(broad, targets, ignore_index=-1)
    return loss


def data_fingerprint(pixels: Tensor, captions: Captions) -> str:
    """Return a SHA-256 over the training drawings and names."""
    digest = hashlib.sha256(pixels.numpy().tobytes())
    digest.update("\n".join(captions.concepts).encode())
    return digest.hexdigest()

"""Batch augmentation of transparent drawings with plain torch.

The training styles are colourful; the validation style has thin black outlines and one test style
is black and white. Besides small changes of shape, colour and background, some drawings are
therefore turned into line drawings, stencils or outlined drawings. All of it is computed from the
training drawings alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LUMINANCE = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class AugmentConfig:
    """How strongly drawings are changed.

    Attributes:
        zoom: Smallest and largest size relative to the stored one.
        shift: Largest shift, as a share of the side.
        turn: Largest rotation in degrees.
        stretch: Largest change of the aspect ratio.
        colour: Strength of the random mixing of colour channels.
        grey: Share of drawings without colour.
        outlined: Share of coloured drawings with black outlines.
        two_tone: Share of drawings in black and white (lines, stencil or threshold).
        white: Share of white backgrounds; half as many are black, the others any colour.
    """

    zoom: tuple[float, float] = (0.7, 1.08)
    shift: float = 0.08
    turn: float = 12.0
    stretch: float = 0.1
    colour: float = 0.25
    grey: float = 0.1
    outlined: float = 0.15
    two_tone: float = 0.2
    white: float = 0.4


def normalize(images: Tensor) -> Tensor:
    """Apply CLIP's mean and standard deviation to images [B, 3, H, W] in 0 to 1."""
    mean = images.new_tensor(CLIP_MEAN).view(1, 3, 1, 1)
    return (images - mean) / images.new_tensor(CLIP_STD).view(1, 3, 1, 1)


def composite(drawings: Tensor, background: Tensor | float) -> Tensor:
    """Put premultiplied drawings [B, 4, H, W] on a background that broadcasts to [B, 3, 1, 1]."""
    return drawings[:, :3] + (1 - drawings[:, 3:]) * background


def premultiplied(pixels: Tensor) -> Tensor:
    """Turn stored RGBA pixels [B, 4, H, W] (uint8) into premultiplied floats in 0 to 1."""
    scaled = pixels.float() / 255
    return torch.cat([scaled[:, :3] * scaled[:, 3:], scaled[:, 3:]], dim=1)


def augment(pixels: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Change drawings at random and put them on random backgrounds.

    Args:
        pixels: Stored drawings [B, 4, H, W], uint8, RGBA.
        config: Strengths.
        generator: CPU generator; the result depends on nothing else.

    Returns:
        Normalised images [B, 3, H, W].
    """
    count = pixels.shape[0]
    drawings = _warp(premultiplied(pixels), config, generator)
    drawings = _jitter(drawings, config, generator)
    choice = torch.rand(count, generator=generator)
    outlined = (choice < config.outlined).nonzero().squeeze(1)
    two_tone = (choice > 1 - config.two_tone).nonzero().squeeze(1)
    background = _backgrounds(count, config, generator)
    # Black lines need a light ground.
    background[two_tone] = 1 - 0.15 * torch.rand(len(two_tone), 3, generator=generator)
    if len(outlined):
        drawings[outlined] = _outline(drawings[outlined], generator)
    if len(two_tone):
        drawings[two_tone] = _two_tone(drawings[two_tone], generator)
    ground = background.to(drawings.device).view(count, 3, 1, 1)
    return normalize(composite(drawings, ground).clamp(0, 1))


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _warp(drawings: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Zoom, stretch, turn and shift drawings [B, 4, H, W]."""
    count = drawings.shape[0]
    angle = _uniform(count, -config.turn, config.turn, generator) * math.pi / 180
    zoom = _uniform(count, *config.zoom, generator)
    stretch = 1 + _uniform(count, -config.stretch, config.stretch, generator)
    shift = 2 * config.shift * (2 * torch.rand(count, 2, generator=generator) - 1)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    matrix = torch.stack(
        [
            torch.stack([cos * stretch, -sin, shift[:, 0]], dim=1),
            torch.stack([sin, cos / stretch, shift[:, 1]], dim=1),
        ],
        dim=1,
    ).to(drawings.device)
    grid = functional.affine_grid(matrix, list(drawings.shape), align_corners=False)
    return functional.grid_sample(drawings, grid, align_corners=False)


def _jitter(drawings: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Mix the colour channels of drawings [B, 4, H, W] at random; remove colour from some."""
    count = drawings.shape[0]
    strength = config.colour * torch.rand(count, 1, 1, generator=generator)
    mixing = torch.eye(3) + strength * torch.randn(count, 3, 3, generator=generator) / math.sqrt(3)
    grey = torch.rand(count, generator=generator) < config.grey
    mixing[grey] = torch.tensor(LUMINANCE).expand(3, 3)
    brightness = (0.15 * torch.randn(count, 3, 1, 1, generator=generator)).to(drawings.device)
    colours = torch.einsum("bij,bjhw->bihw", mixing.to(drawings.device), drawings[:, :3])
    alpha = drawings[:, 3:]
    colours = torch.minimum((colours + brightness * alpha).clamp_min(0), alpha)
    return torch.cat([colours, alpha], dim=1)


def _backgrounds(count: int, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Draw background colours [B, 3]: white, black or any."""
    colours = torch.rand(count, 3, generator=generator)
    choice = torch.rand(count, generator=generator)
    colours[choice < 1.5 * config.white] = 0.0
    colours[choice < config.white] = 1.0
    return colours


def _dilate(images: Tensor, width: int) -> Tensor:
    """Return the maximum over `width` x `width` windows of images [B, C, H, W].

    The same as `max_pool2d` with stride 1, but several times faster on a CPU.
    """
    side = width // 2
    padded = functional.pad(images, (side, side, side, side), mode="replicate")
    height, length = images.shape[2:]
    rows = padded[:, :, :height]
    for shift in range(1, width):
        rows = torch.maximum(rows, padded[:, :, shift : shift + height])
    columns = rows[..., :length]
    for shift in range(1, width):
        columns = torch.maximum(columns, rows[..., shift : shift + length])
    return columns


def _edges(drawings: Tensor, generator: torch.Generator) -> Tensor:
    """Return soft edges [B, 1, H, W]: where colour or transparency changes abruptly."""
    on_white = torch.cat([composite(drawings, 1.0), drawings[:, 3:]], dim=1)
    width = 3 if torch.rand((), generator=generator) < 0.6 else 5
    contrast = (_dilate(on_white, width) + _dilate(-on_white, width)).amax(dim=1, keepdim=True)
    threshold = _uniform(len(drawings), 0.15, 0.45, generator).view(-1, 1, 1, 1)
    return ((contrast - threshold.to(contrast.device)) * 8).clamp(0, 1)


def _outline(drawings: Tensor, generator: torch.Generator) -> Tensor:
    """Draw black lines along the edges of coloured drawings [B, 4, H, W]."""
    lines = _edges(drawings, generator)
    return torch.cat([drawings[:, :3] * (1 - lines), torch.maximum(drawings[:, 3:], lines)], dim=1)


def _two_tone(drawings: Tensor, generator: torch.Generator) -> Tensor:
    """Turn drawings [B, 4, H, W] into black and white ones of three kinds.

    Lines: black edges, nothing else. Stencil: a black shape with white edges inside. Threshold:
    dark colours black, light ones white, with a black contour.
    """
    alpha = drawings[:, 3:]
    lines = _edges(drawings, generator)
    wide = _dilate(alpha, 3)
    inner = -_dilate(-alpha, 5)
    weights = drawings.new_tensor(LUMINANCE).view(1, 3, 1, 1)
    light = (composite(drawings, 1.0) * weights).sum(dim=1, keepdim=True)
    level = _uniform(len(drawings), 0.35, 0.8, generator).view(-1, 1, 1, 1).to(light.device)
    dark = ((level - light) * 8 + 0.5).clamp(0, 1)
    kinds = torch.stack(
        [
            lines,
            wide * (1 - lines * inner),
            torch.maximum(dark * alpha, (wide - inner).clamp(0, 1)),
        ]
    )
    kind = torch.randint(3, (len(drawings),), generator=generator).to(drawings.device)
    ink = kinds[kind, torch.arange(len(drawings), device=drawings.device)]
    return torch.cat([(wide - ink).clamp_min(0).expand(-1, 3, -1, -1), wide], dim=1)

"""How the cost of estimation grows with pairs, contrast size and features, and what 400 M pairs would take.

    python scripts/benchmark_scaling.py --write model_cards/scaling.md --json build/scaling.json

Competitors are timed in turn; every pass over n pairs runs in a process of its own, smaller and larger n in
turn.  `--quick` takes small sizes, to see that everything runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmark_common import interleaved, machine, print_rows, textbook_ggn, write_json
from benchmark_pass import LOGIT_SCALE, RandomPairs, accumulators, fold, run_pass
from benchmark_prior import PriorPrecision, bench_prior_precision
from benchmark_projection import Growth, Scaling, Throughput, Towers
from benchmark_report import write_report
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

# Inputs of the projections of ViT-B, ViT-L and ViT-H, whose embeddings have these features.
_IN_FEATURES = {512: 768, 768: 1024, 1024: 1280}
TEXT_TOKENS = 77


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        contrasts: Contrast sizes of the throughput grid.
        features: Embedding sizes of the throughput grid.
        pairs: Numbers of pairs whose growth is measured.
        block: Contrast size of the growth.
        growth_features: Embedding size of the growth and of the prior precision.
        rounds: Passes at each number of pairs.
        runs: Timed runs of each competitor.
        rows: Rows of a contrast block that are timed at most.
        textbook_rows: Rows of the textbook formula, in batches of half as many.
        adam_steps: Steps of the competitor of the prior precision.
        tower_batch: Pairs that go through the towers at once.
        vision: Changes to the configuration of ViT-B/32.
        text: Changes to the configuration of its text tower.
    """

    contrasts: tuple[int, ...] = (2048, 8192, 32768)
    features: tuple[int, ...] = (512, 768, 1024)
    pairs: tuple[int, ...] = (32768, 65536, 131072, 262144)
    block: int = 8192
    growth_features: int = 512
    rounds: int = 3
    runs: int = 3
    rows: int = 8192
    textbook_rows: int = 8
    adam_steps: int = 300
    tower_batch: int = 16
    vision: tuple[tuple[str, int], ...] = ()
    text: tuple[tuple[str, int], ...] = ()


_SMALL_TOWER = (
    *(("hidden_size", 32), ("intermediate_size", 64)),
    *(("num_hidden_layers", 1), ("num_attention_heads", 2)),
)
QUICK = Sizes(
    contrasts=(128, 512),
    features=(32, 64),
    pairs=(1024, 2048, 4096),
    block=512,
    growth_features=32,
    rounds=1,
    runs=1,
    adam_steps=20,
    tower_batch=2,
    vision=_SMALL_TOWER,
    text=_SMALL_TOWER,
)


def in_features_of(features: int) -> int:
    """Inputs of the projection of a model with these embeddings."""
    return _IN_FEATURES.get(features, features + features // 2)


def bench_throughput(
    contrast: int, features: int, *, runs: int, rows: int, textbook_rows: int
) -> Throughput:
    """Curvature stage of both modalities against the textbook formula, and the memory of both.

    Args:
        contrast: Pairs that are contrasted with each other.
        features: Embedding size.
        runs: Timed runs of each.
        rows: Rows of ours that are timed at most.
        textbook_rows: Rows of the textbook formula, whose time is extrapolated by rows.

    Returns:
        Pairs a second and memory.
    """
    inputs = in_features_of(features)
    rows, textbook_rows = min(rows, contrast), min(textbook_rows, contrast)
    batch = max(1, textbook_rows // 2)
    block = RandomPairs(contrast, features, inputs)
    image, text = block.means["image"], block.means["text"]

    def textbook() -> None:
        textbook_ggn(image[:textbook_rows], text, LOGIT_SCALE, batch)
        textbook_ggn(text[:textbook_rows], image, LOGIT_SCALE, batch)

    with torch.no_grad():
        slow, fast = interleaved(textbook, lambda: fold(accumulators(), block, rows), runs)
    ours = run_pass("ours", contrast, contrast, features, inputs, both=False)
    one, two = (
        run_pass("textbook", count, contrast, features, inputs) for count in (batch, 2 * batch)
    )
    return Throughput(
        contrast=contrast,
        features=features,
        in_features=inputs,
        rows=rows,
        textbook_rows=textbook_rows,
        pairs_per_second=rows / fast,
        textbook_pairs_per_second=textbook_rows / slow,
        peak_mib=ours.peak_mib,
        textbook_batch=batch,
        textbook_peak_mib=one.peak_mib,
        textbook_mib_per_row=(two.peak_mib - one.peak_mib) / batch,
    )


def bench_growth(pairs: Sequence[int], block: int, features: int, rounds: int) -> Growth:
    """Passes over more and more pairs, each in a fresh process; small and large ones take turns.

    Args:
        pairs: Numbers of pairs.
        block: Contrast size.
        features: Embedding size.
        rounds: Passes at each number.

    Returns:
        Seconds and peak memory of every pass.
    """
    inputs = in_features_of(features)
    seconds: list[list[float]] = [[] for _ in pairs]
    peaks: list[list[float]] = [[] for _ in pairs]
    for number in range(rounds):
        for index, count in enumerate(pairs):
            _say(f"growth: round {number + 1} of {rounds}, {count:,} pairs")
            result = run_pass("ours", count, block, features, inputs)
            seconds[index].append(result.seconds)
            peaks[index].append(result.peak_mib)
    return Growth(
        contrast=block,
        features=features,
        in_features=inputs,
        pairs=tuple(pairs),
        seconds=tuple(map(tuple, seconds)),
        peak_mib=tuple(map(tuple, peaks)),
    )


def bench_towers(sizes: Sizes) -> Towers:
    """Forward pass of both towers of a CLIP ViT-B/32 with random weights."""
    config = CLIPConfig(text_config=dict(sizes.text), vision_config=dict(sizes.vision))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip: Any = CLIPModel(config).eval()
    side: int = clip.config.vision_config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(sizes.tower_batch, 3, side, side, generator=generator)
    ids = torch.randint(0, 2000, (sizes.tower_batch, TEXT_TOKENS), generator=generator)

    def image(count: int | None = None) -> None:
        with torch.no_grad():
            clip.get_image_features(pixel_values=pixels[:count])

    def text(count: int | None = None) -> None:
        with torch.no_grad():
            clip.get_text_features(input_ids=ids[:count])

    image_seconds, text_seconds = interleaved(image, text, sizes.runs)
    with FlopCounterMode(display=False) as counter:
        image(1)
        text(1)
    return Towers(
        name="CLIP ViT-B/32" if not sizes.vision else "a small CLIP",
        batch=sizes.tower_batch,
        text_tokens=TEXT_TOKENS,
        pairs_per_second=sizes.tower_batch / (image_seconds + text_seconds),
        flops_per_pair=counter.get_total_flops(),
    )


def measure(sizes: Sizes) -> Scaling:
    """Run all benchmarks."""
    throughput: list[Throughput] = []
    for contrast in sizes.contrasts:
        for features in sizes.features:
            _say(f"throughput: contrast size {contrast:,}, {features} features")
            row = bench_throughput(
                contrast,
                features,
                runs=sizes.runs,
                rows=sizes.rows,
                textbook_rows=sizes.textbook_rows,
            )
            throughput.append(row)
    growth = bench_growth(sizes.pairs, sizes.block, sizes.growth_features, sizes.rounds)
    _say("prior precision and towers")
    inputs = in_features_of(sizes.growth_features)
    prior: PriorPrecision = bench_prior_precision(
        inputs, sizes.growth_features, sizes.adam_steps, sizes.runs
    )
    return Scaling(
        machine=machine(),
        quick=sizes.vision == _SMALL_TOWER,
        runs=sizes.runs,
        throughput=tuple(throughput),
        growth=growth,
        prior=prior,
        towers=bench_towers(sizes),
    )


def print_summary(scaling: Scaling) -> None:
    """Print the main numbers."""
    rows = [
        (
            f"{row.contrast:,}",
            f"{row.features}",
            f"{row.pairs_per_second:,.0f}",
            f"{row.textbook_pairs_per_second:,.2f}",
            f"{row.ratio:,.0f}",
            f"{row.peak_mib:,.0f}",
        )
        for row in scaling.throughput
    ]
    columns = ("C", "D", "pairs/s", "textbook pairs/s", "ratio", "peak MiB")
    print_rows("Curvature of both modalities", columns, rows)
    growth, prior = scaling.growth, scaling.prior
    passes = [
        (f"{n:,}", f"{seconds:.2f}", f"{peak:.0f}")
        for n, seconds, peak in zip(
            growth.pairs, growth.best_seconds, growth.highest_mib, strict=True
        )
    ]
    title = f"Growth, slope {growth.slope:.3f}"
    print_rows(title, ("pairs", "seconds", "peak MiB"), passes)
    print(f"prior precision: {prior.ratio:.0f} x faster than {prior.adam_steps} steps of Adam")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _sizes(options: argparse.Namespace) -> Sizes:
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name in ("contrasts", "features", "pairs", "block", "growth_features", "rounds", "runs")
        if (value := getattr(options, name)) is not None
    }
    return replace(QUICK if options.quick else Sizes(), **given)


def main(arguments: list[str] | None = None) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="write the report here, and a plot beside it")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--quick", action="store_true", help="small sizes, no meaningful numbers")
    for name in ("contrasts", "features", "pairs"):
        parser.add_argument(f"--{name}", type=int, nargs="+")
    parser.add_argument("--block", type=int, help="contrast size of the growth")
    parser.add_argument("--growth-features", type=int, help="embedding size of the growth")
    parser.add_argument("--rounds", type=int, help="passes at each number of pairs")
    parser.add_argument("--runs", type=int, help="timed runs of each competitor")
    options = parser.parse_args(arguments)
    if options.pairs is not None and len(set(options.pairs)) < 2:
        parser.error("--pairs needs at least two different numbers: a slope is fitted to them")
    scaling = measure(_sizes(options))
    print_summary(scaling)
    if options.json is not None:
        write_json(options.json, {"scaling": asdict(scaling)})
    if options.write is not None:
        write_report(scaling, options.write)
        print(f"wrote {options.write}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The sensitivity script: the posteriors it compares, its choices and the sentences it derives."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets.features import Image as ImageFeature
from PIL import Image
from tiny import save_bundle, tiny_image_processor, tiny_tokenizer, tiny_vlm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import sensitivity
import sensitivity_report as report_module
from build_embedded_model import Captioned
from emoji_evaluation import Scores
from sensitivity_report import SETTINGS, Sensitivity, Trial

from hf_bayesvlm import BayesVLMForZeroShot, estimate_posterior

NAMES = (
    "dog",
    "cat",
    "pizza",
    "car",
    "tree",
    "house",
    "sun",
    "moon",
    "ship",
    "bird",
    "fish",
    "cup",
)
TRAIN_STYLES = ("noto", "twemoji", "fxemoji", "emojione", "noto-v1")


class Processor:
    """The tiny processors, as one object."""

    tokenizer = tiny_tokenizer(64)
    image_processor = tiny_image_processor()


def _image(number: int) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(256, (32, 32, 4), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy(), "RGBA")


def _split(styles: tuple[str, ...], names: tuple[str, ...], start: int) -> Dataset:
    rows = [(style, name) for style in styles for name in names]
    data = {
        "image": [_image(start + number) for number in range(len(rows))],
        "text": [name for _, name in rows],
        "style": [style for style, _ in rows],
        "subgroup": ["animal-mammal", "food-prepared"] * (len(rows) // 2),
        "held_out_concept": [name in NAMES[-2:] for _, name in rows],
    }
    return Dataset.from_dict(data).cast_column("image", ImageFeature())


@pytest.fixture(scope="module")
def dataset() -> DatasetDict:
    return DatasetDict(
        {
            "train": _split(TRAIN_STYLES, NAMES[:-2], 0),
            "validation": _split(("noto", "openmoji"), NAMES, 1000),
            # Anything that looks at these rows breaks on them.
            "test": Dataset.from_dict({"image": [b"not an image"]}),
        }
    )


@pytest.fixture(scope="module")
def model() -> BayesVLMForZeroShot:
    return BayesVLMForZeroShot.from_vlm(tiny_vlm())


@pytest.fixture(scope="module")
def pairs(model: BayesVLMForZeroShot, dataset: DatasetDict) -> sensitivity.Pairs:
    return sensitivity.embed_training_pairs(model, Processor(), dataset["train"])


@pytest.mark.parametrize("contrast", [7, 50])
def test_posteriors_are_those_of_estimation(
    model: BayesVLMForZeroShot, dataset: DatasetDict, pairs: sensitivity.Pairs, contrast: int
) -> None:
    # 50 pairs in blocks of 7 leave one over, which has nothing to be contrasted with.
    found = sensitivity.posterior_of(model, pairs, contrast)
    expected = estimate_posterior(
        model,
        Processor(),
        Captioned(dataset["train"]),
        contrast_size=contrast,
        pseudo_data_count=5.0,
        objective="evidence",
        modalities="image",
        progress=False,
    )
    found = found.with_hyperparameters(pseudo_data_count=5.0, objective="evidence")
    assert found.num_pairs == expected.num_pairs
    assert found.fingerprint == expected.fingerprint
    for name in ("image", "text"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(ours.A, theirs.A, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.B, theirs.B, rtol=1e-3, atol=1e-4)
        assert ours.prior_precision == pytest.approx(theirs.prior_precision, rel=1e-3)
        assert ours.weight_norm_squared == pytest.approx(theirs.weight_norm_squared)


def test_the_order_of_all_pairs_in_one_block_does_not_matter(
    model: BayesVLMForZeroShot, pairs: sensitivity.Pairs
) -> None:
    one, other = (
        sensitivity.posterior_of(model, pairs[sensitivity.random_rows(50, 50, seed)], 50)
        for seed in (0, 1)
    )
    torch.testing.assert_close(one.image.B, other.image.B, rtol=1e-4, atol=1e-5)
    smaller = sensitivity.posterior_of(model, pairs[sensitivity.random_rows(50, 50, 1)], 10)
    assert not torch.allclose(one.image.B, smaller.image.B, rtol=1e-2)


def test_random_subsets_are_seeded_and_nested() -> None:
    rows = sensitivity.random_rows(30, 12, 3)
    assert torch.equal(rows, sensitivity.random_rows(30, 20, 3)[:12])
    assert not torch.equal(rows, sensitivity.random_rows(30, 12, 4))
    assert len(set(rows.tolist())) == 12


def test_grid_ends_with_all_pairs_in_one_block() -> None:
    grid = sensitivity.settings_grid(50, [20, 60], [8, 30, 50, 90])
    assert grid == [(20, 8), (20, 20), (50, 8), (50, 30), (50, 50)]


def test_the_choice_keeps_accuracy(model: BayesVLMForZeroShot, pairs: sensitivity.Pairs) -> None:
    posterior = sensitivity.posterior_of(model, pairs, 50)

    def outcome(nlpd: float, accuracy: float):
        values = {"nlpd": nlpd, "accuracy": accuracy}
        kept = Scores("openmoji", "full", 4, 3, values)
        ignored = Scores("openmoji/held-out", "full", 4, 3, {"nlpd": 0.0, "accuracy": 1.0})
        return posterior, [kept, ignored]

    outcomes = [outcome(1.0, 0.5), outcome(2.0, 0.8), outcome(3.0, 0.9)]
    assert sensitivity.best_outcome(outcomes, 0.8) is outcomes[1]
    assert sensitivity.best_outcome(outcomes, 0.1) is outcomes[0]
    # Where none keeps it, the lowest NLPD.
    assert sensitivity.best_outcome(outcomes, 0.99) is outcomes[0]


def test_the_script_writes_its_numbers_and_never_reads_test(
    dataset: DatasetDict, tmp_path: Path
) -> None:
    for name, split in dataset.items():
        (tmp_path / "data" / "data").mkdir(parents=True, exist_ok=True)
        split.to_parquet(str(tmp_path / "data" / "data" / f"{name}.parquet"))
    save_bundle(tiny_vlm(), tmp_path / "clip")
    page, numbers = tmp_path / "page.md", tmp_path / "numbers.json"
    options = ["--pairs", "20", "--contrasts", "8", "--seeds", "2"]
    files = ["--write", str(page), "--json", str(numbers)]
    folders = [str(tmp_path / "data"), str(tmp_path / "clip")]
    assert sensitivity.main([*folders, *options, *files]) == 0

    report = json.loads(numbers.read_text("utf-8"))
    # Three settings of: 2 seeds of (20, 8), (20, 20), (50, 8), and one of (50, 50).
    assert len(report["trials"]) == 3 * (2 * 3 + 1)
    slices = {score["slice"] for score in report["plain"]}
    assert slices == {"in-style", "in-style/held-out", "openmoji", "openmoji/held-out"}
    text = page.read_text("utf-8")
    assert "{" not in text
    assert str(tmp_path) not in text
    values = [
        statistics.fmean(
            score["values"]["nlpd"]
            for score in trial["scores"]
            if score["slice"] in ("in-style", "openmoji")
        )
        for trial in report["trials"]
        if (trial["pairs"], trial["contrast"], trial["setting"]) == (20, 8, "fixed")
    ]
    error = abs(values[0] - values[1]) / 2
    summary = next(line for line in text.splitlines() if line.startswith("| 20 | 8 |"))
    assert f"| {statistics.fmean(values):.3f} ± {error:.4f} |" in summary


def test_impossible_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sensitivity.main(["data", "clip", "--seeds", "1"])
    assert "standard errors" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sensitivity.main(["data", "clip", "--contrasts", "1"])


def test_standard_error_is_that_of_a_mean() -> None:
    assert report_module.mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert report_module.mean_and_error([5.0]) == (5.0, 0.0)


def _report(nlpd: dict[tuple[int, int], dict[str, float]]) -> Sensitivity:
    """A report whose plain model has an NLPD of 2 and which measured these."""

    def scores(value: float) -> tuple[Scores, ...]:
        values = {"nlpd": value, "ece": 0.1, "accuracy": 0.5}
        return (Scores("openmoji", "full", 4, 3, values),)

    trials = tuple(
        Trial(pairs, contrast, seed, setting, 10.0, 30.0, "reference", scores(value))
        for (pairs, contrast), settings in nlpd.items()
        for setting, value in settings.items()
        for seed in range(2)
    )
    return Sensitivity("sha256:0", 100, 2, (1.0, 10.0), ("openmoji",), scores(2.0), trials)


def _values(*values: float) -> dict[str, float]:
    return dict(zip(SETTINGS, values, strict=True))


def test_advice_follows_the_numbers() -> None:
    whole = {(100, 100): _values(1.0, 1.0, 1.0)}
    same = report_module.advice(_report(whole | {(10, 10): _values(1.01, 1.05, 1.09)}))
    assert any("At most 9 % of the gain" in sentence for sentence in same)
    again = report_module.advice(_report(whole | {(10, 10): _values(2.5, 1.4, 1.05)}))
    (fewer,) = (sentence for sentence in again if sentence.startswith("**Fewer pairs**"))
    assert "150 % (worse than the plain model)" in fewer
    assert "choose the count again, and it hardly matters" in fewer
    assert "safer setting is: evidence" in fewer
    lost = report_module.advice(_report(whole | {(100, 10): _values(1.2, 1.4, 1.2)}))
    (smaller,) = (s for s in lost if s.startswith("**A smaller contrast size** than 100 pairs"))
    assert "take as many as there are" in smaller
    assert "safer setting is: reference objective" in smaller
    assert "+0.400 ± 0.0000 (10)" in smaller


def test_held_out_slices_have_their_own_sentence() -> None:
    report = _report({(100, 100): _values(1.0, 1.0, 1.0), (10, 10): _values(1.6, 1.0, 1.0)})
    assert not any("Held-out" in sentence for sentence in report_module.advice(report))

    def with_held_out(scores: tuple[Scores, ...], value: float) -> tuple[Scores, ...]:
        return (
            *scores,
            Scores("openmoji/held-out", "full", 4, 3, scores[0].values | {"nlpd": value}),
        )

    report = replace(
        report,
        plain=with_held_out(report.plain, 6.0),
        trials=tuple(
            replace(t, scores=with_held_out(t.scores, 4.0 if t.pairs == 10 else 5.0))
            for t in report.trials
        ),
    )
    (found,) = (s for s in report_module.advice(report) if "Held-out" in s)
    assert "6.000 of the plain model, 5.000 from 100 pairs and 4.000 from 10" in found
    assert "better for these" in found


def test_without_a_gain_nothing_is_concluded() -> None:
    sentences = report_module.advice(_report({(100, 100): _values(2.5, 2.5, 2.5)}))
    assert len(sentences) == 2
    assert "no further conclusion" in sentences[1]

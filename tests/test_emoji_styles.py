"""Tests of the emoji-styles builder and of the training script, on a tiny made-up emoji set."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import build_emoji_styles as build
import emoji_render
import emoji_samples
import emoji_sources as sources
import emoji_styles as styles
from emoji_augment import AugmentConfig, augment
from emoji_captions import collect_captions, train_tokenizer
from emoji_clip_batch import TrainConfig
from emoji_clip_model import ModelConfig, contrastive_loss
from train_emoji_clip import Trainer, schedule

NAMES = [
    ("1F436", "dog face", "dog", "animal-mammal"),
    ("1F415", "dog", "dog2", "animal-mammal"),
    ("1F431", "cat face", "cat", "animal-mammal"),
    ("1F984", "unicorn", "unicorn_face", "animal-mammal"),
    ("1F42C", "dolphin", "dolphin", "animal-marine"),
    ("1F355", "pizza", "pizza", "food-prepared"),
    ("1F354", "hamburger", "hamburger", "food-prepared"),
    ("1F34E", "red apple", "apple", "food-fruit"),
    ("1F680", "rocket", "rocket", "transport-air"),
    ("2708-FE0F", "airplane", "airplane", "transport-air"),
    ("1F697", "automobile", "car", "transport-ground"),
    ("1F6B2", "bicycle", "bike", "transport-ground"),
    ("23F0", "alarm clock", "alarm_clock", "time"),
    ("26BD", "soccer ball", "soccer", "sport"),
    ("1F3E0", "house", "house", "place-building"),
    ("1F528", "hammer", "hammer", "tool"),
    ("1F527", "wrench", "wrench", "tool"),
    ("1F44B", "waving hand", "wave", "hand-fingers-open"),
    ("1F600", "grinning face", "grinning", "face-smiling"),
    ("1F3C3", "person running", "runner", "person-activity"),
    ("1F1F3-1F1F4", "flag Norway", "flag-no", "country-flag"),
    ("0031-FE0F-20E3", "keycap 1", "one", "keycap"),
    ("1F550", "one o'clock", "clock1", "time"),
    ("1F3C3-200D-2640-FE0F", "woman running", "woman-running", "person-activity"),
    ("1F469-200D-1F680", "woman astronaut", "female-astronaut", "person-role"),
    ("1F3C3-200D-27A1-FE0F", "person running facing right", "runner_right", "person-activity"),
    ("1F3FB", "light skin tone", "skin-tone-2", "skin-tone"),
]
KEPT = 20
SEED = 0


def _write(folder: Path, name: str, version: str, **files: object) -> None:
    (folder / name).mkdir(parents=True)
    files["package.json"] = {"name": name, "version": version}
    for file, content in files.items():
        path = folder / name / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), "utf-8")


def _emoji(unified: str) -> str:
    return "".join(chr(int(part, 16)) for part in unified.split("-"))


def _body(number: int) -> str:
    colour = f"hsl({37 * number % 360} 80% 50%)"
    return f'<rect x="{number % 7 + 1}" y="2" width="{number % 5 + 2}" height="9" fill="{colour}"/>'


def _icon_names(style: str) -> list[str]:
    if style == "fxemoji":
        return [short.replace("_", "").replace("-", "") for _, _, short, _ in NAMES]
    return [sources.slugify(name) for _, name, _, _ in NAMES]


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `node_modules` folder with every pinned package, in miniature."""
    folder = tmp_path_factory.mktemp("node_modules")
    rows = [
        {
            "name": name.upper(),
            "unified": unified,
            "short_names": [short],
            "category": subgroup.split("-")[0].title(),
            "subcategory": subgroup,
            "sort_order": order,
        }
        for order, (unified, name, short, subgroup) in enumerate(NAMES)
    ]
    cldr = {_emoji(unified): {"name": name} for unified, name, _, _ in NAMES}
    words = {_emoji(unified): [short, f"word_{short}"] for unified, _, short, _ in NAMES}
    files = {
        "emoji-datasource": {"emoji.json": rows},
        "unicode-emoji-json": {"data-by-emoji.json": cldr},
        "emojilib": {"dist/emoji-en-US.json": words},
    }
    for name, version in sources.NAME_PACKAGES.items():
        _write(folder, name, version, **files[name])
    for source in styles.STYLES.values():
        names = _icon_names(source.style)
        icons = {name: {"body": _body(number)} for number, name in enumerate(names)}
        table = {
            unified.lower().replace("-fe0f", ""): name
            for (unified, *_), name in zip(NAMES, names, strict=True)
        }
        chars = {} if source.style in ("noto-v1", "emojione", "fxemoji") else table
        icon_set = {"icons": icons, "width": 12, "height": 12}
        files = {"icons.json": icon_set, "chars.json": chars}
        _write(folder, source.package, source.version, **files)
    return folder


@pytest.fixture(scope="session")
def dataset(packages: Path):
    pytest.importorskip("resvg_py")
    return build.build_dataset(packages, SEED)


def test_exclusions(packages: Path) -> None:
    concepts = sources.load_concepts(packages)
    assert len(concepts) == KEPT
    assert [concept.text for concept in concepts] == [name for _, name, _, _ in NAMES[:KEPT]]
    airplane = next(concept for concept in concepts if concept.text == "airplane")
    assert airplane.codepoint == "2708"
    assert "word airplane" in airplane.keywords


def test_join_by_code_point_ignores_names(packages: Path) -> None:
    concepts = sources.load_concepts(packages)[:1]
    icon_set = {"icons": {"anything": {"body": ""}}}
    joined = sources.join_style(concepts, icon_set, {"1f436": "anything", "1f415": "absent"})
    assert joined == {"dog-face": "anything"}


def test_join_by_name_prefers_exact_names_and_uses_no_icon_twice(packages: Path) -> None:
    concepts = sources.load_concepts(packages)[:3]
    icon_set = {"icons": {"dog": {}, "old-cat": {}}, "aliases": {"cat-face": {"parent": "old-cat"}}}
    joined = sources.join_style(concepts, icon_set, {})
    # "dog" is also a short name of the dog's face, but it is the exact name of the dog.
    assert joined == {"dog": "dog", "cat-face": "cat-face"}


def test_join_of_squashed_names_prefers_short_names(packages: Path) -> None:
    concepts = sources.load_concepts(packages)
    icon_set = {"icons": {"dog": {}, "alarmclock": {}, "redapple": {}}}
    joined = sources.join_style(concepts, icon_set, {})
    assert joined == {"dog-face": "dog", "alarm-clock": "alarmclock", "red-apple": "redapple"}


def test_wrong_version_and_missing_npm_are_reported(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(sources.SourceError, match=r"0\.0\.1 is pinned"):
        sources.package_folder(packages, "emojilib", "0.0.1")
    monkeypatch.setattr(sources.shutil, "which", lambda _: None)
    arguments = [str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache")]
    assert build.main(arguments) == 1
    assert "npm was not found" in capsys.readouterr().err


def test_render_keeps_size_proportions_and_transparency() -> None:
    pytest.importorskip("resvg_py")
    body = '<rect width="20" height="10" fill="currentColor"/>'
    icon_set = {"icons": {"bar": {"body": body, "width": 20, "height": 10}}}
    image = emoji_render.render(emoji_render.icon_svg(icon_set, "bar"))
    assert (image.mode, image.size) == ("RGBA", (64, 64))
    assert image.getpixel((32, 32)) == (0, 0, 0, 255)
    assert image.getpixel((32, 4))[3] == 0
    white = styles.on_background(image)
    assert white.mode == "RGB"
    assert white.getpixel((32, 4)) == (255, 255, 255)


def test_aliases_are_flipped() -> None:
    pytest.importorskip("resvg_py")
    icon_set = {
        "icons": {"left": {"body": '<rect width="4" height="10"/>'}},
        "aliases": {"right": {"parent": "left", "hFlip": True}},
        "width": 10,
        "height": 10,
    }
    left = emoji_render.render(emoji_render.icon_svg(icon_set, "left"))
    right = emoji_render.render(emoji_render.icon_svg(icon_set, "right"))
    assert (left.getpixel((4, 32))[3], left.getpixel((60, 32))[3]) == (255, 0)
    assert (right.getpixel((4, 32))[3], right.getpixel((60, 32))[3]) == (0, 255)


def test_splits_do_not_leak(dataset) -> None:
    pairs = {
        split: set(zip(part["style"], part["concept"], strict=True))
        for split, part in dataset.items()
    }
    for one, other in itertools.combinations(pairs.values(), 2):
        assert not one & other
    assert not any(dataset["train"]["held_out_concept"])
    assert set(dataset["train"]["style"]) <= set(styles.styles_of_split("train"))
    assert set(dataset["test"]["style"]) == set(styles.styles_of_split("test"))
    held_out = {name for row, name in _held_out(dataset["validation"]) if row}
    assert len(held_out) == KEPT // build.HELD_OUT_EVERY
    assert not held_out & set(dataset["train"]["concept"])
    seen = {name for row, name in _held_out(dataset["validation"]) if not row}
    assert seen <= set(dataset["train"]["concept"])


def _held_out(part):
    return list(zip(part["held_out_concept"], part["concept"], strict=True))


def test_written_data_set_loads_again(dataset, tmp_path: Path) -> None:
    build.write_dataset(dataset, tmp_path, SEED)
    loaded = styles.load_emoji_styles(tmp_path)
    assert {split: part.num_rows for split, part in loaded.items()} == {
        split: part.num_rows for split, part in dataset.items()
    }
    assert loaded["test"][0]["image"].size == (64, 64)
    with pytest.raises(FileNotFoundError):
        styles.load_emoji_styles(tmp_path / "absent")


def test_zero_shot_tasks_cover_the_slice(dataset) -> None:
    pieces = styles.evaluation_slices(dataset["test"], "test")
    rows = sorted(row for piece in pieces for row in piece.rows)
    assert rows == list(range(dataset["test"].num_rows))
    texts, subgroups = dataset["test"]["text"], dataset["test"]["subgroup"]
    piece = next(piece for piece in pieces if piece.name == "fluent-emoji-flat")
    full, *parts, coarse = styles.zero_shot_tasks(dataset, piece, ways=6)
    assert full.rows == piece.rows
    for row, target in zip(full.rows, full.targets, strict=True):
        assert full.labels[target] == texts[row]
    assert sorted(row for part in parts for row in part.rows) == sorted(piece.rows)
    assert sorted(label for part in parts for label in part.labels) == sorted(full.labels)
    for row, target in zip(coarse.rows, coarse.targets, strict=True):
        assert coarse.labels[target] == styles.coarse_label(subgroups[row])


def test_coarse_labels_are_disjoint() -> None:
    subgroups = [name for names in styles.COARSE_LABELS.values() for name in names]
    assert len(subgroups) == len(set(subgroups))
    assert styles.coarse_label("time") is None


def test_samples_are_written(dataset, packages: Path, tmp_path: Path) -> None:
    emoji_samples.write_samples(dataset, packages, tmp_path, size=32)
    entries = json.loads((tmp_path / "samples.json").read_text("utf-8"))
    assert len(entries) == len(emoji_samples.SAMPLES)
    for entry in entries:
        assert (tmp_path / entry["file"]).exists()
        assert entry["style"] in styles.styles_of_split("test")
        assert entry["file"] in (tmp_path / "ATTRIBUTION.md").read_text("utf-8")


def test_augmentation_depends_on_the_generator_alone(dataset) -> None:
    pixels = torch.randint(256, (16, 4, 64, 64), dtype=torch.uint8)
    config = AugmentConfig(outlined=0.3, two_tone=0.5)
    first, second = (augment(pixels, config, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == (16, 3, 64, 64)
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


def test_contrastive_loss_is_clip_loss_without_shared_captions() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    target = torch.arange(5)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    nothing = torch.zeros(5, 5, dtype=torch.bool)
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(5).bool(), nothing), expected)


def test_contrastive_loss_leaves_out_other_true_captions() -> None:
    logits = torch.tensor([[2.0, 1.0, 50.0], [0.0, 3.0, 1.0]])
    positive = torch.eye(2, 3).bool()
    ignored = torch.tensor([[False, False, True], [False, False, False]])
    logits_without = logits.clone()
    logits_without[0, 2] = -1e4
    nothing = torch.zeros_like(ignored)
    expected = contrastive_loss(logits_without, positive, nothing)
    torch.testing.assert_close(contrastive_loss(logits, positive, ignored), expected)


def test_tokenizer_ends_with_one_and_knows_every_byte(dataset) -> None:
    tokenizer = train_tokenizer(collect_captions(dataset["train"]), 600)
    assert tokenizer.eos_token_id == 1
    assert tokenizer("Rocket")["input_ids"] == tokenizer("rocket")["input_ids"]
    assert tokenizer("zß 中")["input_ids"].count(1) == 1


def test_schedule_warms_up_and_ends_at_zero() -> None:
    config = TrainConfig(steps=100, warmup=10)
    factors = [schedule(step, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert factors[100] == pytest.approx(0.0)


def _trainer(dataset, output: Path) -> Trainer:
    config = TrainConfig(steps=2, batch=6, negatives=4, warmup=1, evaluate_every=1, whole_steps=1)
    shape = ModelConfig(
        vision_width=64,
        vision_layers=1,
        text_width=64,
        text_layers=1,
        projection=16,
        vocabulary=600,
    )
    output.mkdir(parents=True, exist_ok=True)
    return Trainer(
        dataset, output, config, shape, dataclasses.replace(AugmentConfig(), zoom=(1, 1))
    )


def test_resumed_run_equals_uninterrupted_run(dataset, tmp_path: Path) -> None:
    whole = _trainer(dataset, tmp_path / "whole")
    assert not whole.resume()
    whole.train()
    _trainer(dataset, tmp_path / "parts").train(until=1)
    resumed = _trainer(dataset, tmp_path / "parts")
    assert resumed.resume()
    assert resumed.progress.step == 1
    resumed.train()
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    summary = json.loads((tmp_path / "parts" / "training_summary.json").read_text("utf-8"))
    assert summary["steps_done"] == 2
    assert [entry["step"] for entry in summary["history"]] == [1, 2]
    _check_stock_pipeline(tmp_path / "parts", dataset["test"][0]["image"])


def _check_stock_pipeline(folder: Path, image) -> None:
    from transformers import pipeline

    classify = pipeline("zero-shot-image-classification", model=str(folder))
    scores = classify(styles.on_background(image), candidate_labels=["dog", "pizza"])
    assert sum(score["score"] for score in scores) == pytest.approx(1.0, abs=1e-2)


def test_the_bundle_is_built_chosen_on_validation_and_measured_on_test(
    dataset, tmp_path: Path
) -> None:
    import build_embedded_model
    from emoji_evaluation import embed_everything, evaluate
    from huggingface_hub import ModelCard
    from transformers import AutoProcessor

    from hf_bayesvlm import BayesVLMForZeroShot

    build.write_dataset(dataset, tmp_path / "data", SEED)
    _trainer(dataset, tmp_path / "clip").train()
    bundle = tmp_path / "bundle"
    paths = [str(tmp_path / "clip"), str(tmp_path / "data"), str(bundle)]
    assert build_embedded_model.main(paths) == 0

    report = json.loads((bundle / "evaluation.json").read_text("utf-8"))
    assert report["tried"] == sorted(report["tried"], key=lambda row: row["nlpd"])
    assert {score["slice"].split("/")[0] for score in report["results"]["test"]["bayes"]} == {
        "fluent-emoji-flat",
        "fluent-emoji-high-contrast",
    }
    model = BayesVLMForZeroShot.from_pretrained(bundle)
    assert model.is_fitted
    assert model.dtype == torch.float32
    # What the card says is what the saved bundle does.
    data = embed_everything(model, AutoProcessor.from_pretrained(bundle), dataset, ["test"])
    for found, stated in zip(
        evaluate(model, data), report["results"]["test"]["bayes"], strict=True
    ):
        assert found.values == pytest.approx(stated["values"], abs=1e-3)
    plain = evaluate(model, data, bayesian=False)
    assert plain[0].values != evaluate(model, data)[0].values
    card = ModelCard.load(bundle / "README.md")
    assert len(card.data.eval_results) == 6
    assert str(tmp_path) not in (bundle / "config.json").read_text("utf-8")

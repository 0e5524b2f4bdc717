"""The command, as a user types it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import fitted, save_bundle
from typer.testing import CliRunner

from hf_bayesvlm import BayesVLMPosterior, sample_images
from hf_bayesvlm.cli import app
from hf_bayesvlm.cli_classify import expand_images

LABELS = "dog face,pizza,rocket"
PIZZA = next(sample.path for sample in sample_images() if sample.label == "pizza")
runner = CliRunner()


def run(*arguments: str) -> Any:
    """Run the command in this process."""
    return runner.invoke(app, ["classify", *arguments], catch_exceptions=False)


def run_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a shell does."""
    return subprocess.run(
        [sys.executable, "-m", "hf_bayesvlm.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        timeout=120,
    )


def test_json_is_all_that_is_on_standard_output() -> None:
    done = run_process("classify", PIZZA, "--labels", LABELS, "--json", "--top-k", "2")
    assert done.returncode == 0
    [row] = json.loads(done.stdout)
    assert row["image"] == PIZZA
    assert [set(prediction) for prediction in row["predictions"]] == [
        {"label", "score", "logit_mean", "logit_std"}
    ] * 2
    assert row["entropy"] == pytest.approx(
        row["expected_entropy"] + row["mutual_information"], abs=1e-5
    )
    assert row["unsure"] is (row["predictions"][0]["score"] < 0.5)
    assert "Traceback" not in done.stderr


def test_an_error_has_no_traceback_and_exit_code_2() -> None:
    done = run_process("classify", "no-such-file.png", "--labels", LABELS)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip() == "error: no file or folder no-such-file.png"


def test_debugging_shows_the_traceback() -> None:
    done = run_process("classify", PIZZA, "--labels", "a,a", BAYESVLM_DEBUG="1")
    assert "Traceback" in done.stderr


def test_help_names_the_command_and_the_threshold() -> None:
    assert "classify" in runner.invoke(app, ["--help"]).output
    output = runner.invoke(app, ["classify", "--help"], terminal_width=200, color=False).output
    assert "threshold" in output
    assert "unsure" in output


def test_table_has_scores_deviations_and_entropies() -> None:
    output = run(PIZZA, "--labels", LABELS).output
    for part in ("pizza", "logit", "±", "entropy", "mutual information", "of 1 unsure"):
        assert part in output


@pytest.mark.parametrize(("threshold", "flagged"), [("0", 0), ("1", 1)])
def test_the_threshold_decides_who_is_unsure(threshold: str, flagged: int) -> None:
    output = run(PIZZA, "--labels", LABELS, "--threshold", threshold).output
    assert f"{flagged} of 1 unsure" in output


def test_many_images_from_folder_and_glob(tmp_path: Path) -> None:
    for i in range(5):
        Image.new("RGB", (30, 30), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    whole = run(str(tmp_path), "--labels", LABELS, "--json", "--batch-size", "2").stdout
    globbed = run(str(tmp_path / "*.png"), "--labels", LABELS, "--json").stdout
    assert [Path(row["image"]).name for row in json.loads(whole)] == [f"{i}.png" for i in range(5)]
    for one, other in zip(json.loads(whole), json.loads(globbed), strict=True):
        assert one["predictions"][0]["score"] == pytest.approx(
            other["predictions"][0]["score"], abs=1e-5
        )


def test_one_bad_image_does_not_lose_the_others(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    result = run(str(bad), PIZZA, "--labels", LABELS, "--json")
    assert result.exit_code == 2
    rows = json.loads(result.stdout)
    assert "bad.png" in rows[0]["error"]
    assert rows[1]["predictions"]
    assert "bad.png" in result.stderr


def test_plot_is_a_picture_of_every_image(tmp_path: Path) -> None:
    sizes = []
    for number in (1, 3):
        picture = tmp_path / f"{number}.png"
        paths = [sample.path for sample in sample_images()[:number]]
        result = run(*paths, "--labels", LABELS, "--plot", str(picture))
        assert result.exit_code == 0
        with Image.open(picture) as image:
            sizes.append(image.size)
    assert sizes[0][0] == sizes[1][0] > 500
    assert sizes[1][1] > 2 * sizes[0][1] > 200


def test_more_images_than_a_picture_shows(tmp_path: Path) -> None:
    for i in range(30):
        Image.new("RGB", (40, 40), (8 * i, 0, 0)).save(tmp_path / f"{i:02}.png")
    result = run(str(tmp_path), "--labels", LABELS, "--plot", str(tmp_path / "plot.pdf"))
    assert result.exit_code == 0
    assert (tmp_path / "plot.pdf").stat().st_size > 1000


def test_a_truncated_bundle_is_refused(tmp_path: Path) -> None:
    bundle = save_bundle(fitted(), tmp_path / "bundle")
    weights = bundle / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    result = run(PIZZA, "--labels", LABELS, "--model", str(bundle))
    assert result.exit_code == 2
    assert "truncated" in result.stderr.replace("\n", " ")


def test_templates_change_the_answer() -> None:
    scores = [
        json.loads(run(PIZZA, "--labels", LABELS, "--json", *extra).stdout)[0]["predictions"][0][
            "score"
        ]
        for extra in (
            [],
            ["--template", "{}"],
            ["--template", "{}", "--template", "an icon of a {}"],
        )
    ]
    assert len(set(scores)) == 3


def test_another_model_and_posterior(tmp_path: Path) -> None:
    model = fitted("siglip", objective="manual")
    bundle = save_bundle(model, tmp_path / "bundle", "siglip")
    posterior = model.posterior
    assert posterior is not None
    posterior.with_hyperparameters(prior_precision=3000.0).save_pretrained(tmp_path / "sharp")
    stds = []
    for extra in ([], ["--posterior", str(tmp_path / "sharp")]):
        result = run(PIZZA, "--labels", "cat,dog", "--model", str(bundle), "--json", *extra)
        assert result.exit_code == 0, result.stderr
        stds.append(json.loads(result.stdout)[0]["predictions"][0]["logit_std"])
    assert stds[1] < 0.7 * stds[0]


def test_a_posterior_for_another_base_is_refused(tmp_path: Path) -> None:
    posterior = fitted().posterior
    assert isinstance(posterior, BayesVLMPosterior)
    posterior.save_pretrained(tmp_path)
    result = run(PIZZA, "--labels", LABELS, "--posterior", str(tmp_path))
    assert result.exit_code == 2
    assert "projection" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", ""], "empty"),
        (["--labels", "a,,b"], "number 2 is empty"),
        (["--labels", "a,a"], "more than once"),
        (["--labels", "a,b", "--template", "no braces"], "no {}"),
        (["--labels", "a,b", "--template", "{} {x}"], "cannot be filled in"),
        (["--labels", "a,b", "--template", "{[0]}"], "bare {}"),
        (["--labels", "a,b", "--template", "{:.1}"], "bare {}"),
        (["--labels", "a,b", "--model", ""], "--model is empty"),
        (["--labels", "a,b", "--model", "./missing"], "missing"),
        (["--labels", "a,b", "--posterior", "./missing"], "missing"),
        (["--labels", "a,b", "--plot", "out.xyz"], "must end in"),
        (["--labels", "a,b", "--plot", "no-such-folder/out.png"], "no folder"),
        (["--labels", "a,b", "--device", "nonsense"], "--device nonsense"),
        (["--labels", "a,b", "--top-k", "0"], "top-k"),
        (["--labels", "a,b", "--threshold", "1.5"], "threshold"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["classify", PIZZA, *arguments], catch_exceptions=False)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")


def _truncated(path: Path) -> None:
    data = Path(PIZZA).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _huge(path: Path) -> None:
    # 20,000 x 20,000 pixels in a few hundred kB.
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(b"garbage"), "not an image"),
        (_truncated, "truncated"),
        (_huge, "too large"),
    ],
    ids=["empty", "garbage", "truncated", "bomb"],
)
def test_bad_images_are_refused(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "image.png"
    make(path)
    result = run(str(path), "--labels", LABELS)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr


def test_expand_images_keeps_order_and_drops_repeats(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.txt", "deep/d.gif"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    first = str(tmp_path / "b.png")
    found = expand_images([first, str(tmp_path), "https://example.org/x.png"])
    names = [Path(name).name for name in found]
    assert names == ["b.png", "a.JPG", "d.gif", "x.png"]


def test_expand_images_refuses_what_holds_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no images"):
        expand_images([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="nothing matches"):
        expand_images([str(tmp_path / "*.png")])


def test_file_names_with_markup_are_printed_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "[bold]x[red].png"
    Image.new("RGB", (20, 20)).save(path)
    assert "[bold]x[red].png" in run(str(path), "--labels", "cat [dog],pizza").output


def test_a_missing_path_does_not_lose_the_others() -> None:
    result = run("no-such-file.png", PIZZA, "no-such-*.png", "--labels", LABELS, "--json")
    assert result.exit_code == 2
    rows = json.loads(result.stdout)
    assert "no file or folder" in rows[0]["error"]
    assert rows[1]["predictions"]
    assert "nothing matches" in rows[2]["error"]


def test_nothing_usable_gives_no_plot(tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"garbage")
    result = run(str(bad), "--labels", LABELS, "--plot", str(tmp_path / "plot.png"))
    assert result.exit_code == 2
    assert result.stderr.count("error:") == 1
    assert not (tmp_path / "plot.png").exists()


def test_dollars_are_not_mathematics(tmp_path: Path) -> None:
    labels = r"dog,$5 to $10,x$\frac$"
    path = tmp_path / "plot.png"
    assert run(PIZZA, "--labels", labels, "--plot", str(path)).exit_code == 0
    assert path.exists()


def test_a_picture_stays_small_with_many_labels(tmp_path: Path) -> None:
    labels = ",".join(f"label number {i}" for i in range(200))
    path = tmp_path / "plot.png"
    assert run(PIZZA, "--labels", labels, "--plot", str(path)).exit_code == 0
    with Image.open(path) as image:
        assert image.width * image.height < 3_000_000


def test_folders_hold_pictures_only(tmp_path: Path) -> None:
    for name in ("a.png", "report.pdf", "film.mpg", "data.h5", "b.webp"):
        (tmp_path / name).touch()
    assert [Path(name).name for name in expand_images([str(tmp_path)])] == ["a.png", "b.webp"]


def test_output_that_cannot_show_a_bar_is_no_error() -> None:
    done = run_process("classify", PIZZA, "--labels", LABELS, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "pizza" in done.stdout


def test_a_posterior_given_as_model_is_explained(tmp_path: Path) -> None:
    posterior = fitted().posterior
    assert isinstance(posterior, BayesVLMPosterior)
    posterior.save_pretrained(tmp_path / "posterior")
    result = run(PIZZA, "--labels", LABELS, "--model", str(tmp_path / "posterior"))
    assert result.exit_code == 2
    assert "use --posterior" in result.stderr.replace("\n", " ")


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).stdout.startswith("hf_bayesvlm 0.")

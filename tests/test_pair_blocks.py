"""The run over a data set: blocks and slots, skipped rows, threads, what is noted."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from test_estimation import Processor, by_hand, pairs
from tiny import tiny_vlm

from hf_bayesvlm import BayesVLMForZeroShot, BayesVLMPosterior, estimate_posterior
from hf_bayesvlm.distributed import Ranks
from hf_bayesvlm.pair_blocks import BlockPlan, TooManyBadRowsError
from hf_bayesvlm.pairs import PairColumns, PairError


def fit(rows: Any, **options: Any) -> BayesVLMPosterior:
    options = {"contrast_size": 5, "batch_size": 2, "progress": False} | options
    return estimate_posterior(
        options.pop("model", None) or tiny_vlm(), Processor(), rows, **options
    )


def same(one: BayesVLMPosterior, other: BayesVLMPosterior) -> bool:
    return all(
        torch.equal(getattr(getattr(one, name), letter), getattr(getattr(other, name), letter))
        for name in ("image", "text")
        for letter in "AB"
    )


def spoiled(*numbers: int, count: int = 23) -> list[dict[str, Any]]:
    rows = pairs(count)
    for number in numbers:
        rows[number] = rows[number] | {"image": b"junk"}
    return rows


SKIP: dict[str, Any] = {"on_error": "skip", "max_skipped_share": 1.0}


# Blocks


def test_a_block_is_a_run_of_slots_and_skipped_rows_leave_gaps() -> None:
    posterior = fit(spoiled(1, 2, 7, 20), **SKIP)
    model = BayesVLMForZeroShot.from_vlm(tiny_vlm())
    rows = pairs()
    blocks = [[0, 3, 4], [5, 6, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19], [21, 22]]
    for name in ("image", "text"):
        A: Any = 0
        B: Any = 0
        for block in blocks:
            # One block at a time, so that `by_hand` scales by the root of the block's size.
            part = by_hand(model, [rows[i] for i in block], len(block))[name]
            A, B = (
                total + len(block) ** 0.5 * new for total, new in zip((A, B), part, strict=True)
            )
        found = getattr(posterior, name)
        torch.testing.assert_close(found.A.double(), A / 19**0.5, rtol=2e-4, atol=1e-5)
        torch.testing.assert_close(
            found.B.double(), B / 19**0.5, rtol=2e-4, atol=1e-4 * B.abs().max().item()
        )
    assert posterior.num_pairs == 19


def test_a_block_of_bad_rows_alone_and_a_pair_alone_in_its_block() -> None:
    posterior = fit(spoiled(*range(5, 10), *range(11, 15)), **SKIP)
    notes = posterior.provenance
    assert posterior.num_pairs == 13
    assert (notes["num_blocks"], notes["num_dropped"], notes["num_skipped"]) == (3, 1, 9)
    assert notes["num_read"] == 23
    rows = pairs()
    assert same(posterior, fit([*rows[:5], *rows[15:]]))


def test_the_last_block_may_be_smaller_than_the_others() -> None:
    assert fit(pairs(7)).provenance["num_blocks"] == 2
    assert fit(pairs(7), contrast_size=7).contrast_size == 7
    assert fit(pairs(7), contrast_size=10**6).contrast_size == 7


# Threads


@pytest.mark.parametrize("streaming", [False, True])
def test_the_number_of_threads_does_not_matter(streaming: bool) -> None:
    rows = spoiled(3, 11)
    found = [
        fit(iter(rows) if streaming else rows, num_workers=workers, **SKIP) for workers in (0, 1, 4)
    ]
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    skipped = [posterior.provenance["skipped"] for posterior in found]
    assert skipped[0] == skipped[1] == skipped[2]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_first_bad_row_is_the_one_that_is_named(workers: int) -> None:
    with pytest.raises(PairError, match="row 9: "):
        fit(spoiled(9, 10, 12), num_workers=workers)


# Bad rows


def test_a_broken_image_in_a_data_set_is_skipped() -> None:
    rows = [
        {"image": {"bytes": b"junk", "path": None}, "text": "a cat"} if i == 4 else row
        for i, row in enumerate(pairs(9))
    ]
    features = Features({"image": ImageFeature(), "text": Value("string")})
    data = Dataset.from_list(rows, features=features)
    expected = fit(spoiled(4, count=9), **SKIP)
    for source in (data, data.to_iterable_dataset()):
        found = fit(source, **SKIP)
        assert found.provenance["num_skipped"] == 1
        assert same(found, expected)


def test_as_many_bad_rows_as_are_allowed() -> None:
    rows = spoiled(1, 2, count=20)
    assert fit(rows, on_error="skip", max_skipped_share=0.1).provenance["num_skipped"] == 2
    with pytest.raises(
        TooManyBadRowsError, match=r"2 of 20 rows .* share of 0.09 .*row 1: .*row 2: "
    ):
        fit(rows, on_error="skip", max_skipped_share=0.09)
    with pytest.raises(TooManyBadRowsError):
        fit(rows, on_error="skip", max_skipped_share=0.0)
    assert fit(pairs(4), on_error="skip", max_skipped_share=0.0).num_pairs == 4


def test_bad_rows_at_the_beginning_do_not_stop_a_long_run() -> None:
    rows = spoiled(0, 1, 2, 3, count=100)
    assert fit(rows, on_error="skip").provenance["num_skipped"] == 4


def test_no_usable_row_at_all() -> None:
    with pytest.raises(TooManyBadRowsError, match="4 of 4"):
        fit(spoiled(0, 1, 2, 3, count=4), on_error="skip")
    with pytest.raises(ValueError, match="0 usable pairs: at least 2"):
        fit(spoiled(0, 1, 2, 3, count=4), **SKIP)
    with pytest.raises(ValueError, match=r"[01] usable pairs"):
        fit(pairs(1))


def test_examples_of_bad_rows_are_limited() -> None:
    posterior = fit(spoiled(*range(60), count=64), contrast_size=32, **SKIP)
    assert posterior.provenance["num_skipped"] == 60
    assert len(posterior.provenance["skipped"]) == 50
    assert posterior.provenance["skipped"][49].startswith("row 49: ")


# Captions


def test_captions_are_sampled_or_expanded() -> None:
    rows = pairs(8)
    several = [row | {"text": [f"{row['text']} {j}" for j in range(3)]} for row in rows]
    every = [row | {"text": text} for row in several for text in row["text"]]
    assert same(fit(several, captions="expand"), fit(every))
    columns = PairColumns(seed=4)
    chosen = [row | {"text": columns.slots_of(row, i, i)[0].text} for i, row in enumerate(several)]
    assert same(fit(several, seed=4), fit(chosen))
    assert not same(fit(several, seed=4), fit(several, seed=5))


def test_max_pairs_counts_slots() -> None:
    several = [row | {"text": ["a cat", "a dog", row["text"]]} for row in pairs(8)]
    for source in (several, iter(several)):
        posterior = fit(source, captions="expand", max_pairs=10)
        assert posterior.num_pairs == posterior.provenance["num_read"] == 10


# What is noted


def test_what_is_noted() -> None:
    features = Features({"image": ImageFeature(), "text": Value("string")})
    data = Dataset.from_list(pairs(12), features=features, split="validation")
    began = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    notes = fit(data, seed=3, provenance={"who": "me", "seed": "mine"}).provenance
    assert began <= datetime.datetime.fromisoformat(notes.pop("finished_at"))
    assert notes.pop("seconds") > 0
    assert notes == {
        "image_column": "image",
        "text_column": "text",
        "captions": "sample",
        "seed": "mine",
        "batch_size": 2,
        "on_error": "raise",
        "tower_dtype": "float32",
        "sharding": "rows",
        "dataset_config": None,
        "dataset_split": "validation",
        "dataset_fingerprint": data._fingerprint,
        "num_blocks": 3,
        "num_read": 12,
        "num_dropped": 0,
        "num_skipped": 0,
        "skipped": [],
        "num_processes": 1,
        "who": "me",
    }


def test_what_is_noted_survives_saving(tmp_path: Any) -> None:
    posterior = fit(spoiled(2), dtype="bfloat16", **SKIP)
    posterior.save_pretrained(tmp_path)
    loaded = BayesVLMPosterior.from_pretrained(tmp_path)
    assert loaded.provenance == posterior.provenance
    assert loaded.provenance["tower_dtype"] == "bfloat16"


# Processes


def test_a_stream_comes_to_its_end_in_more_processes_than_a_block_has_pairs(tmp_path: Any) -> None:
    code = """
import torch.distributed as dist
from test_pair_blocks import Processor, fit, pairs

dist.init_process_group("gloo")
posterior = fit(iter(pairs(7)), contrast_size=2, num_workers=0)
if dist.get_rank() == 0:
    posterior.save_pretrained("posterior")
dist.destroy_process_group()
"""
    (tmp_path / "run.py").write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3"]
    done = subprocess.run(
        [*launcher, "--standalone", "run.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = BayesVLMPosterior.from_pretrained(tmp_path / "posterior")
    alone = fit(iter(pairs(7)), contrast_size=2)
    assert found.num_pairs == alone.num_pairs == 6
    torch.testing.assert_close(found.image.B, alone.image.B, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sharding", ["files", "given"])
def test_every_process_with_data_of_its_own_has_a_part_of_each_block(sharding: Any) -> None:
    with pytest.raises(ValueError, match="contrast_size=2 leaves some of 3 processes without"):
        BlockPlan(2, 1, None, sharding, Ranks(0, 3))
    plans = [BlockPlan(7, 2, None, sharding, Ranks(rank, 3)) for rank in range(3)]
    sizes = [stop - start for start, stop in (plan.window(4) for plan in plans)]
    assert sum(sizes) == 7
    assert min(sizes) >= 1


# Settings and towers that cannot be used


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sharding": "blocks"}, "sharding must be 'rows', 'files' or 'given'"),
        ({"captions": "first"}, "captions must be"),
        ({"on_error": "ignore"}, "on_error must be"),
        ({"max_skipped_share": 1.5}, "max_skipped_share must be between 0 and 1"),
        ({"max_skipped_share": float("nan")}, "max_skipped_share"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"seed": -1}, "seed must be"),
        ({"text_column": ""}, "column"),
        ({"objective": "reference", "damping": "exact"}, "use objective='evidence'"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(pairs(4), **change)


@pytest.mark.parametrize("sharding", ["rows", "files", "given"])
def test_sharding_is_nothing_to_a_single_process(sharding: Any) -> None:
    found = fit(pairs(9), sharding=sharding)
    assert same(found, fit(pairs(9)))
    assert found.provenance["sharding"] == "rows"


def test_processes_without_a_connection_are_refused() -> None:
    lonely = SimpleNamespace(
        num_processes=2,
        device="cpu",
        distributed_type="TPU",
        unwrap_model=lambda model: model,
    )
    with pytest.raises(ValueError, match=r"2 processes that torch\.distributed does not connect"):
        fit(pairs(4), accelerator=lonely)


@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
def test_nan_from_a_tower(tower: str) -> None:
    vlm = tiny_vlm()
    with torch.no_grad():
        next(getattr(vlm, tower).encoder.parameters()).fill_(torch.nan)
    kind = "image" if tower == "vision_model" else "text"
    with pytest.raises(ValueError, match=rf"the towers gave NaN or infinity \({kind}\."):
        fit(pairs(4), model=vlm)
    assert not any(module._forward_pre_hooks for module in vlm.modules())


def test_embeddings_of_zero() -> None:
    vlm = tiny_vlm()
    with torch.no_grad():
        vlm.visual_projection.weight.zero_()
    with pytest.raises(ValueError, match="zero"):
        fit(pairs(4), model=vlm)


def test_an_accelerator_leaves_the_model_where_it_was() -> None:
    from accelerate import Accelerator

    vlm = tiny_vlm()
    before = [parameter.data_ptr() for parameter in vlm.parameters()]
    posterior = fit(pairs(9), model=vlm, accelerator=Accelerator(cpu=True))
    assert [parameter.data_ptr() for parameter in vlm.parameters()] == before
    assert same(posterior, fit(pairs(9), model=vlm))

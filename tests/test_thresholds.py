"""The rules that choose between our CUDA kernels and torch's function, and how they follow from measurements."""

from __future__ import annotations

import itertools
import json
from importlib import resources
from typing import Any

import pytest
import torch

from benchmarks.thresholds import MARGIN, boxes, rules_of
from seqattn_kernels import backends, ops, thresholds

FILES = [p for p in resources.files("seqattn_kernels.thresholds").iterdir() if p.name.endswith(".json")]


def request(cell: str = "lstm", hidden: int = 128, batch: int = 4, steps: int = 64, **options: Any) -> Any:
    training = options.pop("training", False)
    dtype = options.pop("dtype", torch.bfloat16)
    device = torch.device(options.pop("device", "cuda"), 0)
    return backends.Request(cell, device, dtype, steps * batch, batch, hidden, training, **options)


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.name)
def test_every_file_is_well_formed(file: Any) -> None:
    data = json.loads(file.read_text())
    assert set(data) == {"gpu", "measured", "rules"}
    for rule in data["rules"]:
        assert set(rule["cells"]) <= set(ops.recurrence.CELLS)
        assert set(rule["dtypes"]) <= {"float64", "float32", "bfloat16", "float16"}
        assert set(rule["training"]) <= {False, True}
        for name in ("hidden", "batch", "steps"):
            least, most = rule[name]
            assert most is None or least <= most


def test_names_of_files() -> None:
    assert thresholds.file_name("NVIDIA H200") == "nvidia_h200.json"
    assert thresholds.file_name("NVIDIA A100-SXM4-80GB") == "nvidia_a100_sxm4_80gb.json"
    assert thresholds.rules("a GPU nobody has seen") == thresholds.rules("default") == ()


RULE = {
    "cells": ["lstm"], "dtypes": ["bfloat16"], "training": [False],
    "hidden": [128, 256], "batch": [1, 8], "steps": [16, None],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"hidden": 256, "batch": 8, "steps": 16}, True),
        ({"steps": 100_000}, True),
        ({"hidden": 127}, False),
        ({"hidden": 257}, False),
        ({"batch": 9}, False),
        ({"steps": 15}, False),
        ({"cell": "gru"}, False),
        ({"dtype": torch.float16}, False),
        ({"training": True}, False),
        ({"directions": 2}, False),
        ({"projected": True}, False),
        ({"packed": True}, False),
    ],
)
def test_which_requests_a_rule_speaks_of(changes: dict[str, Any], fits: bool) -> None:
    assert thresholds.fits(RULE, request(**changes)) == fits


@pytest.mark.parametrize("known", [False, True])
def test_measured_cases_are_served_by_our_kernels(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    monkeypatch.setattr(backends.native, "_cuda_why_not", None)
    monkeypatch.setattr(backends, "_capabilities", {0: (9, 0)})
    monkeypatch.setattr(thresholds, "_known", {0: (RULE,) if known else ()})
    choose = backends.choose
    assert choose(backends.RECURRENCE, request()) == ("cuda" if known else "torch")
    assert choose(backends.RECURRENCE, request(hidden=512)) == "torch"
    assert choose(backends.RECURRENCE, request(hidden=512), "cuda") == "cuda"
    assert choose(backends.RECURRENCE, request(hidden=512, extras="lengths=")) == "cuda"
    assert choose(backends.RECURRENCE, request(hidden=512, training=True, eval_backward=True)) == "cuda"
    assert choose(backends.RECURRENCE, request(sequence=False)) == "torch"
    assert choose(backends.RECURRENCE, request(device="cpu")) != "cuda"


@pytest.mark.parametrize("allowed", [False, True])
def test_rules_for_float32_are_those_of_tf32(monkeypatch: pytest.MonkeyPatch, allowed: bool) -> None:
    monkeypatch.setattr(thresholds, "_known", {0: ({**RULE, "dtypes": ["float32", "float16"]},)})
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    assert thresholds.faster_than_torch(request(dtype=torch.float32)) == allowed
    assert thresholds.faster_than_torch(request(dtype=torch.float16))


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.native, "_cuda_why_not", None)
    monkeypatch.setattr(backends, "_capabilities", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.raises(RuntimeError, match=r"need compute capability 8\.0, got 7\.5"):
        backends.choose(backends.RECURRENCE, request(), "cuda")
    assert backends.choose(backends.RECURRENCE, request(extras="lengths=")) == "reference"


def test_attention_and_decoders_of_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_capabilities", {0: (7, 5)})
    monkeypatch.setattr(ops.attention_cuda, "why_not", lambda: None)
    device = torch.device("cuda", 0)
    attention = backends.AttentionRequest(device, torch.bfloat16)
    assert backends.choose(backends.ATTENTION, attention) == "reference"
    with pytest.raises(RuntimeError, match=r"the Triton kernels need compute capability 8\.0, got 7\.5"):
        backends.choose(backends.ATTENTION, attention, "triton")
    reason = "the decoder's kernel needs clusters of 16 blocks (sm_90, sm_100)"
    decoder = backends.DecoderRequest(device, torch.bfloat16, None, None, cuda_unserved=reason)
    assert backends.choose(backends.DECODER, decoder) == "composed"
    with pytest.raises(RuntimeError, match="needs clusters of 16 blocks"):
        backends.choose(backends.DECODER, decoder, "cuda")


def test_torch_compile_reads_the_rules_as_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "_known", {})
    monkeypatch.setattr(thresholds, "rules", lambda gpu: (RULE,))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")

    def choose(x: torch.Tensor, hidden: int) -> torch.Tensor:
        return x + 1 if thresholds.faster_than_torch(request(hidden=hidden)) else x

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    x = torch.zeros(2)
    assert compiled(x, 128).tolist() == [1, 1]
    assert compiled(x, 512).tolist() == [0, 0]


def point(hidden: int, batch: int, steps: int, ratio: float, variant: str = "plain") -> dict[str, Any]:
    place = {"cell": "gru", "dtype": "float32", "training": True, "variant": variant}
    return {**place, "hidden": hidden, "batch": batch, "steps": steps, "torch_ms": 1.0, "ours_ms": ratio}


def test_no_rule_reaches_a_point_that_was_lost() -> None:
    lost = {(128, 16), (512, 1), (512, 4)}
    points = [
        point(h, b, t, 1.0 if (h, b) in lost else 0.5)
        for h, b, t in itertools.product((64, 128, 512), (1, 4, 16), (8, 64))
    ]
    rules = rules_of(points)
    for p in points:
        asked = request("gru", p["hidden"], p["batch"], p["steps"], training=True, dtype=torch.float32)
        assert any(thresholds.fits(rule, asked) for rule in rules) == ((p["hidden"], p["batch"]) not in lost)
    # Between two points of which one was lost, torch serves.
    for hidden, batch in ((100, 16), (300, 4), (128, 10), (512, 10)):
        asked = request("gru", hidden, batch, 64, training=True, dtype=torch.float32)
        assert not any(thresholds.fits(rule, asked) for rule in rules)


def test_a_rule_begins_at_the_shortest_sequence_from_which_on_all_were_won() -> None:
    rules = rules_of([point(64, 1, 8, 1.2), point(64, 1, 64, MARGIN * 0.99)])
    assert [rule["steps"] for rule in rules] == [[64, None]]
    assert rules_of([point(64, 1, 8, 0.5), point(64, 1, 64, 1.2)]) == []
    assert [rule["steps"] for rule in rules_of([point(64, 1, 8, 0.5), point(64, 1, 64, 0.5)])] == [[8, None]]


def test_boxes_cover_what_was_won_and_nothing_else() -> None:
    won = {(h, b): not (h == 2 and b == 1) for h in (1, 2, 3) for b in (1, 2)}
    covered = {(h, b) for (h0, h1), (b0, b1) in boxes(won) for h, b in won if h0 <= h <= h1 and b0 <= b <= b1}
    assert covered == {key for key, value in won.items() if value}


@pytest.mark.parametrize(
    ("variant", "options"), [("two directions", {"directions": 2}), ("packed", {"packed": True})], ids=str
)
@pytest.mark.parametrize("ratios", [(0.5, 0.5), (0.5, 1.1), ()], ids=str)
def test_variants_need_measurements_of_their_own(variant: str, options: dict[str, Any], ratios: Any) -> None:
    points = [point(h, b, 16, 0.5) for h in (64, 128) for b in (1, 8)]
    points += [point(h, 1, 16, ratio, variant) for h, ratio in zip((64, 128), ratios, strict=False)]
    (rule,) = rules_of(points)
    plain = request("gru", 64, 1, 16, training=True, dtype=torch.float32)
    assert thresholds.fits(rule, plain)
    asked = request("gru", 64, 1, 16, training=True, dtype=torch.float32, **options)
    assert thresholds.fits(rule, asked) == (ratios == (0.5, 0.5))


def test_the_grid_names_every_cell() -> None:
    from benchmarks.thresholds import grid

    assert {cell for cell, *_ in grid(quick=False)} == set(ops.recurrence.CELLS)
    assert len(set(grid(quick=True))) < len(set(grid(quick=False)))

"""Which decoders one CUDA kernel takes and why it takes no others, without a GPU; how the others attend in training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from seqattn_kernels import backends, native, nn, ops
from seqattn_kernels.functional import decoder_loop, decoder_run
from tests.compare import assert_close_to_float64
from tests.test_decoder import CASES, REMEMBERING_CASES, make, run_with_gradients

needs_native = pytest.mark.skipif(native.why_not() is not None, reason="the native kernels were not built")


def served(decoder: nn.AttentionDecoder) -> dict[str, Any]:
    """Arguments of `unserved` for a decoder of one layer."""
    B, T, S = 2, 3, 5
    parts = decoder._parts()
    keys = torch.zeros(B, S, parts.hidden_size if parts.w_query is None else len(parts.w_query))
    memory = decoder_run.make_memory(parts, keys, torch.zeros(B, S, decoder.value_size), None, None)
    state = decoder_run.begin(parts, memory)
    t = decoder_run._tensors(parts, torch.zeros(B, T, decoder.input_size), state)
    return {"spec": parts.spec, "t": t, "weights": parts.weights, "gradients": False}


def usual(**options: Any) -> nn.AttentionDecoder:
    return nn.AttentionDecoder(8, 16, 16, 8, **{"attention_size": 16} | options)


TAKEN: list[dict[str, Any]] = [
    *({"cell": cell} for cell in ("rnn", "rnn_relu", "gru", "lstm")),
    {"bias": False},
    {"output_size": 6},
    {"score": "concat"},
    {"score": "location", "score_options": {"filters": 3, "kernel_size": 3}},
    {"score": "location", "score_options": {"filters": 3, "kernel_size": 3, "cumulative": False}},
    {"score": "coverage"},
]


@pytest.mark.parametrize("options", TAKEN, ids=str)
def test_taken(options: dict[str, Any]) -> None:
    assert ops.decoder_cuda.unserved(**served(usual(**options))) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"order": "luong"}, "attends before the update, not in the order 'luong'"),
        ({"order": "between"}, "attends before the update, not in the order 'between'"),
        ({"score": "dot"}, "has additive scores, not 'dot'"),
        ({"score": "general"}, "has additive scores, not 'dot'"),
        ({"feedback": "none"}, "feeds back the context, and nothing else"),
        ({"feedback": "both", "output_size": 6}, "feeds back the context, and nothing else"),
        ({"feedback": "attentional", "output_size": 6}, "feeds back the context, and nothing else"),
        ({"num_layers": 2}, "has one layer"),
    ],
    ids=str,
)
def test_not_taken(options: dict[str, Any], reason: str) -> None:
    assert reason in str(ops.decoder_cuda.unserved(**served(usual(**options))))


def test_tensors_that_are_not_taken() -> None:
    given = served(usual())
    t = given["t"]
    assert t.v is not None
    changes: dict[str, dict[str, Any]] = {
        "projects the query, got query_weight None": {"t": t._replace(w_query=None)},
        "takes tensors of one dtype": {"t": t._replace(v=t.v.double())},
    }
    for reason, change in changes.items():
        assert reason in str(ops.decoder_cuda.unserved(**given | change))


@pytest.mark.parametrize("score", ["location", "coverage"])
def test_gradients_of_earlier_weights_are_not_taken(score: str) -> None:
    given = served(usual(score=score))
    assert "no gradients of scores that know" in str(ops.decoder_cuda.unserved(**given | {"gradients": True}))
    assert ops.decoder_cuda.unserved(**served(usual()) | {"gradients": True}) is None
    without = given["t"]._replace(w_conv=given["t"].w_conv[:0])
    assert "convolutions with filters" in str(ops.decoder_cuda.unserved(**given | {"t": without}))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"zoneout": 0.1}, "zoneout"),
        ({"hidden_dropout": 0.1}, "dropout"),
        ({"num_layers": 2, "dropout": 0.1}, "dropout"),
        ({"output_size": 6, "output_dropout": 0.1}, "dropout"),
        ({}, None),
    ],
    ids=str,
)
def test_options_of_a_loop(options: dict[str, Any], reason: str | None) -> None:
    parts = usual(**options)._parts()
    memory = decoder_run.make_memory(parts, torch.zeros(2, 5, 16), torch.zeros(2, 5, 8), None, None)
    request = decoder_run._request(parts, torch.zeros(2, 3, 8), decoder_run.begin(parts, memory), False)
    found = backends._cuda_decoder_why_not(replace(request, device=torch.device("cuda")))
    assert found is None if reason is None else f"the decoder's kernel doesn't have {reason}" == found
    sampled = decoder_run._request(parts, torch.zeros(2, 3, 8), decoder_run.begin(parts, memory), True)
    assert "doesn't have" in str(backends._cuda_decoder_why_not(replace(sampled, device=torch.device("cuda"))))
    floating = replace(memory, mask=torch.zeros(2, 5))
    masked = decoder_run._request(parts, torch.zeros(2, 3, 8), decoder_run.begin(parts, floating), False)
    if reason is None:
        assert "added to the scores" in str(
            backends._cuda_decoder_why_not(replace(masked, device=torch.device("cuda")))
        )


def plan(**changes: Any) -> str:
    assert native.extension is not None
    usual = {"cell": "lstm", "dtype": "bfloat16", "source": 100, "hidden": 512, "attention": 512, "value": 512}
    device = {"sm": 90, "sm_count": 132, "smem_per_block": 227 * 1024, "max_cluster": 16}
    return native.extension.decoder_why_not(**usual | device | changes)


LOCATION = {"filters": 32, "channels": 2, "window": 31}


@needs_native
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"dtype": "float16"}, ""),
        ({"sm": 80, "max_cluster": 1}, "needs clusters of 16 blocks"),
        ({"dtype": "float32"}, "takes bfloat16 and float16"),
        ({"dtype": "float64"}, "takes bfloat16 and float16"),
        ({"hidden": 513}, "takes H up to 512, got 513"),
        ({"attention": 520}, "takes A up to 512, got 520"),
        ({"value": 520}, "takes D up to 512, got 520"),
        ({"attention": 100}, "A and D that are multiples of 8"),
        ({"value": 100}, "A and D that are multiples of 8"),
        ({"source": 0}, "sources with keys"),
        ({"source": 1400}, ""),
        ({"source": 2000}, "no room for the scores of 2000 keys"),
        (LOCATION, ""),
        (LOCATION | {"source": 1000}, "no room for the scores of 1000 keys with 32 features"),
        (LOCATION | {"source": 1000, "hidden": 256, "attention": 128}, ""),
        (LOCATION | {"source": 600, "cell": "gru"}, ""),
        ({"filters": 1, "channels": 1, "window": 1, "source": 900}, ""),
    ],
    ids=str,
)
def test_sizes(changes: dict[str, Any], reason: str) -> None:
    found = plan(**changes)
    assert reason in found if reason else not found


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops of steps attend as they would on a GPU, with gradients."""
    monkeypatch.setattr(decoder_loop, "attends_by_stock", lambda device, gradients: gradients)


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize(("cell", "score", "order", "feedback", "output", "layers", "size"), CASES[::3])
def test_stock_attention(cell, score, order, feedback, output, layers, size) -> None:
    decoder, given = make(cell, score, order, feedback, output, layers, size)
    oracle = run_with_gradients(decoder, given, backend="reference")
    assert_close_to_float64(run_with_gradients(decoder, given, backend="composed"), oracle)


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize(("score", "options", "order", "cell", "layers", "size"), REMEMBERING_CASES)
def test_stock_attention_that_remembers(score, options, order, cell, layers, size) -> None:
    decoder, given = make(cell, score, order, "both", 6, layers, size, score_options=options)
    oracle = run_with_gradients(decoder, given, backend="reference")
    assert_close_to_float64(run_with_gradients(decoder, given, backend="composed"), oracle)


@pytest.mark.usefixtures("stock")
@pytest.mark.parametrize("score", ["additive", "dot", "location"])
@pytest.mark.parametrize("floating", [False, True])
def test_stock_attention_ignores_what_is_masked(score: str, floating: bool) -> None:
    decoder, given = make("gru", score)
    mask = torch.rand(given["keys"].shape[:2]) < 0.5
    mask[0] = False
    given["mask"] = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf) if floating else mask
    clean = run_with_gradients(decoder, given, backend="reference")
    hidden = ~mask | (torch.arange(mask.shape[1]) >= given["lengths"][:, None])
    dirty = given | {k: given[k].masked_fill(hidden.unsqueeze(2), torch.nan) for k in ("keys", "values")}
    found = run_with_gradients(decoder, dirty, backend="composed")
    assert_close_to_float64(found, clean)


def test_who_attends_by_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoder_loop.attends_by_stock(torch.device("cuda"), True)
    assert not decoder_loop.attends_by_stock(torch.device("cuda"), False)
    assert not decoder_loop.attends_by_stock(torch.device("cpu"), True)
    asked: list[bool] = []

    def ask(device: torch.device, gradients: bool) -> bool:
        asked.append(gradients)
        return False

    monkeypatch.setattr(decoder_loop, "attends_by_stock", ask)
    decoder, given = make()
    decoder(**given, backend="composed")
    with torch.no_grad():
        decoder(**given, backend="composed")
    assert asked == [True, False]

"""Sequences with bfloat16 weights.

The oracle computes every step in float64 from the states that the kernel itself had before that step, and rounds
weights, inputs and previous states to bfloat16 where the kernel does. Both then round the very same float32 numbers, so
that no state near the middle of two bfloat16 numbers is rounded up by one and down by the other, and the tolerance is
that of float32. An oracle that ran the whole sequence on its own would need a far wider one: a state that differs in
its last float32 digit is rounded to another bfloat16 number once in some ten thousand times.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seqattn_kernels import functional, native, ops
from seqattn_kernels.accelerate import accelerate
from seqattn_kernels.nn import freeze, frozen, unfreeze
from tests.cases import KINDS, SEQUENCES, RecurrentKind
from tests.compare import assert_close_to_float64, assert_same_bits

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def rounded(t: Tensor) -> Tensor:
    return t.to(torch.bfloat16).double()


def previous(states: Tensor, initial: Tensor, lengths: Tensor, reverse: bool) -> Tensor:
    """[T, B, H]: the state before each step, from those after each step."""
    if not reverse:
        return torch.cat([initial[None], states])[:-1]
    after = torch.cat([states, initial[None]])[1:]
    last = torch.arange(len(states))[:, None, None] == lengths[:, None] - 1
    return torch.where(last, initial, after)


def step(kind: RecurrentKind, x: Tensor, h: Tensor, c: Tensor | None, weights: dict[str, Tensor]):
    """One step of every row in float64: h' and c'."""
    from_x = rounded(x) @ rounded(weights["weight_ih"]).T
    from_h = rounded(h) @ rounded(weights["weight_hh"]).T
    if "bias_ih" in weights:
        from_x, from_h = from_x + weights["bias_ih"].double(), from_h + weights["bias_hh"].double()
    if kind.name == "gru":
        (r, z, n), (r_h, z_h, n_h) = from_x.chunk(3, -1), from_h.chunk(3, -1)
        update = torch.sigmoid(z + z_h)
        return (1 - update) * torch.tanh(n + torch.sigmoid(r + r_h) * n_h) + update * h.double(), None
    if kind.name == "lstm":
        i, f, g, o = (from_x + from_h).chunk(4, -1)
        new = torch.sigmoid(f) * c.double() + torch.sigmoid(i) * torch.tanh(g)
        out = torch.sigmoid(o) * torch.tanh(new)
        return (out @ weights["weight_hr"].double().T if "weight_hr" in weights else out), new
    return (torch.relu if kind.name == "rnn_relu" else torch.tanh)(from_x + from_h), None


def check(kind: RecurrentKind, module: nn.RNNBase, x: Tensor, hx=None, lengths: Tensor | None = None, layout="time"):
    """Run one layer, ``x`` [T, B, I], and hold every step's states against the oracle."""
    names = [n.removesuffix("_reverse").removesuffix("_l0") for n in module._flat_weights_names]
    weights = [w.detach() for w in module._flat_weights]
    D, (T, B) = 2 if module.bidirectional else 1, x.shape[:2]
    options = {"bias": module.bias, "bidirectional": module.bidirectional}
    if module.proj_size:
        options["proj_size"] = module.proj_size
    packed = functional.pack_weights(
        kind.name, weights, bias=module.bias, bidirectional=module.bidirectional, dtype=torch.bfloat16
    )
    arguments = {"packed_weights": packed, "return_all_states": True, "backend": "cpu", **options}
    if layout == "packed":
        given = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, state, all_states = kind.run(given, hx, weights, **arguments)
        output, all_states = pad_packed_sequence(output)[0], pad_packed_sequence(all_states)[0]
    elif layout == "batch":
        output, state, all_states = kind.run(
            x.transpose(0, 1), hx, weights, batch_first=True, lengths=lengths, **arguments
        )
        output, all_states = output.transpose(0, 1), all_states.transpose(0, 1)
    else:
        output, state, all_states = kind.run(x, hx, weights, lengths=lengths, **arguments)

    lengths = torch.full((B,), T) if lengths is None else lengths
    valid = (torch.arange(T)[:, None] < lengths)[..., None]
    h_n, c_n = state if kind.has_cell_state else (state, None)
    for d in range(D):
        own = dict(list(zip(names, weights, strict=True))[d * len(names) // D : (d + 1) * len(names) // D])
        out = output.chunk(D, -1)[d]
        h0 = torch.zeros(B, out.shape[-1]) if hx is None else (hx[0] if kind.has_cell_state else hx)[d]
        h, c, c0 = previous(out, h0, lengths, d == 1), None, None
        if kind.has_cell_state:
            cells = all_states.chunk(D, -1)[d]
            c0 = torch.zeros(B, cells.shape[-1]) if hx is None else hx[1][d]
            c = previous(cells, c0, lengths, d == 1)
        expected_h, expected_c = step(kind, x, h, c, own)
        assert_close_to_float64(out, torch.where(valid, expected_h, 0.0))
        ends = lengths - 1 if d == 0 else torch.zeros_like(lengths)
        columns = torch.arange(B)
        assert_same_bits(h_n[d], torch.where(lengths[:, None] > 0, out[ends.clamp(min=0), columns], h0))
        if kind.has_cell_state:
            assert_close_to_float64(cells, torch.where(valid, expected_c, 0.0))
            assert_same_bits(c_n[d], torch.where(lengths[:, None] > 0, cells[ends.clamp(min=0), columns], c0))


@kinds
@pytest.mark.parametrize("shape", SEQUENCES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_every_step(kind, shape, bias, threads):
    B, T, I, H = shape
    module = kind.stock(I, H, bias=bias)
    check(kind, module, torch.randn(T, B, I))
    check(kind, module, torch.randn(T, B, I), kind.state(1, B, H))


@kinds
@pytest.mark.parametrize("layout", ["time", "batch", "packed"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_lengths_and_both_directions(kind, layout, given, threads):
    B, T, I, H = 5, 7, 9, 35
    lengths = torch.tensor([3, 1, 7, 1, 3] if layout == "packed" else [3, 0, 7, 1, 3])
    hx = kind.state(2, B, H) if given else None
    check(kind, kind.stock(I, H, bidirectional=True), torch.randn(T, B, I), hx, lengths, layout)


@pytest.mark.parametrize("proj_size", [1, 5, 20])
@pytest.mark.parametrize("lengths", [None, [4, 2, 6]], ids=["full", "lengths"])
def test_projections(proj_size, lengths, threads):
    kind, (B, T, I, H) = KINDS["lstm"], (3, 6, 4, 37)
    module = kind.stock(I, H, bidirectional=True, proj_size=proj_size)
    hx = torch.randn(2, B, proj_size), torch.randn(2, B, H)
    check(kind, module, torch.randn(T, B, I), hx, None if lengths is None else torch.tensor(lengths))


@kinds
@pytest.mark.parametrize(("B", "T", "H"), [(1, 1100, 5), (3, 400, 17), (40, 30, 33), (600, 2, 3)], ids=str)
def test_longer_than_a_chunk(kind, B, T, H, threads):
    module = kind.stock(5, H, bidirectional=True)
    check(kind, module, torch.randn(T, B, 5))
    check(kind, module, torch.randn(T, B, 5), None, torch.randint(0, T + 1, (B,)), "batch")


@pytest.mark.parametrize("capability", ["avx512", "avx2", "default"])
def test_other_instruction_sets(capability):
    """The same tests where the processor has no instructions for bfloat16; avx512 is that set without them."""
    program = (
        "import sys, pytest; from seqattn_kernels import native\n"
        "assert not native.extension.has_bfloat16_instructions()\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    selection = "(every_step or lengths or projections or longer or extreme) and not 2T"
    process = subprocess.run(
        [sys.executable, "-c", program, "-q", "-p", "no:cacheprovider", __file__, "-k", selection],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-2000:]


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 1e-30, 3.4e38])
def test_extreme_input(kind, value):
    """3.4e38 rounds to infinity. NaNs must not turn into numbers, whatever their bits."""
    module = kind.stock(3, 20, bidirectional=True)
    x = torch.randn(6, 2, 3)
    x[2, 1, 0] = value
    check(kind, module, x)
    if value != value:
        x.view(torch.int32)[2, 1, 0] = 0x7FFFFFFF
        check(kind, module, x)


@kinds
def test_results_do_not_depend_on_threads_or_runs(kind):
    module = freeze(accelerate(kind.stock(70, 200, bidirectional=True)), weights="bfloat16")
    x = torch.randn(6, 19, 70)

    def run(threads):
        torch.set_num_threads(threads)
        with torch.no_grad():
            return module(x)

    first = run(2)
    for threads in (2, 2, 1):
        assert_same_bits(run(threads), first)


@kinds
@pytest.mark.parametrize("ask", ["accelerate", "frozen", "freeze"])
def test_modules(kind, ask):
    """Two layers are near stock's, and differ from those of float32 weights."""
    options = {"num_layers": 2, "bidirectional": True}
    stock = kind.stock(24, 40, **options)
    x = torch.randn(12, 3, 24)
    ours = accelerate(copy.deepcopy(stock))
    with torch.no_grad():
        exact = ours(x)
        oracle = copy.deepcopy(stock).double()(x.double())
        if ask == "frozen":
            with frozen(ours, weights="bfloat16"):
                result = ours(x)
                with frozen(ours):
                    assert_same_bits(ours(x), result)
        else:
            if ask == "accelerate":
                accelerate(ours, frozen=True, weights=torch.bfloat16)
            else:
                freeze(ours, weights=torch.bfloat16)
            result = ours(x)
            unfreeze(ours)
        assert_close_to_float64(result, oracle, torch.bfloat16)
        assert result[0].dtype == torch.float32
        assert not torch.equal(result[0], exact[0])
        assert_same_bits(ours(x), exact)


def test_parameters_stay_and_cells_keep_float32():
    model = nn.ModuleDict({"encoder": nn.LSTM(5, 7), "cell": nn.LSTMCell(7, 7)})
    before = copy.deepcopy(model.state_dict())
    x, h = torch.randn(3, 2, 5), torch.randn(2, 7)
    with torch.no_grad():
        with frozen(accelerate(model)):
            expected = model["cell"](h)
        accelerate(model, frozen=True, weights="bfloat16")
        assert_same_bits(model["cell"](h), expected)
        model["encoder"](x)
    assert_same_bits(model.state_dict(), before)


def test_what_is_packed_has_half_the_size():
    weights = [w.detach() for w in nn.LSTM(64, 64, bias=False)._flat_weights]
    (wide,), (narrow,) = (
        functional.pack_weights("lstm", weights, bias=False, dtype=dtype)[0] for dtype in (None, torch.bfloat16)
    )
    biases = 4 * 4 * 64
    assert narrow.dtype == torch.bfloat16
    assert narrow.nbytes - biases == (wide.nbytes - biases) / 2


@kinds
def test_operators_pass_opcheck(kind):
    number = ops.recurrence.CELLS.index(kind.name)
    weights = [w.detach() for w in kind.stock(5, 7, bidirectional=True)._flat_weights]
    checks = ("test_schema", "test_faketensor")
    pack = torch.ops.seqattn.recurrence_pack.default
    torch.library.opcheck(pack, (number, weights, True, True), test_utils=checks)
    packed = pack(number, weights, True, True)
    arguments = (number, torch.randn(4, 3, 5), None, 0, None, None, weights, packed, True, False, kind.has_cell_state)
    torch.library.opcheck(torch.ops.seqattn.recurrence_fwd.default, arguments, test_utils=checks)


def test_messages():
    stock = nn.GRU(3, 4)
    weights = [w.detach() for w in stock._flat_weights]
    with pytest.raises(ValueError, match="weights: expected None unless frozen=True, got 'bfloat16'"):
        accelerate(stock, weights="bfloat16")
    assert type(stock) is nn.GRU
    for wrong in ("float16", torch.float16, 3):
        with pytest.raises(ValueError, match=r"weights: expected None, 'bfloat16' or torch.bfloat16"):
            accelerate(stock, frozen=True, weights=wrong)
    with pytest.raises(ValueError, match=r"dtype: expected None or torch.bfloat16, got torch.float16"):
        functional.pack_weights("gru", weights, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"weights: expected torch.float32 to round to bfloat16, got torch.float64"):
        freeze(accelerate(nn.GRU(3, 4).double()), weights="bfloat16")
    kept = freeze(accelerate(nn.GRU(3, 4)))
    with pytest.raises(RuntimeError, match="GRU: its weights are frozen as they are"), frozen(kept, weights="bfloat16"):
        pass
    with pytest.raises(RuntimeError, match="its weights are frozen as they are"):
        freeze(kept, weights="bfloat16")
    assert kept._frozen is not None
    freeze(unfreeze(kept), weights="bfloat16")
    with pytest.raises(RuntimeError, match="gradients would be recorded"):
        kept(torch.randn(2, 1, 3))


def test_messages_of_the_operators():
    weights = [w.detach() for w in nn.GRU(3, 4)._flat_weights]
    x = torch.randn(2, 1, 3)
    number = ops.recurrence.CELLS.index("gru")
    packed = ops.recurrence.pack_recurrence("gru", weights, True, True)
    forward = torch.ops.seqattn.recurrence_fwd.default
    with pytest.raises(RuntimeError, match="packed: expected no bfloat16 where gradients are wanted"):
        forward(number, x, None, 0, None, None, weights, packed, True, True, False)
    with pytest.raises(RuntimeError, match=r"packed: expected shape \["):
        forward(number, x, None, 0, None, None, weights, [packed[0][:-2]], True, False, False)
    with pytest.raises(RuntimeError, match="expected float32 to round to bfloat16, got float64"):
        torch.ops.seqattn.recurrence_pack.default(number, [w.double() for w in weights], True, True)
    with pytest.raises(RuntimeError, match="packed"):
        functional.gru_cell(x[0], None, *weights, packed_weights=packed)


def test_gradients_of_inputs_with_packed_weights():
    """They come from the weights as they are: a forward that records gradients takes no rounded ones."""
    weights = [w.detach() for w in nn.GRU(3, 4)._flat_weights]
    x = torch.randn(2, 1, 3, requires_grad=True)
    packed = functional.pack_weights("gru", weights, dtype=torch.bfloat16)
    output = functional.gru(x, None, weights, packed_weights=packed)[0]
    assert_same_bits(output, functional.gru(x, None, weights)[0])
    output.sum().backward()

"""`python -m benchmarks.gpu.small`: every GPU kernel once, forward and backward, at small and odd sizes.

What compute-sanitizer watches. Results are held against float64, so that a kernel which wrote nothing is told as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.ceilings import tf32
from tests.compare import difference

DEVICE = "cuda"
# B, T, I, H: smaller than any tile, past one, as wide as a warp's products, more than one cluster of an LSTM holds.
SEQUENCES: tuple[tuple[int, ...], ...] = (
    (1, 3, 5, 7), (3, 4, 16, 64), (9, 3, 24, 128), (2, 2, 8, 800), (17, 2, 32, 40),
)  # fmt: skip
# B, T, S, A, D
ATTENTIONS: tuple[tuple[int, ...], ...] = ((2, 1, 5, 3, 7), (2, 3, 33, 16, 16), (1, 17, 65, 40, 24))
DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STOCK: dict[str, tuple[Callable[..., nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "rnn": (nn.RNN, {}),
}


def few() -> None:
    """Leave out what differs from the rest in a size or a dtype alone: a sanitizer takes its time."""
    global SEQUENCES, ATTENTIONS, DTYPES
    SEQUENCES, ATTENTIONS, DTYPES = SEQUENCES[1:4], ATTENTIONS[1:2], DTYPES[:2]


def on_host(value: Any) -> Any:
    """What the oracle gets: tensors on the CPU, floating ones in float64."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().cpu().double() if value.is_floating_point() else value.cpu()


def check(name: str, run: Callable[..., Any], oracle: Callable[..., Any], values: list[Tensor]) -> Iterator[str]:
    """What differs between a run and its oracle in float64 on the CPU, results and gradients."""
    mine = [v.detach().requires_grad_() for v in values]
    exact = [on_host(v).requires_grad_() for v in values]
    got, expected = [list(_flat(function(*tensors))) for function, tensors in ((run, mine), (oracle, exact))]
    directions = [torch.randn_like(r) for r in got]
    gradients = torch.autograd.grad(got, mine, directions, allow_unused=True)
    wanted = torch.autograd.grad(expected, exact, [on_host(d) for d in directions], allow_unused=True)
    for index, (a, b) in enumerate(zip([*got, *gradients], [*expected, *wanted], strict=True)):
        if a is None or b is None:
            if a is not b:
                yield f"{name}: gradient {index - len(got)} is None in one of both"
            continue
        found = difference(a, b, values[0].dtype, f"{name}: tensor {index}")
        if found:
            yield found
    torch.cuda.synchronize()
    print(f"checked {name}", flush=True)  # where one hangs, or time is over


def _flat(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif result is not None:
        for each in result:
            yield from _flat(each)


def recurrences() -> Iterator[str]:
    from seqattn_kernels import backends, functional

    names = [b.name for b in backends.RECURRENCE if b.name not in ("cpu", "torch", "reference")]
    for kind, (module, options) in STOCK.items():
        for shape in SEQUENCES:
            batch, steps, width, hidden = shape
            for dtype in DTYPES:
                stock = module(width, hidden, **options).to(DEVICE, dtype)
                weights: list[Any] = list(stock._flat_weights)
                x = torch.randn(steps, batch, width, device=DEVICE, dtype=dtype)
                lengths = torch.randint(0, steps + 1, (batch,), device=DEVICE)
                function = getattr(functional, kind)
                for given in (None, lengths):
                    extras = {"lengths": given, "return_all_states": kind == "lstm"}
                    host = {key: on_host(value) for key, value in extras.items()}
                    oracle = lambda x, *w, f=function, e=host: f(x, None, w, backend="reference", **e)  # noqa: E731
                    for name in (None, *names):
                        run = lambda x, *w, f=function, e=extras, n=name: f(x, None, w, backend=n, **e)  # noqa: E731
                        label = f"{kind} {shape} {dtype} {name or 'chosen'}{' lengths' if given is not None else ''}"
                        try:
                            yield from check(label, run, oracle, [x, *weights])
                        except RuntimeError as error:
                            if "can't serve" not in str(error):
                                raise


def cells() -> Iterator[str]:
    from seqattn_kernels import functional

    for kind, module in (("lstm_cell", nn.LSTMCell), ("gru_cell", nn.GRUCell), ("rnn_cell", nn.RNNCell)):
        function = getattr(functional, kind)
        for batch, width, hidden in ((1, 5, 7), (9, 24, 128)):
            for dtype in DTYPES:
                weights = [p.detach() for p in module(width, hidden).to(DEVICE, dtype).parameters()]
                x = torch.randn(batch, width, device=DEVICE, dtype=dtype)
                run = lambda x, *w, f=function: f(x, None, *w)  # noqa: E731
                oracle = lambda x, *w, f=function: f(x, None, *w, backend="reference")  # noqa: E731
                yield from check(f"{kind} {batch, width, hidden} {dtype}", run, oracle, [x, *weights])


def attentions() -> Iterator[str]:
    from seqattn_kernels import functional, reference

    for shape in ATTENTIONS:
        batch, steps, source, width, values_width = shape
        for dtype in DTYPES:
            query, keys, values = (
                torch.randn(size, device=DEVICE, dtype=dtype)
                for size in ((batch, steps, width), (batch, source, width), (batch, source, values_width))
            )
            v = torch.randn(width, device=DEVICE, dtype=dtype)
            lengths = torch.randint(0, source + 1, (batch,), device=DEVICE)
            mask = torch.rand(batch, steps, source, device=DEVICE) < 0.7
            choices: tuple[dict[str, Tensor], ...] = ({}, {"lengths": lengths}, {"mask": mask})
            for options in choices:
                run = lambda q, k, w, v, o=options: functional.additive_attention(q, k, v, w, **o)  # noqa: E731
                host = {key: on_host(value) for key, value in options.items()}
                oracle = lambda q, k, w, v, o=host: reference.attention.additive_attention(  # noqa: E731
                    q, k, w, v, o.get("lengths"), o.get("mask")
                )
                label = f"additive {shape} {dtype} {', '.join(options)}"
                yield from check(label, run, oracle, [query, keys, values, v])


def decoders() -> Iterator[str]:
    from seqattn_kernels.functional import attention_decoder

    for kind, module in (("lstm", nn.LSTMCell), ("gru", nn.GRUCell)):
        for batch, steps, source, hidden in ((1, 3, 5, 24), (5, 4, 33, 64)):
            for dtype in DTYPES[:3]:
                cell = [p.detach() for p in module(2 * hidden, hidden).to(DEVICE, dtype).parameters()]
                tensors = [
                    torch.randn(size, device=DEVICE, dtype=dtype)
                    for size in ((batch, steps, hidden), (batch, source, hidden), (batch, source, hidden))
                ]
                query = torch.randn(hidden, hidden, device=DEVICE, dtype=dtype) / hidden**0.5
                v = torch.randn(hidden, device=DEVICE, dtype=dtype)
                lengths = torch.randint(1, source + 1, (batch,), device=DEVICE)

                def call(x, keys, values, query, v, *cell, backend=None, lengths=lengths, kind=kind):
                    found = attention_decoder(
                        x, keys, values, cell, cell=kind, query_weight=query, v=v, lengths=lengths, backend=backend
                    )
                    return found.output, found.weights

                def oracle(*tensors, call=call, lengths=lengths):
                    return call(*tensors, backend="reference", lengths=on_host(lengths))

                label = f"{kind} decoder {batch, steps, source, hidden} {dtype}"
                yield from check(label, call, oracle, [*tensors, query, v, *cell])


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    part.__name__: part for part in (recurrences, cells, attentions, decoders)
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.small", description=__doc__)
    parser.add_argument("--few", action="store_true", help="two dtypes and fewer sizes")
    parser.add_argument("--only", choices=PARTS, help="one part; all by default")
    options = parser.parse_args(arguments)
    if options.few:
        few()
    torch.manual_seed(0)
    count = 0
    with tf32(False):
        for name in [options.only] if options.only else PARTS:
            found = list(PARTS[name]())
            count += len(found)
            print(f"{name}: {len(found)} differences", *found[:10], sep="\n  ", flush=True)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())

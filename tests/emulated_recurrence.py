"""One recurrent layer through the emulated CUDA kernels, as the launcher runs it: what torch multiplies there is
multiplied in float64 here and rounded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seqattn_kernels.reference.recurrence import recurrence
from tests.emulated import Memory, emulator

DTYPE_NUMBERS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
TIME_MAJOR, BATCH_FIRST, PACKED = 0, 1, 2
H200 = {"sm": 90, "sm_count": 132, "smem_per_block": 227 * 1024, "max_cluster": 16}


@dataclass
class Layer:
    """Random weights and input of a layer, in the dtype; gradients of everything it returns."""

    cell: str
    dtype: torch.dtype
    batch: int
    steps: int
    input_size: int
    hidden: int
    directions: int = 1
    layout: int = TIME_MAJOR
    lengths: list[int] | None = None  # falling when packed
    bias: bool = True
    initial: bool = True
    projection: int = 0
    device: dict[str, int] = field(default_factory=lambda: dict(H200))

    def __post_init__(self) -> None:
        names = [info["name"] for info in emulator().CELLS]
        self.number = names.index(self.cell)
        self.info = emulator().CELLS[self.number]
        self.output = self.projection or self.hidden
        gates = self.info["gates"] * self.hidden
        shapes = [(gates, self.input_size), (gates, self.output)]
        shapes += [(gates,), (gates,)] if self.bias else []
        shapes += [(self.output, self.hidden)] if self.projection else []
        scale = self.hidden**-0.5
        if self.cell == "rnn_relu":  # its units are far from where their gradient jumps, whatever the rounding
            scale /= 4
        self.weights = [self._draw(*s, scale=scale) for _ in range(self.directions) for s in shapes]
        if self.cell == "rnn_relu" and self.bias:
            for b_ih in self.weights[2 :: len(shapes)]:
                b_ih.copy_(2 - 4 * torch.randint(0, 2, b_ih.shape))
        state = (self.directions, self.batch)
        self.h0 = self._draw(*state, self.output, scale=0.5) if self.initial else None
        self.c0 = self._draw(*state, self.hidden) if self.initial and self.info["has_cell"] else None
        steps = torch.arange(self.steps)[:, None]
        full = torch.full((self.batch,), self.steps)
        self.length = full if self.lengths is None else torch.tensor(self.lengths)
        self.valid = steps < self.length.clamp(0, self.steps)[None]  # [T, B]
        self.input = self._draw(self.steps, self.batch, self.input_size)
        if self.layout == PACKED:
            self.offsets = torch.cat([torch.zeros(1, dtype=torch.long), self.valid.sum(1).cumsum(0)])

    def _draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(self.dtype)

    def lay_out(self, padded: Tensor) -> Tensor:
        """[T, B, n] as the caller of this layout has it."""
        if self.layout == PACKED:
            return padded[self.valid]
        return padded.transpose(0, 1).contiguous() if self.layout == BATCH_FIRST else padded

    def internal(self, padded: Tensor) -> Tensor:
        """[T, B, n] as rows of the kernels; rows that aren't valid hold NaN."""
        if self.layout == PACKED:
            return padded[self.valid]
        poisoned = torch.where(self.valid[..., None], padded, torch.full_like(padded, torch.nan))
        return poisoned.reshape(self.steps * self.batch, -1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The reverse of `internal`, zeros where not valid."""
        padded = torch.zeros(self.steps, self.batch, rows.shape[-1], dtype=rows.dtype)
        if self.layout == PACKED:
            padded[self.valid] = rows
            return padded
        return rows.view(self.steps, self.batch, -1)

    def oracle(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Results, directions of their gradients, gradients (of input, weights, h0, c0), in float64."""
        leaves = [self.lay_out(self.input), *self.weights, *(s for s in (self.h0, self.c0) if s is not None)]
        leaves = [x.double().requires_grad_() for x in leaves]
        states = leaves[1 + len(self.weights) :]
        sizes = self.valid.sum(1) if self.layout == PACKED else None if self.lengths is None else self.length
        results = recurrence(
            self.cell,
            leaves[0],
            sizes,
            self.layout,
            states[0] if self.initial else None,
            states[1] if self.initial and self.info["has_cell"] else None,
            leaves[1 : 1 + len(self.weights)],
            self.bias,
        )
        present = [r for r in results if r is not None]
        generator = torch.Generator().manual_seed(0)
        given = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(self.dtype) for r in present]
        gradients = torch.autograd.grad(present, leaves, [g.double() for g in given], allow_unused=True)
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]
        return [r.detach() for r in present], given, filled


def plan_request(layer: Layer, backward: bool) -> dict[str, Any]:
    return {
        "cell": layer.number,
        "hidden": layer.hidden,
        "batch": layer.batch,
        "directions": layer.directions,
        "dtype": DTYPE_NUMBERS[layer.dtype],
        "allow_tf32": True,
        "backward": backward,
        "projected": layer.projection > 0,
    }


def plan_of(layer: Layer, path: str, backward: bool) -> Any:
    """The plan of a persistent path; why_not says why there is none."""
    return getattr(emulator(), f"plan_{path}")(plan_request(layer, backward), layer.device)


def plans_of_team(layer: Layer, path: str, size: tuple[int, int], tiles: int) -> list[Any]:
    """Plans of forward and backward that have one team of (units, blocks) do it all; none where there is no such."""
    requests = [plan_request(layer, backward) for backward in (False, True)]
    plans = [emulator().plan_of_team(r, path == "cooperative", *size, tiles) for r in requests]
    return [] if plans[0].why_not else plans


class Run:
    """The layer's kernels on emulated memory."""

    def __init__(
        self, layer: Layer, path: str, *, seed: int = 0, at_end: bool = True, plans: list[Any] | None = None
    ) -> None:
        self.layer, self.path = layer, path
        self.m = Memory(at_end)
        self.number = DTYPE_NUMBERS[layer.dtype]
        self.sum_type = torch.float64 if layer.dtype == torch.float64 else torch.float32
        self.sum_number = DTYPE_NUMBERS[self.sum_type]
        emulator().set_seed(seed)
        m, o = self.m, layer
        self.each = len(o.weights) // o.directions
        rows = int(o.valid.sum()) if o.layout == PACKED else o.steps * o.batch
        self.rows = rows
        lengths = o.length if o.lengths is not None or o.layout == PACKED else None
        self.common: dict[str, Any] = {
            "cell": o.number,
            "dtype": self.number,
            "allow_tf32": True,
            "hidden": o.hidden,
            "output": o.output,
            "directions": o.directions,
            "steps": o.steps,
            "batch": o.batch,
            "rows": rows,
            "lengths": m.put("lengths", lengths),
            "offsets": m.put("offsets", o.offsets if o.layout == PACKED else None),
            "out_step": 1 if o.layout == BATCH_FIRST else o.batch,
            "out_batch": o.steps if o.layout == BATCH_FIRST else 1,
            "w_hh": [m.put(f"w_hh[{d}]", self._weight(d, 1)) for d in range(o.directions)],
            "c0": m.put("c0", o.c0),
            "ld_output": o.directions * o.output,
            "ld_cell": o.directions * o.hidden,
        }
        if path != "stepwise":
            self.plans = plans or [plan_of(layer, path, backward) for backward in (False, True)]
            for plan in self.plans:
                assert plan.why_not == "", plan.why_not

    def _weight(self, direction: int, i: int) -> Tensor:
        return self.layer.weights[direction * self.each + i]

    def _workspace(self, plan: Any) -> int:
        return self.m.put("workspace", torch.zeros(plan.workspace_bytes, dtype=torch.uint8))

    def forward(self) -> list[Tensor]:
        """Output, h_n, c_n, cell states (the last two of a cell that has them)."""
        o, m, info = self.layer, self.m, self.layer.info
        d, b, h, n = o.directions, o.batch, o.hidden, o.output
        x = o.input.double()
        gates = torch.stack([x @ self._weight(k, 0).double().T for k in range(d)]).to(o.dtype)
        out_rows = o.lay_out(o.input).shape[:-1]
        a = self.common | {
            "x_gates": m.put("x_gates", torch.stack([o.internal(g) for g in gates])),
            "h0": m.put("h0", o.h0),
            "output_rows": m.address(m.empty("output", *out_rows, d * n, dtype=o.dtype)),
            "hn": m.address(m.empty("hn", d, b, n, dtype=o.dtype)),
            "saved": m.address(m.empty("saved", d, self.rows, h, info["kept"], dtype=o.dtype)),
            "h_prev": m.address(m.empty("h_prev", d, self.rows, n, dtype=o.dtype)),
        }
        if o.bias:
            a["bias"] = m.address(m.empty("bias", d, info["slots"] * h, dtype=self.sum_type))
            both = [[m.put(f"b{i}[{k}]", self._weight(k, i)) for k in range(d)] for i in (2, 3)]
            emulator().combine_bias(o.number, self.number, h, *both, a["bias"])
        if info["has_cell"]:
            a["cn"] = m.address(m.empty("cn", d, b, h, dtype=o.dtype))
            a["cells"] = m.address(m.empty("cells", d, self.rows, h, dtype=self.sum_type))
            a["cell_rows"] = m.address(m.empty("cell_rows", *out_rows, d * h, dtype=o.dtype))
        if self.path == "stepwise":
            self._step_forward(a)
        else:
            emulator().persistent_forward(self.plans[0], a, self._workspace(self.plans[0]))
        return [m.get(k) for k in ("output", "hn", *(("cn", "cell_rows") if info["has_cell"] else ()))]

    def _step_forward(self, a: dict[str, Any]) -> None:
        o, m, e = self.layer, self.m, emulator()
        d, b, h, n, gh = o.directions, o.batch, o.hidden, o.output, o.info["gates"] * o.hidden
        s = {k: v for k, v in a.items() if k != "h0"}
        e.convert(self.number, a.get("h0", 0), self.number, a["hn"], d * b * n)
        s |= {"h": a["hn"], "h_gates": m.address(m.empty("h_gates", d, b, gh, dtype=self.sum_type))}
        if o.info["has_cell"]:
            s["c"] = m.address(m.empty("c", d, b, h, dtype=self.sum_type))
            e.convert(self.number, a["c0"], self.sum_number, s["c"], d * b * h)
        if o.projection:
            s["unprojected"] = m.address(m.empty("unprojected", d, b, h, dtype=o.dtype))
            s["unprojected_rows"] = m.address(m.empty("unprojected_rows", d, self.rows, h, dtype=o.dtype))
            s["projected"] = m.address(m.empty("projected", d, b, n, dtype=self.sum_type))
        w = torch.stack([self._weight(k, 1) for k in range(d)]).double()
        w_hr = torch.stack([self._weight(k, self.each - 1) for k in range(d)]).double()
        for t in range(o.steps):
            m.set("h_gates", m.get("hn").double() @ w.mT)
            e.step_forward(s, t)
            if o.projection:
                m.set("projected", m.get("unprojected").double() @ w_hr.mT)
                e.project_forward(s, t)
        if o.info["has_cell"]:
            e.convert(self.sum_number, s["c"], self.number, a["cn"], d * b * h)

    def backward(self, given: list[Tensor]) -> list[Tensor]:
        """Gradients of input, weights, h0, c0, given those of forward's results."""
        o, m, info = self.layer, self.m, self.layer.info
        d, b, h, n, slots = o.directions, o.batch, o.hidden, o.output, o.info["slots"]
        names = ["d_output", "d_hn", *(["d_cn", "d_cell_rows"] if info["has_cell"] else [])]
        a = self.common | {k: m.put(k, g) for k, g in zip(names, given, strict=True)}
        a |= {k: m.address(k) for k in ("saved", "h_prev", *(["cells"] if info["has_cell"] else []))}
        a["d_gates"] = m.address(m.empty("d_gates", d, self.rows, slots * h, dtype=o.dtype))
        if o.initial:
            a["d_h0"] = m.address(m.empty("d_h0", d, b, n, dtype=o.dtype))
            if info["has_cell"]:
                a["d_c0"] = m.address(m.empty("d_c0", d, b, h, dtype=o.dtype))
        if self.path == "stepwise":
            self._step_backward(a)
        else:
            emulator().persistent_backward(self.plans[1], a, self._workspace(self.plans[1]))
        states = [m.get(k) for k in ("d_h0", "d_c0") if k in m.buffers]
        return [*self._weight_gradients(), *states]

    def _step_backward(self, a: dict[str, Any]) -> None:
        o, m, e = self.layer, self.m, emulator()
        d, b, h, n, gh = o.directions, o.batch, o.hidden, o.output, o.info["gates"] * o.hidden
        s = a | {
            "dh_product": m.put("dh_product", torch.zeros(d, b, n, dtype=self.sum_type)),
            "dh_carry": m.address(m.empty("dh_carry", d, b, n, dtype=self.sum_type)),
            "d_step": m.address(m.empty("d_step", d, b, gh, dtype=o.dtype)),
        }
        e.convert(self.number, a["d_hn"], self.sum_number, s["dh_carry"], d * b * n)
        if o.info["has_cell"]:
            s["dc"] = m.address(m.empty("dc", d, b, h, dtype=self.sum_type))
            e.convert(self.number, a["d_cn"], self.sum_number, s["dc"], d * b * h)
        if o.projection:
            s["d_projected"] = m.address(m.empty("d_projected", d, b, n, dtype=o.dtype))
            s["d_projected_rows"] = m.address(m.empty("d_projected_rows", d, self.rows, n, dtype=o.dtype))
            s["d_unprojected"] = m.address(m.empty("d_unprojected", d, b, h, dtype=self.sum_type))
        w = torch.stack([self._weight(k, 1) for k in range(d)]).double()
        w_hr = torch.stack([self._weight(k, self.each - 1) for k in range(d)]).double()
        for t in reversed(range(o.steps)):
            if o.projection:
                e.project_backward(s, t)
                m.set("d_unprojected", m.get("d_projected").double() @ w_hr)
            e.step_backward(s, t)
            m.set("dh_product", m.get("d_step").double() @ w)
        e.finish_backward(s)

    def _weight_gradients(self) -> list[Tensor]:
        o, m, info = self.layer, self.m, self.layer.info
        h, g, slots = o.hidden, info["gates"], info["slots"]
        d_gates = m.get("d_gates").double().view(o.directions, self.rows, slots, h)
        x = o.input[o.valid] if o.layout == PACKED else (o.input * o.valid[..., None]).reshape(self.rows, -1)
        h_prev = m.get("h_prev").double()
        d_input = torch.zeros(self.rows, o.input_size, dtype=torch.float64)
        found: list[Tensor] = []
        for k in range(o.directions):
            own: list[Tensor] = []
            sides = ((0, info["x_gates"], x.double()), (slots - g, info["h_gates"], h_prev[k]))
            for side, (first, gates, met) in enumerate(sides):
                part = torch.empty(self.rows, g, h, dtype=torch.float64)
                for i, gate in enumerate(gates):
                    part[:, gate] = d_gates[k, :, first + i]
                part = part.view(self.rows, g * h)
                own.append(part.T @ met)
                if side == 0:
                    d_input += part @ self._weight(k, 0).double()
            if o.bias:
                own += self._bias_gradients(k)
            if o.projection:
                own.append(m.get("d_projected_rows")[k].double().T @ m.get("unprojected_rows")[k].double())
            found += own
        return [o.lay_out(o.from_rows(d_input)), *found]

    def _bias_gradients(self, direction: int) -> list[Tensor]:
        o, m, e = self.layer, self.m, emulator()
        columns = o.info["slots"] * o.hidden
        gates = m.get("d_gates")[direction]
        sums = m.address(m.empty("sums", columns, dtype=self.sum_type))
        partial = m.address(m.empty("partial", e.column_chunks(self.rows), columns, dtype=self.sum_type))
        e.column_sums(self.number, m.put("gates", gates), self.rows, columns, partial, sums)
        both = [m.address(m.empty(k, o.info["gates"] * o.hidden, dtype=o.dtype)) for k in ("d_b_ih", "d_b_hh")]
        e.split_bias(o.number, self.number, o.hidden, sums, *both)
        return [m.get("d_b_ih"), m.get("d_b_hh")]

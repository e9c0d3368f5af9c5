"""The emulator of CUDA kernels itself: what it computes, and what it reports of faults planted on purpose."""

from __future__ import annotations

import pytest
import torch

from tests import emulator_build
from tests.compare import assert_close_to_float64
from tests.emulated import Memory, emulator

pytestmark = pytest.mark.skipif(emulator_build.compiler() is None, reason="no C++ compiler")

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]
SEEDS = [0, 1, 2]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_sum(dtype: torch.dtype) -> None:
    m = Memory()
    x = torch.randn(3, 160).to(dtype)
    out = m.empty("out", 3)
    emulator().sum(name_of(dtype), m.put("x", x), m.address(out), 3, 160)
    assert_close_to_float64(m.get(out), x.double().sum(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_product(dtype: torch.dtype) -> None:
    """Fragments of mma and ldmatrix as PTX lays them out: any other layout permutes rows or columns."""
    m = Memory()
    k = 48
    # Numbers that are exact in every type, with exact sums.
    a, b = (torch.randint(-8, 9, shape).to(dtype) for shape in [(16, k), (k, 8)])
    out = m.empty("d", 16, 8)
    emulator().product(name_of(dtype), m.put("a", a), m.put("b", b), m.address(out), k)
    assert torch.equal(m.get(out), (a.double() @ b.double()).float())


def test_tf32_rounds() -> None:
    m = Memory()
    a, b = torch.full((16, 8), 1 + 2.0**-11), torch.eye(8)
    out = m.empty("d", 16, 8)
    emulator().product("float32", m.put("a", a), m.put("b", b), m.address(out), 8)
    assert torch.equal(m.get(out), torch.full((16, 8), 1 + 2.0**-10))


def test_conversions_agree_with_torch() -> None:
    """Every half, and floats around every rounding boundary of it."""
    m = Memory()
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for number, dtype in [(2, torch.bfloat16), (3, torch.float16)]:
        halves = bits.view(dtype)
        wide = m.empty("wide", bits.numel())
        emulator().convert(number, m.put("halves", halves), 1, m.address(wide), bits.numel())
        assert torch.equal(m.get(wide).nan_to_num(7), halves.float().nan_to_num(7))
        floats = halves.float()
        step = torch.cat([floats, (floats[1:] + floats[:-1]) / 2])
        up, down = (torch.nextafter(step, torch.full_like(step, to)) for to in (torch.inf, -torch.inf))
        around = torch.cat([step, up, down])
        back = m.empty("back", around.numel(), dtype=dtype)
        emulator().convert(1, m.put("floats", around), number, m.address(back), around.numel())
        assert torch.equal(m.get(back).float().nan_to_num(7), around.to(dtype).float().nan_to_num(7))


def exchanged(steps: int, cluster: int, blocks: int) -> torch.Tensor:
    """What exchange_kernel leaves in out[block]: the same in all blocks of a cluster."""
    x = (torch.arange(cluster)[:, None] + torch.arange(4)).float()
    for _ in range(steps):
        x = x.sum(0, keepdim=True).expand(cluster, 4)
    return x[0].sum().expand(blocks)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("cluster", "blocks", "steps"), [(1, 2, 3), (2, 4, 5), (8, 8, 5), (16, 16, 4)])
def test_asynchronous_stores(cluster: int, blocks: int, steps: int, seed: int) -> None:
    m = Memory()
    out = m.empty("out", blocks)
    emulator().set_seed(seed)
    emulator().exchange(m.address(out), blocks, cluster, steps, 0)
    assert torch.equal(m.get(out), exchanged(steps, cluster, blocks))


EXCHANGE_FAULTS = {
    "no_start": "without a cluster barrier since the kernel's start",
    "no_wait": "data race: shared memory|read of uninitialised memory: shared memory",
    "other_barrier": "data race: shared memory|read of uninitialised memory: shared memory",
    "few_bytes": r"deadlock: .*barrier_wait \(samples.h",
    "no_end": "may still access its shared memory: a cluster barrier is missing at the end|which has ended",
    "early_overwrite": "data race: shared memory",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", EXCHANGE_FAULTS)
def test_exchange_with_a_fault(fault: str, seed: int) -> None:
    m = Memory()
    names = [name for name, _ in emulator().EXCHANGE_FAULTS]
    assert names == ["none", *EXCHANGE_FAULTS]
    emulator().set_seed(seed)
    with pytest.raises(emulator().Fault, match=EXCHANGE_FAULTS[fault]):
        emulator().exchange(m.address(m.empty("out", 4)), 4, 4, 6, names.index(fault))


@pytest.mark.parametrize("seed", SEEDS)
def test_remote_stores_and_loads(seed: int) -> None:
    m = Memory()
    out = m.empty("out", 2, 8)
    emulator().set_seed(seed)
    emulator().remote(m.address(out), 8, 4, 3)
    x = torch.zeros(8)
    for _ in range(3):
        x = (x + torch.arange(8) % 4).view(2, 4).roll(1, dims=1).view(8)
    expected = torch.stack([x, x.view(2, 4).roll(-1, dims=1).view(8)])
    assert torch.equal(m.get(out), expected)


def test_bulk_copies() -> None:
    m = Memory()
    x, out = torch.randn(4, 64), m.empty("out", 4, 64)
    emulator().bulk(m.put("x", x), m.address(out), 4, True)
    assert torch.equal(m.get(out), (2 * x).roll(1, dims=0))
    with pytest.raises(emulator().Fault, match="fence_async is missing"):
        emulator().bulk(m.put("x", x), m.address(out), 4, False)


@pytest.mark.parametrize("seed", SEEDS)
def test_grid_barrier(seed: int) -> None:
    m = Memory()
    emulator().set_seed(seed)
    exchange, counter, out = (
        m.empty("exchange", 2, 6),
        m.put("counter", torch.zeros(1, dtype=torch.int32)),
        m.empty("o", 6),
    )
    emulator().grid(m.address(exchange), counter, m.address(out), 6, 3, True, True)
    assert torch.equal(m.get(out), torch.full((6,), 21.0 * 6 * 6))


def test_grid_barrier_missing() -> None:
    m = Memory()
    exchange, out = m.empty("exchange", 2, 6), m.empty("out", 6)
    zero = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(emulator().Fault, match="data race: global memory exchange"):
        emulator().grid(m.address(exchange), m.put("counter", zero), m.address(out), 6, 3, False, True)
    with pytest.raises(emulator().Fault, match=r"deadlock: block 0 threads 0-0 wait at (load_acquire|a spinning loop)"):
        emulator().grid(m.address(exchange), m.put("counter", zero), m.address(out), 6, 3, True, False)


def test_warps() -> None:
    m = Memory()
    x = torch.randint(-50, 50, (128,), dtype=torch.int32)
    out, total = m.empty("out", 128, dtype=torch.int32), m.put("total", torch.zeros(1, dtype=torch.int32))
    emulator().warps(m.put("x", x), m.address(out), total)
    lane = torch.arange(32)
    y = x.view(4, 32)
    up, down = (lane - 1).clamp(min=0), torch.where(lane + 2 < 32, lane + 2, lane)
    y = y + y[:, 3:4] + y[:, up] + y[:, down] + y[:, lane ^ 5]
    votes = ((y % 2 != 0)[:, :8].int() << torch.arange(8)).sum(1, keepdim=True)
    y = y + votes + (y == 7).any(1, keepdim=True).int() + (y > -1000000).all(1, keepdim=True).int()
    y[2:] += y[:2].clone()
    assert torch.equal(m.get(out), y.view(-1).int())
    assert m.get("total").item() == 32 * y.max(1).values.sum().item()


PLANTS = {
    "race_read": r"data race: shared memory of block 0.* (read|written) by .*(written|read) by .*samples.h:\d+",
    "race_write": "data race: shared memory of block 0.* written by .*written by",
    "race_overwrite": r"data race: shared memory of block 0.* (read|written) by .*(written|read) by",
    "race_in_warp": "data race: shared memory of block 0.*read by",
    "race_half": "data race: shared memory of block 0",
    "uninitialised": r"read of uninitialised memory: shared memory of block 0.*samples.h:\d+",
    "past_end": "access out of bounds: shared memory of block 0, byte 256 of 256 read by thread 63",
    "before_start": "access out of bounds: shared memory of block 0, byte -4 of 256 written by thread 0",
    "past_static": "access out of bounds: shared memory of block 0.*written by thread 40",
    "misaligned": "misaligned access: shared memory of block 0",
    "half_a_block": "block_sync: part of the block is at samples.h:.*, part at samples.h:",
    "some_lanes": "block_sync: part of the block is at samples.h:.*, part at samples.h:",
    "two_places": "block_sync: part of the block is at samples.h:.*, part at samples.h:",
    "exit_early": r"deadlock: block 0 threads 0-31 wait at block_sync \(samples.*; block 0 threads 32-63 have ended",
    "named_count": "named barrier 2: .* threads expected",
    "divergent_shuffle": "lanes of a warp diverge: (shuffle_xor at samples.h.*ballot|ballot at samples.h.*shuffle_xor)",
    "missing_lane": "deadlock: .*wait at shuffle_xor",
    "copy_not_waited": "data race: shared memory.*cp_async of thread",
    "copy_not_shared": "data race: shared memory.*cp_async of thread",
    "barrier_not_made": "read of uninitialised memory",
    "barrier_overrun": "more arrivals at a barrier|deadlock: .*wait at barrier_wait",
    "global_past_end": r"access out of bounds: global memory 0 bytes past the end of in \(256 bytes\)",
    "global_raw_read": r"access out of bounds of global memory by thread \d+ of block 0 at samples.h.* past the end",
    "global_raw_write": "out of bounds.*past the end of out",
    "global_race": "data race: global memory out",
    "stack_overflow": "stack overflow by thread",
    "spin_for_ever": "deadlock: block 0 threads 0-.* wait at (load_acquire|a spinning loop)",
}


def plant(name: str, at_end: bool = True) -> torch.Tensor:
    m = Memory(at_end)
    names = [name for name, _ in emulator().PLANTS]
    assert names == ["none", *PLANTS]
    x, out, zero = torch.randn(64), m.empty("out", 64), torch.zeros(1, dtype=torch.int32)
    emulator().planted(m.put("in", x), m.address(out), m.put("counter", zero), names.index(name))
    return m.get(out)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_planted(seed: int) -> None:
    emulator().set_seed(seed)
    assert plant("none").isfinite().all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", PLANTS)
def test_planted_fault_is_reported(fault: str, seed: int) -> None:
    emulator().set_seed(seed)
    with pytest.raises(emulator().Fault, match=PLANTS[fault]):
        plant(fault)
    # And the machine is fit for the next launch.
    assert plant("none").isfinite().all()


def test_stray_write_between_buffer_and_page() -> None:
    """A buffer that does not end at a page: what is written past it shows after the launch."""
    with pytest.raises(emulator().Fault, match="write out of bounds: 0 bytes past the end of out"):
        plant("global_raw_write", at_end=False)


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ((4, 48, 1, 0), "expected a block of 32, 64.. up to 1024 threads, got 48"),
        ((4, 2048, 1, 0), "expected a block of 32, 64.. up to 1024 threads, got 2048"),
        ((4, 64, 3, 0), "grid 4 is not a multiple of the cluster"),
        ((32, 64, 32, 0), "expected a cluster of 1 to 16 blocks, got 32"),
        ((4, 64, 1, 240_000), "more than 227 KB of shared memory: 240000"),
    ],
)
def test_launch_is_checked(shape: tuple[int, int, int, int], what: str) -> None:
    with pytest.raises(emulator().Fault, match=what):
        emulator().launch_of(*shape)

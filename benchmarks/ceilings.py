"""What the cores of this machine can do at most, measured, and the least time a case can take by these limits."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.environment import bind, cores, machine_name

if TYPE_CHECKING:
    from benchmarks.cases import Case

_SOURCE = """
#if defined(__AVX512F__)
#define WIDTH 16
#define CHAINS 24
#elif defined(__AVX__)
#define WIDTH 8
#define CHAINS 12
#else
#define WIDTH 4
#define CHAINS 16
#endif
typedef float vector __attribute__((vector_size(WIDTH * 4)));
/* Independent chains of multiply-adds; returns the floating-point operations done. */
double fma_chains(long rounds, float scale, float* sink) {
    vector sum[CHAINS], a, b;
    for (int i = 0; i < WIDTH; ++i) { a[i] = scale; b[i] = 1.0f - scale; }
    for (int c = 0; c < CHAINS; ++c) sum[c] = a * (float)(c + 1);
    for (long r = 0; r < rounds; ++r)
        _Pragma("GCC unroll 24") for (int c = 0; c < CHAINS; ++c) sum[c] = sum[c] * a + b;
    for (int c = 0; c < CHAINS; ++c) for (int i = 0; i < WIDTH; ++i) sink[i] += sum[c][i];
    return 2.0 * rounds * CHAINS * WIDTH;
}
/* Reads `data` that many times; returns the bytes read. `data` begins at a multiple of 64 bytes. */
double read_all(long rounds, const float* data, long count, float* sink) {
    vector sum[8] = {};
    const vector* from = (const vector*)data;
    const long vectors = count / WIDTH / 8 * 8;
    for (long r = 0; r < rounds; ++r) {
        for (long i = 0; i < vectors; i += 8)
            _Pragma("GCC unroll 8") for (int c = 0; c < 8; ++c) sum[c] += from[i + c];
        __asm__ volatile("" ::: "memory");
    }
    for (int c = 0; c < 8; ++c) for (int i = 0; i < WIDTH; ++i) sink[i] += sum[c][i];
    return 4.0 * rounds * vectors * WIDTH;
}
"""
SINK = ctypes.c_float * 16


@lru_cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("the machine's ceilings need a C compiler (cc, gcc or clang), and none was found")
    digest = hashlib.sha256((_SOURCE + compiler + machine_name()).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"seqattn-ceilings-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"ceilings-{digest}.so"
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-xc", "-", "-o"]
        subprocess.run([*command, str(partial)], input=_SOURCE, text=True, check=True)
        partial.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.fma_chains.restype = loaded.read_all.restype = ctypes.c_double
    loaded.fma_chains.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.POINTER(ctypes.c_float)]
    loaded.read_all.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.POINTER(ctypes.c_float)]
    return loaded


def _best(task: Callable[[int], float], threads: int, seconds: float) -> float:
    """What ``threads`` cores do a second together: the best of the tries that fit. ``task(index)`` returns its work."""
    done = [0.0] * threads
    spent = [0.0] * threads

    def work(index: int) -> None:
        bind({index % cores()})
        start = time.perf_counter()
        done[index] = task(index)
        spent[index] = time.perf_counter() - start

    best, end = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, sum(d / s for d, s in zip(done, spent, strict=True)))
    return best


@lru_cache
def fma_limit(threads: int, seconds: float = 1.0) -> float:
    """Operations a second of ``threads`` cores that do nothing but float32 FMAs.

    Raises RuntimeError where there is no C compiler.
    """
    library = _library()
    return _best(lambda index: library.fma_chains(1_000_000, 0.5, SINK()), threads, seconds)


def caches() -> dict[str, int]:
    """Bytes of a core's second-level cache and of the third-level one, as far as the system says."""
    found = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if level in "23" and kind != "Instruction" and size.endswith("K"):
            found[f"l{level}"] = int(size[:-1]) * 1024
    return found


@lru_cache
def read_limits(threads: int, seconds: float = 0.3) -> Mapping[str, float]:
    """Bytes a second that ``threads`` cores read together, by where they come from: l2, l3 (where known), memory.

    Raises RuntimeError where there is no C compiler.
    """
    library, known = _library(), caches()
    sizes = {"memory": max(4 * known.get("l3", 0) // threads, 1 << 26)}
    if "l2" in known:
        sizes["l2"] = known["l2"] // 2
    if "l3" in known and known["l3"] // (2 * threads) > 2 * known.get("l2", 0):
        sizes["l3"] = known["l3"] // (2 * threads)
    return {level: _read(library, sizes[level], threads, seconds) for level in ("l2", "l3", "memory") if level in sizes}


def _read(library: ctypes.CDLL, size: int, threads: int, seconds: float) -> float:
    storage = [ctypes.create_string_buffer(size + 64) for _ in range(threads)]
    begins = [ctypes.addressof(each) + -ctypes.addressof(each) % 64 for each in storage]
    for begin in begins:
        ctypes.memset(begin, 1, size)
    rounds = max(1, (1 << 26) // size)
    return _best(lambda index: library.read_all(rounds, begins[index], size // 4, SINK()), threads, seconds)


def measured(threads: int) -> dict[str, float]:
    """The ceilings of reading by name and number of threads, as results keep them: `l2_gbs_2t` and so on."""
    return {f"{level}_gbs_{threads}t": rate / 1e9 for level, rate in read_limits(threads).items()}


def floors(case: Case, threads: int) -> dict[str, float]:
    """Milliseconds that a case takes at least: its operations as FMAs, its bytes from the least cache that holds them.

    Each input is read once and each result written once. A recurrence whose weights leave the cache reads them at every
    step, which is not counted. Without a C compiler, and of whole models, nothing is said.
    """
    from benchmarks.cases import LOOP_STEPS
    from benchmarks.work import work

    amount = work(case)
    if amount is None:
        return {}
    try:
        fma, rates = fma_limit(threads), read_limits(threads)
    except RuntimeError:
        return {}
    known = caches()
    sizes = {"l2": threads * known.get("l2", 0), "l3": known.get("l3", 0)}
    held = amount.size if "T" in case.shape or "S" in case.shape else amount.size / LOOP_STEPS
    level = next((name for name, size in sizes.items() if name in rates and held <= size), "memory")
    return {"fma": amount.operations / fma * 1e3, level: amount.size / rates[level] * 1e3}

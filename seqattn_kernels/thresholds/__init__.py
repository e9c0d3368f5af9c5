"""Where the CUDA kernels beat torch's own function: measurements kept in one data file for each GPU.

A file holds ``rules``; a request that fits one of them is served by our kernels. A rule's ``cells``, ``dtypes`` and
``training`` list what it holds for; ``hidden``, ``batch`` and ``steps`` are [least, most], most null for no limit. GPUs
without a file take ``default.json``, which has no rules: where nothing was measured, torch's function serves.
"""

from __future__ import annotations

import functools
import json
import re
from importlib import resources
from typing import Any

import torch


def file_name(gpu: str) -> str:
    """The data file of a GPU by the name that torch gives it: "NVIDIA H200" -> "nvidia_h200.json"."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


@functools.cache
def rules(gpu: str) -> tuple[dict[str, Any], ...]:
    """The rules of a GPU's file, or of the default one."""
    folder = resources.files(__package__)
    path = folder / file_name(gpu)
    if not path.is_file():
        path = folder / "default.json"
    return tuple(json.loads(path.read_text())["rules"])


_known: dict[int, tuple[dict[str, Any], ...]] = {}  # by the device's index


@torch.compiler.assume_constant_result  # torch.compile must not trace the reading of a file
def _load(index: int) -> bool:
    if index not in _known:
        _known[index] = rules(torch.cuda.get_device_name(index))
    return True


def _within(value: int, bounds: Any) -> bool:
    least, most = bounds
    return value >= least and (most is None or value <= most)


def fits(rule: dict[str, Any], request: Any) -> bool:
    """Whether a rule speaks of a request (`backends.Request`)."""
    return (
        request.cell in rule["cells"]
        and str(request.dtype).removeprefix("torch.") in rule["dtypes"]
        and request.training in rule["training"]
        and request.directions in rule.get("directions", (1,))
        and not request.projected
        and request.packed in rule.get("packed", (False,))
        and all(_within(getattr(request, name), rule[name]) for name in ("hidden", "batch", "steps"))
    )


def faster_than_torch(request: Any) -> bool:
    """Whether our kernels were measured to be faster than torch's function for this request, on its GPU."""
    if request.device.type != "cuda":
        return False
    if request.dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        return False  # measured with tf32, which persistent kernels need
    index = request.device.index if request.device.index is not None else torch.cuda.current_device()
    return _load(index) and any(fits(rule, request) for rule in _known[index])

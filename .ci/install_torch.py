"""Installs torch where there is none, and never packages of CUDA unasked.

usage: ALLOW_CUDA= install_torch.py REQUIREMENT INDEX

On Linux the plain `torch` of PyPI brings gigabytes of CUDA packages. INDEX has builds such as 2.13.0+cpu, which pip
prefers to 2.13.0 when it sees both; it is left out where it can't be reached, since pip may be configured with another
source. What pip would install is looked at before anything is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request


def reachable(index: str) -> bool:
    try:
        with urllib.request.urlopen(f"{index.rstrip('/')}/torch/", timeout=10) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError, ValueError) as error:
        print(f"{index} can't be reached ({error}): going on without it", file=sys.stderr)
        return False


def main(requirement: str, index: str) -> int:
    if importlib.util.find_spec("torch") is not None:
        return 0
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    arguments = [requirement, *(["--extra-index-url", index] if index and reachable(index) else [])]
    if not os.environ.get("ALLOW_CUDA"):
        command = [*pip, "--dry-run", "--report", "-", *arguments]
        planned = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        names = [item["metadata"]["name"] for item in json.loads(planned)["install"]]
        cuda = sorted(name for name in names if name.lower().startswith(("nvidia-", "cuda-")))
        if cuda:
            print(
                f"{requirement}: pip would install {len(cuda)} CUDA packages ({cuda[0]}, ...), since it finds no CPU "
                "build. Name an index that has one (make TORCH_INDEX=...) or a file (make TORCH=torch-...+cpu....whl), "
                "or allow CUDA (make ALLOW_CUDA=1).",
                file=sys.stderr,
            )
            return 1
    return subprocess.run([*pip, *arguments]).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

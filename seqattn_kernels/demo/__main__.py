"""`python -m seqattn_kernels.demo` is `seqattn demo`."""

from __future__ import annotations

import sys

from seqattn_kernels.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])

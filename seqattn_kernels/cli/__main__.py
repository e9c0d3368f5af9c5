"""`python -m seqattn_kernels.cli` is `seqattn`."""

from __future__ import annotations

from seqattn_kernels.cli import main

if __name__ == "__main__":
    main()

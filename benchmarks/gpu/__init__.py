"""Everything that is measured and tested on one GPU, in one command: `python -m benchmarks.gpu`."""

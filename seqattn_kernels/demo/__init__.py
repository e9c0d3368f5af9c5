"""Grapheme-to-phoneme conversion on the CMU Pronouncing Dictionary, stock and accelerated side by side."""

"""Attention-based recurrent networks in PyTorch, made faster without changing what they compute."""

"""Models to start from, each twice: of stock torch.nn modules in Python loops, and of this package's modules.

The two have the same parameters under the same names: a state dict of one loads into the other.
"""

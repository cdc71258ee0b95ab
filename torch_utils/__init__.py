"""Tensors and processes: ops, statistics and file layouts that know nothing of GANs."""

"""Triton kernels, the same stems as in fastspec.ops; installed as fastspec.kernels."""

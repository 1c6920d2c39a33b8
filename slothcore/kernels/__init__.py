"""Triton kernels with their launchers and, beside each, an eager twin in plain torch. No autograd, no modules."""

"""Triton kernels for AMD and NVIDIA GPUs; :mod:`.provider` offers them."""

"""Layouts and kernels of NVIDIA GPUs; everything but the products themselves runs without one."""

"""Operators for CUDA, through CuPy."""

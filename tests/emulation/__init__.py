"""CUDA kernels on the CPU: their own source compiled as C++, launched through an object that stands in for CuPy."""

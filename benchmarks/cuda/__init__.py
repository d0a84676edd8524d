"""Benchmarks on a CUDA GPU: ``python -m benchmarks.cuda.kernels`` and ``python -m benchmarks.cuda.layers``."""

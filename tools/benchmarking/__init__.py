"""What ``benchmark_kernels.py`` and ``benchmark_step.py`` are made of; not a part of the package."""

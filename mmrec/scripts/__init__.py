"""Measurements that are run as modules: `python -m mmrec.scripts.real_benchmark`, `python -m mmrec.scripts.benchmark_hem`."""

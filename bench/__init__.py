"""Benchmarks: `pytest bench/ --benchmark-only`."""

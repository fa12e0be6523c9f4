"""Benchmarks: ``python -m bench``, or through pytest-benchmark ``pytest bench``; results by machine in results/."""

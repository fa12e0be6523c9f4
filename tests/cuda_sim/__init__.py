"""The host simulator: csrc/cuda's kernels, compiled by a C++ compiler and run on a CPU (see README.md)."""

"""Plain PyTorch: readable, runs on any tensor, and is what every other backend is compared with.

Written with differentiable torch operations throughout, so that the same lines serve double backward and the
transforms of ``torch.func``. Everything is computed in fp32 (fp64 for fp64 input) and rounded once at the end.
"""

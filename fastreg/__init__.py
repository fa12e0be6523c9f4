"""fastreg: fused normalisation and regularisation kernels for PyTorch.

``fastreg.functional`` mirrors ``torch.nn.functional``, ``fastreg.nn`` mirrors ``torch.nn``, and
``fastreg.convert(model)`` swaps the layers of an existing model. Importing this package neither initialises CUDA nor
imports Triton: a backend is loaded when the first call asks for it.
"""

from fastreg import backends, functional, nn
from fastreg.convert import convert, revert

__version__ = "0.1.0"

__all__ = ["__version__", "backends", "convert", "functional", "nn", "revert"]

"""What the backend under test serves, and so which cases and dtypes it is tested with."""

from __future__ import annotations

import torch

from cases import Case
from fastreg import backends
from suite import OpSpec, cases

BACKENDS = ("reference", "triton", "native", "cuda_sim")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def select(backend: str, device: str) -> None:
    """Ask for ``backend`` for the whole test session, making the simulator known first if it is that one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    if backend == "cuda_sim":
        from cuda_sim import backend as cuda_sim

        cuda_sim.register()
    reason = backends.unavailable(backend, "layer_norm", device, torch.float32)
    if reason is not None:
        raise RuntimeError(reason)
    backends.use(backend)


def emulated(backend: str, device: str) -> bool:
    """Whether GPU kernels run on the CPU, one interpreted program or simulated thread after the other."""
    return device == "cpu" and backend in ("triton", "cuda_sim")


def serves_float64(backend: str, device: str) -> bool:
    return backend == "reference" or (backend == "native" and device == "cpu")


def dtypes_for(backend: str, device: str, only: str | None) -> list[torch.dtype]:
    """The input dtypes to test, those on the command line if any."""
    served = FLOATS if serves_float64(backend, device) else FLOATS[:3]
    return [dtype for dtype in served if only is None or dtype == getattr(torch, only)]


def cases_for(spec: OpSpec, backend: str, device: str, only: str | None) -> list[Case]:
    dtypes = dtypes_for(backend, device, only)
    interpreted = backend == "triton" and device == "cpu"
    return [case for case in cases(spec, sparse=interpreted) if case.mix.input in dtypes]

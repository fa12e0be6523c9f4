"""What the compiled kernels say of themselves, without a GPU: a committed table, made and checked by one command.

python -m bench.static_evidence                        write bench/results/static/{cuda,triton}.json
python -m bench.static_evidence --check                exit code 1, and the reasons, where the kernels have got worse
python -m bench.static_evidence --readme README.md     put the table's summary between the two markers of that file
python -m bench.static_evidence --check-readme README.md

For each instance of each CUDA kernel in fastreg/lib/libfastreg_cuda.so, and each Triton kernel that
tests/triton_offline.py compiles, on each architecture: registers, stack, spills and shared memory, every access to
memory by its width, and the theoretical occupancy of its launches. The CUDA launches are those that the host simulator
records when the real launch code runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "static"

# The simulator and the offline compilation belong to the tests.
if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))

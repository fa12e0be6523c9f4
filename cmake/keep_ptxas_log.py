"""Run one nvcc command and keep what ptxas said of its kernels (registers, stack, spills) in a file.

CMake starts every CUDA compilation through this: ``keep_ptxas_log.py <folder> <nvcc> <arguments>``. The rest of the
compiler's output is passed on, so that warnings and errors are seen where they always are.
"""

import pathlib
import subprocess
import sys


def main() -> int:
    folder = pathlib.Path(sys.argv[1])
    command = sys.argv[2:]
    finished = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    if "-o" not in command:
        sys.stderr.write(finished.stderr)
        return finished.returncode
    log: list[str] = []
    rest: list[str] = []
    for line in finished.stderr.splitlines(keepends=True):
        # The line after "Function properties for ..." is the one that has the spills, and carries no prefix.
        (log if line.startswith("ptxas info") or "bytes spill stores" in line else rest).append(line)
    sys.stderr.write("".join(rest))
    if finished.returncode == 0:
        folder.mkdir(parents=True, exist_ok=True)
        source = pathlib.Path(command[command.index("-o") + 1]).name.removesuffix(".o")
        (folder / f"{source}.log").write_text("".join(log))
    return finished.returncode


if __name__ == "__main__":
    sys.exit(main())

"""``python -m bench.gpu``, which is ``make gpu``: builds, tests, sanitizes and times the kernels on a real GPU.

For a machine that has a GPU, Python with torch, a compiler and no network: nothing here installs or fetches anything.
The work is cut into stages, each with a deadline. A stage stops what runs past it, keeps the results so far, and prints
a short summary last; its files go to the folder that is named as ``OUT``.

    machine.py     what the interpreter that runs the stages can see: the GPU, torch, the packages
    process.py     one command with a log, a deadline and a watch, and the end of everything that it started
    build.py       the native libraries, in place, for this GPU alone
    suite.py       stage "tests"
    sanitize.py    stage "sanitize", with shapes.py, the program that runs under compute-sanitizer
    benchmark.py   the stages named bench, with timing.py, the program that takes the measurements

With ``--device cpu`` the same stages run on the CPU, with a small selection: a rehearsal, which says nothing of a GPU
and is labelled as one wherever it prints or writes.
"""

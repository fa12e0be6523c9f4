"""``python -m bench``: this machine's benchmark, into bench/results/; takes the options of ``fastreg bench``."""

from __future__ import annotations

import sys
from pathlib import Path

from fastreg.cli import extras

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Run it, or say which packages it needs."""
    missing = extras.missing("bench")
    if missing:
        print(extras.message("bench", missing), file=sys.stderr)
        return 1
    from fastreg.cli.app import app

    app(["bench", "--results", str(RESULTS), *sys.argv[1:]], prog_name="python -m bench")
    return 0


if __name__ == "__main__":
    sys.exit(main())

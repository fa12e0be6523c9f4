"""``python -m fastreg doctor | demo | bench | check``."""

from __future__ import annotations

import sys

from fastreg.cli import extras


def main() -> int:
    """Run the command, or say which packages it needs; doctor needs none."""
    command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    missing = extras.missing(command)
    if missing:
        print(extras.message(command, missing), file=sys.stderr)
        return 1
    if command == "doctor" and extras.missing(""):
        from fastreg.cli import doctor

        print(doctor.report())
        return 0
    from fastreg.cli.app import app

    app(prog_name="python -m fastreg")
    return 0


if __name__ == "__main__":
    sys.exit(main())

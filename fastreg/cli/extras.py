"""Which optional packages a command needs, and the message where they are missing; imports none of them."""

from __future__ import annotations

import importlib.util

# Import name to the name that pip knows.
_PIP_NAMES = {"rich": "rich", "typer": "typer", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}

NEEDS: dict[str, tuple[str, ...]] = {
    "doctor": (),
    "check": ("typer", "rich"),
    "bench": ("typer", "rich"),
    "demo": ("typer", "rich", "matplotlib", "sklearn"),
}


def missing(command: str) -> list[str]:
    """The packages, by pip's name, that a command needs and that cannot be imported."""
    needed = NEEDS.get(command, ("typer", "rich"))
    return [_PIP_NAMES[name] for name in needed if importlib.util.find_spec(name) is None]


def message(command: str, packages: list[str]) -> str:
    """What to tell the user."""
    what = f"python -m fastreg {command}".rstrip()
    return f"{what} needs {', '.join(packages)}: pip install {' '.join(packages)}"

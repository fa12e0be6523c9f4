"""Layers of libraries that are not installed."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from torch import nn


def install(
    monkeypatch: pytest.MonkeyPatch, path: str, base: type[nn.Module], **members: Any
) -> type[nn.Module]:
    """A class at ``path``, as if its package were installed."""
    package, _, name = path.rpartition(".")
    parts = package.split(".")
    for count in range(1, len(parts) + 1):
        parent = ".".join(parts[:count])
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    kind = type(name, (base,), {"__module__": package, **members})
    monkeypatch.setattr(sys.modules[package], name, kind, raising=False)
    return kind

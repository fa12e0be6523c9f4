"""Swap the layers of a model for fastreg's, in place, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from fastreg import nn
from fastreg.nn import external

Selector = str | type[torch.nn.Module] | Callable[[str, torch.nn.Module], bool]

_REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.RMSNorm: nn.RMSNorm,
}
_OURS = frozenset(_REPLACEMENTS.values())

# Where convert leaves the class that a module had, so that revert finds it after a deepcopy or a pickle too.
_ORIGINAL = "_fastreg_original_class"


@dataclass(frozen=True)
class Replaced:
    """A module that was replaced: its name in the model, and the class before and after."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Kept:
    """A normalisation layer that was left as it was, and why."""

    name: str
    kind: str
    reason: str


@dataclass
class Report:
    """What ``convert`` or ``revert`` did: ``str(report)`` is readable, the lists are for programs."""

    replaced: list[Replaced] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} module(s) replaced, {len(self.kept)} kept"]
        counts: dict[tuple[str, str], list[str]] = {}
        for item in self.replaced:
            counts.setdefault((item.before, item.after), []).append(item.name or "(the model itself)")
        for (before, after), names in counts.items():
            lines.append(f"  {len(names):4d} x {before} -> {after}: {_shorten(names)}")
        lines.extend(
            f"  kept {kept.name or '(the model itself)'} ({kept.kind}): {kept.reason}" for kept in self.kept
        )
        return "\n".join(lines)


def _shorten(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"


def convert(
    model: torch.nn.Module,
    *,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
) -> Report:
    """Replace the normalisation layers of ``model``, in place, by fastreg's.

    Each layer stays the same object and only changes its class, so parameters, buffers, hooks, training mode, state
    dict keys, optimisers that hold its parameters and references from elsewhere all stay as they are. Numbers change by
    no more than the rounding of the dtype. ``revert(model)`` undoes it.

    Replaced are ``torch.nn.LayerNorm`` and ``torch.nn.RMSNorm``, torchvision's ``LayerNorm2d``, and timm's
    ``LayerNorm``, ``LayerNorm2d``, ``RmsNorm`` and ``RmsNorm2d``: exactly these types, since a subclass may compute
    something else.

    Args:
        model: any module; it may itself be a layer that is replaced.
        include: what to replace; None for everything known. A selector is a module type, a pattern of names
            (``"encoder.*"``, as in fnmatch), or a function of (name, module); one or several.
        exclude: what to leave alone, likewise; it wins over ``include``.

    Returns:
        A report of what was replaced and of the normalisation layers that were not, each with the reason.

    Raises:
        TypeError: model is not a module, or a selector is none of the three kinds.
    """
    _check_module(model, "convert")
    included, excluded = _selectors(include), _selectors(exclude)
    report = Report()
    for name, module in model.named_modules():
        kind = type(module)
        target = _REPLACEMENTS.get(kind) or external.replacement(kind)
        reason = None
        if target is None:
            reason = _why_unknown(module)
        elif included is not None and not _matches(included, name, module):
            reason = "not selected by include"
        elif excluded is not None and _matches(excluded, name, module):
            reason = "excluded"
        elif "forward" in vars(module):
            reason = "its forward was replaced on the instance"
        if reason is not None:
            report.kept.append(Kept(name, _class_name(kind), reason))
        elif target is not None:
            setattr(module, _ORIGINAL, kind)
            module.__class__ = target
            report.replaced.append(Replaced(name, _class_name(kind), _class_name(target)))
    return report


def revert(model: torch.nn.Module) -> Report:
    """Undo ``convert``, in place: every layer that it replaced gets its own class back.

    Layers that were built as fastreg's own are left alone.

    Returns:
        A report of what was changed back.

    Raises:
        TypeError: model is not a module.
    """
    _check_module(model, "revert")
    report = Report()
    for name, module in model.named_modules():
        original = vars(module).get(_ORIGINAL)
        if original is None:
            continue
        report.replaced.append(Replaced(name, _class_name(type(module)), _class_name(original)))
        module.__class__ = original
        delattr(module, _ORIGINAL)
    return report


def _why_unknown(module: torch.nn.Module) -> str | None:
    """Why a layer that looks like one of ours was not replaced; None for layers that convert has no say in."""
    kind = type(module)
    if kind in _OURS or _ORIGINAL in vars(module):
        return "already fastreg's"
    if isinstance(module, torch.jit.ScriptModule):
        name = getattr(module, "original_name", "")
        return "scripted: convert before torch.jit.script" if name in ("LayerNorm", "RMSNorm") else None
    for known in _REPLACEMENTS:
        if isinstance(module, known):
            return f"a subclass of {_class_name(known)}, which may compute something else"
    return None


def _class_name(kind: type) -> str:
    for public in ("torch.nn", "fastreg.nn"):
        if kind.__module__.startswith(public + "."):
            return f"{public}.{kind.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def _check_module(model: object, function: str) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fastreg.{function} expects a torch.nn.Module, got {type(model).__name__}")


def _selectors(selection: Selector | Iterable[Selector] | None) -> tuple[Selector, ...] | None:
    if selection is None:
        return None
    several = (selection,) if isinstance(selection, str | type) or callable(selection) else tuple(selection)
    for selector in several:
        if not (isinstance(selector, str) or callable(selector)):
            raise TypeError(
                "a selector is a module type, a pattern of names or a function of (name, module), "
                f"got {type(selector).__name__}"
            )
    return several


def _matches(selectors: tuple[Selector, ...], name: str, module: torch.nn.Module) -> bool:
    for selector in selectors:
        if isinstance(selector, str):
            if fnmatchcase(name, selector):
                return True
        elif isinstance(selector, type):
            if isinstance(module, selector):
                return True
        elif selector(name, module):
            return True
    return False

"""Swap the layers of a model for fastreg's, in place, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

from fastreg import nn
from fastreg.fuse import fuse as fuse_model
from fastreg.fuse.classes import ORIGINAL, original_class, restore
from fastreg.nn import external
from fastreg.nn._rate import Rated
from fastreg.nn.sync_batch_norm import SyncBatchNorm, SyncBatchNormAct2d

Selector = str | type[torch.nn.Module] | Callable[[str, torch.nn.Module], bool]

_REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.RMSNorm: nn.RMSNorm,
    torch.nn.BatchNorm1d: nn.BatchNorm1d,
    torch.nn.BatchNorm2d: nn.BatchNorm2d,
    torch.nn.BatchNorm3d: nn.BatchNorm3d,
    torch.nn.SyncBatchNorm: SyncBatchNorm,
    torch.nn.GroupNorm: nn.GroupNorm,
    torch.nn.InstanceNorm1d: nn.InstanceNorm1d,
    torch.nn.InstanceNorm2d: nn.InstanceNorm2d,
    torch.nn.InstanceNorm3d: nn.InstanceNorm3d,
    torch.nn.Dropout: nn.Dropout,
    torch.nn.Dropout1d: nn.Dropout1d,
    torch.nn.Dropout2d: nn.Dropout2d,
    torch.nn.Dropout3d: nn.Dropout3d,
}
_OURS = frozenset(
    (
        *_REPLACEMENTS.values(),
        *(nn.BatchNormAct2d, SyncBatchNormAct2d, nn.GroupNormAct),
        *(nn.DropPath, nn.DropoutAdd, nn.DropoutAddLayerNorm, nn.DropoutAddRMSNorm),
        *(nn.DropBlock2d, nn.DropBlock3d),
    )
)

_SYNCHRONISED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    **dict.fromkeys(
        (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm),
        SyncBatchNorm,
    ),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), SyncBatchNorm),
    nn.BatchNormAct2d: SyncBatchNormAct2d,
}


@dataclass(frozen=True)
class Replaced:
    """A module that was replaced: its name in the model, and the class before and after."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Kept:
    """A norm or a layer of the dropout family that was left as it was, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Fused:
    """A layer that runs in one kernel with what follows it: its name, and what that is (``"norm + add + relu"``)."""

    name: str
    what: str


@dataclass
class Report:
    """What ``convert`` or ``revert`` did: ``str(report)`` is readable, the lists are for programs.

    Attributes:
        fused: with ``fuse=True``, the norms and dropouts that are one kernel with what follows them.
        alone: with ``fuse=True``, the norms that are not. A dropout is not in here: most have no addition behind them.
    """

    replaced: list[Replaced] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    fused: list[Fused] = field(default_factory=list)
    alone: list[Kept] = field(default_factory=list)

    def __str__(self) -> str:
        fused = f", {len(self.fused)} fused with what follows" if self.fused or self.alone else ""
        lines = [f"{len(self.replaced)} module(s) replaced, {len(self.kept)} kept{fused}"]
        lines.extend(
            f"  {len(names):4d} x {change}: {_shorten(names)}"
            for change, names in _by(
                [(f"{each.before} -> {each.after}", each.name) for each in self.replaced]
            )
        )
        lines.extend(
            f"  kept {kept.name or '(the model itself)'} ({kept.kind}): {kept.reason}" for kept in self.kept
        )
        lines.extend(
            f"  {len(names):4d} x {what} in one kernel: {_shorten(names)}"
            for what, names in _by([(item.what, item.name) for item in self.fused])
        )
        lines.extend(
            f"  {len(names):4d} x norm alone, {reason}: {_shorten(names)}"
            for reason, names in _by([(item.reason, item.name) for item in self.alone])
        )
        return "\n".join(lines)


def _by(pairs: list[tuple[str, str]]) -> Iterable[tuple[str, list[str]]]:
    """The names of each text, which is their first half."""
    found: dict[str, list[str]] = {}
    for text, name in pairs:
        found.setdefault(text, []).append(name or "(the model itself)")
    return found.items()


def _shorten(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"


def convert(
    model: torch.nn.Module,
    *,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    fuse: bool = False,
    sync: bool = False,
    process_group: Any = None,
) -> Report:
    """Replace the norms of ``model``, and the layers of the dropout family, in place, by fastreg's.

    Each layer stays the same object and only changes its class, so parameters, buffers, hooks, training mode, state
    dict keys, optimisers that hold its parameters and references from elsewhere all stay as they are. Numbers change by
    no more than the rounding of the dtype, except that in training a dropout draws other masks: of the same
    distribution, from the same generator. ``revert(model)`` undoes it.

    Replaced are ``torch.nn.LayerNorm``, ``RMSNorm``, ``GroupNorm``, ``BatchNorm1d``, ``BatchNorm2d``, ``BatchNorm3d``,
    ``SyncBatchNorm``, ``InstanceNorm1d``, ``InstanceNorm2d``, ``InstanceNorm3d``, ``Dropout``, ``Dropout1d``,
    ``Dropout2d`` and ``Dropout3d``, torchvision's ``LayerNorm2d``, ``FrozenBatchNorm2d``, ``DropBlock2d``,
    ``DropBlock3d`` and ``StochasticDepth``, and timm's ``LayerNorm``, ``LayerNorm2d``, ``RmsNorm``, ``RmsNorm2d``,
    ``GroupNorm``, ``GroupNorm1``, ``BatchNormAct2d``, ``SyncBatchNormAct``, ``GroupNormAct``, ``GroupNorm1Act``,
    ``DropPath`` and ``DropBlock2d``: exactly these types, since a subclass may compute something else. A dropout
    scales exactly for what it drops, where torchvision's and timm's ``DropBlock`` add an epsilon, and what it drops is
    0 even where the input is infinite or NaN.

    With ``fuse=True`` a batch norm runs in one kernel with the addition and the activation behind it, a group or
    instance norm with the activation behind it, and a ``Dropout``, ``DropPath`` or ``StochasticDepth`` with the
    addition behind it and a layer or RMS norm of the sum, wherever ``torch.fx`` shows them. The module whose forward
    calls them gets a class derived from its own, with a new forward; the layer, the activation and all names stay. A
    hook that is registered later on the layer or the activation, an argument that is not a tensor, a residual of
    another shape or (for a norm) dtype, or a dropout that drops nothing is noticed in the call, which then runs what
    the model has; a forward that does what a graph does not show (a ``with`` block, say) is not touched. Revert such a
    model before ``torch.jit.script``.

    Args:
        model: any module; it may itself be a layer that is replaced.
        include: what to replace, and which norms and dropouts to fuse; None for everything known. A selector is a
            module type, a pattern of names (``"encoder.*"``, as in fnmatch), or a function of (name, module); one or
            several.
        exclude: what to leave alone, likewise; it wins over ``include``. With ``fuse`` also activations, and modules
            whose forward is to stay.
        fuse: also merge norm + activation, norm + add, norm + add + activation, and dropout or drop path + add, also
            with a norm of the sum.
        sync: make every batch norm, torch's and fastreg's, a ``fastreg.nn.SyncBatchNorm``.
        process_group: with ``sync``, whose processes share their statistics; None: all of them.

    Returns:
        A report of what was replaced and of the norms and dropouts that were not, each with the reason; and of what was
        fused.

    Raises:
        TypeError: model is not a module, or a selector is none of the three kinds.
    """
    _check_module(model, "convert")
    included, excluded = _selectors(include), _selectors(exclude)

    def is_included(name: str, module: torch.nn.Module) -> bool:
        return included is None or _matches(included, name, module)

    def is_excluded(name: str, module: torch.nn.Module) -> bool:
        return excluded is not None and _matches(excluded, name, module)

    report = Report()
    for name, module in model.named_modules():
        kind = type(module)
        target = _target(kind, sync)
        reason = None
        if target is None:
            reason = _why_unknown(module)
        elif not is_included(name, module):
            reason = "not selected by include"
        elif is_excluded(name, module):
            reason = "excluded"
        elif "forward" in vars(module):
            reason = "its forward was replaced on the instance"
        if reason is not None:
            report.kept.append(Kept(name, _class_name(kind), reason))
        elif target is not None:
            _replace(module, target, process_group)
            report.replaced.append(Replaced(name, _class_name(kind), _class_name(target)))
    if fuse:
        found = fuse_model(model, is_included, is_excluded)
        report.fused = [Fused(name, what) for name, what in found.fused.items()]
        kinds = {name: type(module) for name, module in model.named_modules()}
        report.alone = [Kept(name, _class_name(kinds[name]), why) for name, why in found.alone.items()]
    return report


def revert(model: torch.nn.Module) -> Report:
    """Undo ``convert``, in place: every layer that it replaced and every module that it fused gets its class back.

    Layers that were built as fastreg's own are left alone. A rate that ``fastreg.nn.LinearSchedule`` made a tensor is a
    number again.

    Returns:
        A report of what was changed back.

    Raises:
        TypeError: model is not a module.
    """
    _check_module(model, "revert")
    report = Report()
    for name, module in model.named_modules():
        if ORIGINAL not in vars(module):
            continue
        before, synchronised = type(module), isinstance(module, torch.nn.SyncBatchNorm)
        if isinstance(module, Rated):
            module._fix_rate()
        restore(module)
        if synchronised and not isinstance(module, torch.nn.SyncBatchNorm):
            vars(module).pop("process_group", None)
        report.replaced.append(Replaced(name, _class_name(before), _class_name(type(module))))
    return report


def _target(kind: type[torch.nn.Module], sync: bool) -> type[torch.nn.Module] | None:
    """The class that takes the place of one; None where there is none."""
    found = _SYNCHRONISED.get(kind) if sync else None
    return found or _REPLACEMENTS.get(kind) or external.replacement(kind)


def _replace(module: torch.nn.Module, target: type[torch.nn.Module], process_group: Any) -> None:
    # A layer that convert has replaced before keeps the class that it had at first.
    vars(module).setdefault(ORIGINAL, type(module))
    if issubclass(target, torch.nn.SyncBatchNorm) and not isinstance(module, torch.nn.SyncBatchNorm):
        vars(module)["process_group"] = process_group
    module.__class__ = target


def _why_unknown(module: torch.nn.Module) -> str | None:
    """Why a layer that looks like one of ours was not replaced; None for layers that convert has no say in."""
    kind = type(module)
    if original_class(module) is not None:
        return None
    if kind in _OURS or ORIGINAL in vars(module):
        return "already fastreg's"
    if isinstance(module, torch.jit.ScriptModule):
        known_names = {known.__name__ for known in _REPLACEMENTS}
        scripted = getattr(module, "original_name", "") in known_names
        return "scripted: convert before torch.jit.script" if scripted else None
    if isinstance(module, _NormBase) and isinstance(module, LazyModuleMixin):
        return "lazy: run a batch through the model first"
    for known in kind.__mro__:
        if known in _REPLACEMENTS or external.is_known(known):
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

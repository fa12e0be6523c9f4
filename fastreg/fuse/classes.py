"""The classes of fused modules: derived from their own, with another forward, and undone by what changes a module."""

from __future__ import annotations

import builtins
import copyreg
import functools
import importlib
import itertools
import linecache
import types
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from fastreg.fuse.trace import Picture, names_in, required_arguments
from fastreg.nn import _fused

# Where convert leaves the class that a module had, so that revert finds it after a deepcopy or a pickle too.
ORIGINAL = "_fastreg_original_class"

_numbers = itertools.count()
_classes: weakref.WeakValueDictionary[Any, type[torch.nn.Module]] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class _Imported:
    """A module of Python, by its name: modules do not pickle."""

    name: str


@dataclass(frozen=True)
class Plan:
    """A rewritten forward that pickles.

    Attributes:
        training, evaluation: the source in the two modes.
        known: what the sources refer to.
        attributes: every name that the model's own forward mentions.
    """

    training: str
    evaluation: str
    known: tuple[tuple[str, Any], ...]
    attributes: frozenset[str]


def plan_of(training: Picture, evaluation: Picture) -> Plan:
    """The plan of two rewritten graphs."""
    sources, known = [], {}
    for picture in (training, evaluation):
        for node in picture.graph.nodes:
            # Annotations would refer to names of the model's file.
            node.type = None
        code = picture.graph.python_code(root_module="self")
        used = names_in(compile(code.src, "<fastreg>", "exec"))
        for name in sorted(used & code.globals.keys()):
            value = code.globals[name]
            known[name] = _Imported(value.__name__) if isinstance(value, types.ModuleType) else value
        sources.append(code.src.strip() + "\n")
    return Plan(sources[0], sources[1], tuple(known.items()), training.names | evaluation.names)


def fused_class(original: type[torch.nn.Module], plan: Plan | None) -> type[torch.nn.Module]:
    """The class of a fused module.

    Args:
        plan: what its forward does; None for a ``torch.nn.Sequential``, which runs the layers that it has.
    """
    key = (original, plan and (plan.training, plan.evaluation))
    found = _classes.get(key)
    if found is None:
        members = _sequence_members() if plan is None else _planned_members(original, plan)
        members |= _common_members(original, plan)
        found = type(f"Fused{original.__name__}", (original,), members)
        _classes[key] = found
    return found


def original_class(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class that a fused module had; None for every other module."""
    return getattr(type(module), "fastreg_original", None)


def restore(module: torch.nn.Module) -> None:
    """Give a converted or fused module its own class back."""
    # Past the module's own __setattr__.
    object.__setattr__(module, "__class__", vars(module).pop(ORIGINAL))


def _restore_fused(module: torch.nn.Module) -> None:
    if ORIGINAL in vars(module):
        restore(module)


def _both_tensors(module: torch.nn.Module, name: str, value: Any) -> bool:
    """Whether a tensor takes the place of a tensor."""
    places = (vars(module), module._parameters, module._buffers)
    return isinstance(value, torch.Tensor) and any(
        isinstance(each.get(name), torch.Tensor) for each in places
    )


def _common_members(original: type[torch.nn.Module], plan: Plan | None) -> dict[str, Any]:
    def initialise(self: torch.nn.Module, *arguments: Any, **options: Any) -> None:
        # type(self)(...), as in a slice of a Sequential: a new module, of which nothing is known yet.
        object.__setattr__(self, "__class__", original)
        original.__init__(self, *arguments, **options)

    def reduce(self: torch.nn.Module, protocol: Any) -> Any:
        found = original.__reduce_ex__(self, max(protocol, 2))
        if isinstance(found, tuple) and found[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_blank, (original, plan), *found[2:])
        return found

    return {
        "__module__": original.__module__,
        "__doc__": f"{original.__qualname__} with norms fused by fastreg.",
        "__init__": initialise,
        "__reduce_ex__": reduce,
        "fastreg_original": original,
    }


def _blank(original: type[torch.nn.Module], plan: Plan | None) -> torch.nn.Module:
    """What pickle and deepcopy start from."""
    layer = fused_class(original, plan)
    return layer.__new__(layer)


def _sequence_members() -> dict[str, Any]:
    return {"forward": _fused.in_order, "runs_in_order": True}


def _planned_members(original: type[torch.nn.Module], plan: Plan) -> dict[str, Any]:
    # What follows changes a module in a way that may change what its forward does.

    def set_attribute(self: torch.nn.Module, name: str, value: Any) -> None:
        # A copy for another device has no attributes yet, and gets all of them at once.
        if ORIGINAL in vars(self) and name != "training" and not _both_tensors(self, name, value):
            modules = isinstance(value, torch.nn.Module) or name in self._modules
            if modules or name in plan.attributes:
                restore(self)
        original.__setattr__(self, name, value)

    def delete_attribute(self: torch.nn.Module, name: str) -> None:
        _restore_fused(self)
        original.__delattr__(self, name)

    def add_module(self: torch.nn.Module, name: str, module: torch.nn.Module | None) -> None:
        _restore_fused(self)
        original.add_module(self, name, module)

    return {
        "__setattr__": set_attribute,
        "__delattr__": delete_attribute,
        "add_module": add_module,
        "forward": _forward(original, plan),
    }


# One argument after the other by name, so that keywords work; a tensor for each is what the graph was made with.
_FORWARD = """\
def forward(self, {arguments}*rest, **options):
    if rest or options{others}:
        return original(self, {arguments}*rest, **options)
    return training(self, {arguments}) if self.training else evaluation(self, {arguments})
"""


def _forward(original: type[torch.nn.Module], plan: Plan) -> Any:
    required = required_arguments(original.forward)
    known = {
        name: importlib.import_module(value.name) if isinstance(value, _Imported) else value
        for name, value in plan.known
    }
    training = _function(plan.training, f"{original.__name__}, training", known)
    evaluation = training
    if plan.evaluation != plan.training:
        evaluation = _function(plan.evaluation, f"{original.__name__}, evaluation", known)
    source = _FORWARD.format(
        arguments="".join(f"{name}, " for name in required),
        others="".join(f" or not isinstance({name}, Tensor)" for name in required),
    )
    names = {"original": original.forward, "training": training, "evaluation": evaluation}
    forward = _function(source, original.__name__, {**names, "Tensor": torch.Tensor})
    return functools.wraps(original.forward)(forward)


def _function(source: str, title: str, names: dict[str, Any]) -> Any:
    """The function ``forward`` of a source, whose lines a traceback shows."""
    file = f"<fastreg fusion {next(_numbers)}: {title}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    # Without __name__: torch.compile takes two scopes of the same name for one.
    scope = {"__builtins__": builtins, **names}
    exec(compile(source, file, "exec"), scope)
    return scope["forward"]

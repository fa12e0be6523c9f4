"""Norms and dropouts in one kernel with the additions, activations and norms behind them, where torch.fx shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.fx

from fastreg.fuse import patterns
from fastreg.fuse.classes import ORIGINAL, Plan, fused_class, original_class, plan_of, restore
from fastreg.fuse.trace import NoGraph, trace
from fastreg.nn import _fused

Selected = Callable[[str, torch.nn.Module], bool]


@dataclass
class Found:
    """What was fused and what was not.

    Attributes:
        fused: name of the norm or dropout -> what it is one kernel with.
        alone: name of a norm that stays by itself -> why. A dropout is not in here: most have no addition behind them.
    """

    fused: dict[str, str] = field(default_factory=dict)
    alone: dict[str, str] = field(default_factory=dict)


def fuse(model: torch.nn.Module, included: Selected, excluded: Selected) -> Found:
    """Fuse fastreg's norms over channels, and its dropouts, with what follows them; ``restore`` of each undoes it.

    A module whose forward calls such layers gets, in place, a class derived from its own, with a forward in which they
    are fused. Any attribute that is set on it later, a child for instance, gives it its own class back.

    Args:
        included: whether a norm or dropout may be fused.
        excluded: whether a module is to be left as it is: a norm, a dropout, an activation, or a module whose forward
            calls them.
    """
    return _Fusion(model, included, excluded).run()


class _Fusion:
    """One call of ``fuse``.

    Attributes:
        names: of all modules of the model.
        layers: those of the layers that can be fused with something.
        found: what is known so far.
        useful: sequences in which something is fused, or whose last layer is fused with what follows the sequence.
    """

    def __init__(self, model: torch.nn.Module, included: Selected, excluded: Selected) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.layers = {each: name for each, name in self.names.items() if _fused.fusion_of(each) is not None}
        self.included, self.excluded = included, excluded
        self.found = Found()
        self.useful: set[torch.nn.Module] = set()

    def run(self) -> Found:
        """Fuse what can be."""
        sequences = []
        # From the inside: a sequence has to be one of ours before what follows it can be fused with its last layer.
        for module in reversed(list(self.names)):
            if _calls_none(module) or not any(
                each in self.layers for each in module.modules() if each is not module
            ):
                continue
            reason = _why_not(module)
            if reason is None and self.excluded(self.names[module], module):
                reason = "excluded"
            if reason is None and _is_sequential(module):
                reason = self._fuse_sequence(module)
                sequences.append(module)
            elif reason is None:
                reason = self._fuse_module(module)
            if reason is not None:
                self._leave(module, reason)
        for module in sequences:
            if _fused.is_sequence(module) and module not in self.useful:
                restore(module)
        for layer, name in self.layers.items():
            if name in self.found.fused:
                self.found.alone.pop(name, None)
            else:
                self._stays_alone(layer, "no forward that was looked at calls it")
        return self.found

    def may_fuse(self, module: torch.nn.Module) -> bool:
        """Whether the user lets a norm or dropout, or anything that follows one, be fused."""
        name = self.names[module]
        return not self.excluded(name, module) and (module not in self.layers or self.included(name, module))

    def _leave(self, module: torch.nn.Module, reason: str) -> None:
        where = self.names[module] or type(module).__name__
        for layer in _called_by(module):
            if layer in self.layers:
                self._stays_alone(layer, f"{where}: {reason}")

    def _stays_alone(self, layer: torch.nn.Module, reason: str) -> None:
        """Keep the first reason why a norm stays by itself."""
        if _fused.ends_in_norm(layer):
            self.found.alone.setdefault(self.layers[layer], reason)

    def _fuse_sequence(self, module: torch.nn.Module) -> str | None:
        layers = list(module.children())
        if len(layers) != len(module._modules):
            return "it has the same layer twice"
        ours = [layer for layer in layers if _fused.ends_in_norm(layer)]
        # A sequence looks at its layers in every call, and asks no selection then.
        concerned = [patterns.last_in(layer) for layer in ours] + [
            layer for layer in layers if _fused.is_activation(layer)
        ]
        if ours and not all(map(self.may_fuse, concerned)):
            return "a norm or an activation in it is not selected"
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            if layer not in ours:
                continue
            norm = patterns.last_in(layer)
            if following is None:
                self._stays_alone(norm, patterns.NOTHING)
            elif not _fused.is_activation(following):
                self._stays_alone(norm, patterns.unknown(type(following).__name__))
            elif any(map(_fused.observed, (*patterns.path_to_last(layer), following))):
                self._stays_alone(norm, "it or the activation behind it has hooks")
            else:
                self.found.fused[self.layers[norm]] = f"norm + {_fused.name_of(following)}"
                self.useful |= {module, *patterns.path_to_last(layer)}
        if ours or (layers and _fused.fusion_at_end(layers[-1]) is not None):
            _take(module, None)
        return None

    def _fuse_module(self, module: torch.nn.Module) -> str | None:
        try:
            pictures = [trace(module, training) for training in (True, False)]
        except NoGraph as reason:
            return str(reason)
        rewritten = 0
        for picture in pictures:
            for node, chain in patterns.find(module, picture.graph, self.may_fuse):
                path = list(patterns.path_to_last(module.get_submodule(str(node.target))))
                if isinstance(chain, str):
                    self._stays_alone(path[-1], chain)
                else:
                    patterns.rewrite(picture.graph, chain)
                    self.found.fused[self.layers[path[-1]]] = chain.what
                    self.useful |= set(path)
                    rewritten += 1
            for call, norm in patterns.find_norms_of_sums(module, picture.graph, self.may_fuse):
                self.found.fused[self.layers[patterns.layer_of(module, call)]] += " + norm"
                patterns.rewrite_norm_of_sum(picture.graph, call, norm)
        if rewritten:
            _take(module, plan_of(*pictures))
        return None


def _is_sequential(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Sequential) and type(module).forward is torch.nn.Sequential.forward


def _calls_none(module: torch.nn.Module) -> bool:
    """Containers and wrappers of torch itself, which call their children but no such layer, and layers of ours."""
    if type(module) is torch.nn.Sequential or isinstance(
        module, torch.fx.GraphModule | torch.jit.ScriptModule
    ):
        return False
    return (type(module).__module__ + ".").startswith(("torch.", "fastreg.nn."))


def _why_not(module: torch.nn.Module) -> str | None:
    if original_class(module) is not None:
        return "fused already"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: convert before torch.jit.script"
    if isinstance(module, torch.fx.GraphModule):
        return "a torch.fx.GraphModule: convert before tracing"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return None


def _called_by(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules that a module's forward most likely calls: its children, and those in its lists."""
    for child in module.children():
        yield child
        if isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict):
            yield from _called_by(child)


def _take(module: torch.nn.Module, plan: Plan | None) -> None:
    vars(module)[ORIGINAL] = type(module)
    module.__class__ = fused_class(type(module), plan)

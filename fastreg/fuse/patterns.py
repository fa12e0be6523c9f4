"""Norm + activation, norm + add, norm + add + activation, dropout + add and dropout + add + norm in a torch.fx graph.

They are found, and each is put into one call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F

from fastreg.nn import _activation, _fused

# Function or method -> (name of the activation, its options after the input, in order).
_FUNCTIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    torch.relu: ("relu", ()),
    torch.relu_: ("relu", ()),
    F.relu: ("relu", ("inplace",)),
    F.leaky_relu: ("leaky_relu", ("negative_slope", "inplace")),
    F.leaky_relu_: ("leaky_relu", ("negative_slope",)),
    F.silu: ("silu", ("inplace",)),
    F.gelu: ("gelu", ("approximate",)),
    F.hardswish: ("hardswish", ("inplace",)),
    "relu": ("relu", ()),
    "relu_": ("relu", ()),
}
_ADDITIONS = (operator.add, torch.add, "add")
# They write into their first operand.
_ADDITIONS_IN_PLACE = (operator.iadd, "add_")

# Modules of torch whose output is memory of its own, whatever their input.
_FRESH = (torch.nn.modules.conv._ConvNd, torch.nn.modules.batchnorm._NormBase, torch.nn.Linear)


NOTHING = "neither an addition nor an activation follows it"


def unknown(what: str) -> str:
    """Why a norm in front of this stays alone."""
    return f"followed by {what}, which is neither an addition nor an activation that the norms fuse"


@dataclass(frozen=True)
class Chain:
    """A norm or a dropout (or a sequence that ends in one) and what follows it.

    Attributes:
        kind: what the layer is, in words.
        between: the node of a ``torch.nn.Identity`` behind the layer.
        name, slope: of the activation.
    """

    kind: str
    layer: torch.fx.Node
    between: torch.fx.Node | None
    addition: torch.fx.Node | None
    activation: torch.fx.Node | None
    name: str | None
    slope: float

    @property
    def what(self) -> str:
        """In words."""
        parts = (self.kind, "add" if self.addition else None, self.name)
        return " + ".join(part for part in parts if part is not None)

    @property
    def residual(self) -> torch.fx.Node | None:
        """The other operand of the addition, as the graph has it now."""
        if self.addition is None:
            return None
        operand = self.between or self.layer
        return next(each for each in self.addition.all_input_nodes if each is not operand)


def find(
    module: torch.nn.Module, graph: torch.fx.Graph, may_fuse: Callable[[torch.nn.Module], bool]
) -> Iterator[tuple[torch.fx.Node, Chain | str]]:
    """Every norm and dropout that the graph calls, with its chain or with the reason why it has none.

    Those later in the graph come first: where both operands of an addition are norms, the later one takes the other's
    output as its residual, and nothing has to be moved. Dropouts come after all norms, which may take an activation
    too. A chain may be rewritten before the next one is asked for.

    Args:
        may_fuse: whether the user lets a norm, a dropout or an activation be fused.
    """
    norms: list[torch.fx.Node] = []
    dropouts: list[torch.fx.Node] = []
    for node in reversed(graph.nodes):
        fusion = (
            _fused.fusion_at_end(module.get_submodule(str(node.target))) if node.op == "call_module" else None
        )
        if fusion is not None:
            (norms if fusion.activates else dropouts).append(node)
    for node in (*norms, *dropouts):
        yield node, _chain(module, graph, node, may_fuse)


def rewrite(graph: torch.fx.Graph, chain: Chain) -> None:
    """Put one call of ``then`` in the place of a chain."""
    # Where the residual is read in the model too, so that it has the value that it has there.
    with graph.inserting_before(chain.addition or chain.layer):

        def reference(node: torch.fx.Node) -> torch.fx.Node:
            return graph.create_node("get_attr", str(node.target))

        options: dict[str, Any] = {}
        if chain.residual is not None:
            options["residual"] = chain.residual
        if chain.activation is not None and chain.activation.op == "call_module":
            options["activation"] = reference(chain.activation)
        elif chain.activation is not None:
            options |= {"activation": chain.name, "negative_slope": chain.slope}
        if chain.between is not None:
            options["between"] = reference(chain.between)
        if chain.addition is not None and chain.addition.target in _ADDITIONS_IN_PLACE:
            options["in_place"] = True
        call = graph.call_function(_fused.then, (reference(chain.layer), chain.layer.args[0]), options)
    nodes = [
        each for each in (chain.layer, chain.between, chain.addition, chain.activation) if each is not None
    ]
    nodes[-1].replace_all_uses_with(call)
    for node in reversed(nodes):
        graph.erase_node(node)


def find_norms_of_sums(
    module: torch.nn.Module, graph: torch.fx.Graph, may_fuse: Callable[[torch.nn.Module], bool]
) -> list[tuple[torch.fx.Node, torch.fx.Node]]:
    """The calls of dropout + add, rewritten before, whose sum a norm of rows reads; each with the norm's node."""
    found = []
    for node in graph.nodes:
        if node.target is not _fused.then or "residual" not in node.kwargs:
            continue
        fusion = _fused.fusion_of(layer_of(module, node))
        if fusion is None or fusion.branch is None:
            continue
        norm = next((user for user in node.users if _is_norm_of(module, user, node, may_fuse)), None)
        if norm is not None and not _written_between(module, graph, node, norm):
            found.append((node, norm))
    return found


def layer_of(module: torch.nn.Module, call: torch.fx.Node) -> torch.nn.Module:
    """The norm or dropout of a call of ``then``."""
    # Its first argument is the node of a reference to it.
    layer: Any = call.args[0]
    return last_in(module.get_submodule(layer.target))


def rewrite_norm_of_sum(graph: torch.fx.Graph, call: torch.fx.Node, norm: torch.fx.Node) -> None:
    """Put one call of ``then_norm`` in the place of a call of ``then`` and of the norm of its sum."""
    with graph.inserting_before(call):
        reference = graph.create_node("get_attr", str(norm.target))
        both = graph.call_function(_fused.then_norm, (*call.args, reference), dict(call.kwargs))
        total = graph.call_function(operator.getitem, (both, 0))
        output = graph.call_function(operator.getitem, (both, 1))
    norm.replace_all_uses_with(output)
    graph.erase_node(norm)
    call.replace_all_uses_with(total)
    graph.erase_node(call)


def _is_norm_of(
    module: torch.nn.Module,
    node: torch.fx.Node,
    total: torch.fx.Node,
    may_fuse: Callable[[torch.nn.Module], bool],
) -> bool:
    if node.op != "call_module" or node.args != (total,) or node.kwargs:
        return False
    child = module.get_submodule(str(node.target))
    return _fused.is_norm_of_rows(child) and may_fuse(child) and not _fused.observed(child)


def _chain(
    module: torch.nn.Module,
    graph: torch.fx.Graph,
    node: torch.fx.Node,
    may_fuse: Callable[[torch.nn.Module], bool],
) -> Chain | str:
    path = list(path_to_last(module.get_submodule(str(node.target))))
    fusion = _fused.fusion_of(path[-1])
    assert fusion is not None
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], torch.fx.Node):
        return "it is called with more than its input"
    if not may_fuse(path[-1]):
        return "not selected"
    if any(map(_fused.observed, path)):
        return "it has hooks, which would not see its output"
    between: torch.fx.Node | None = None
    user = _only_user(node)
    if user is not None and _is_identity(module, user):
        between, user = user, _only_user(user)
    last = between or node
    if user is not None and user.target is _fused.then and user.kwargs.get("residual") is last:
        return "the addition behind it is fused with the norm that makes its other operand"
    addition = None
    if user is not None and _is_addition(user, last) and fusion.adds:
        addition, last, user = user, user, _only_user(user)
    name, slope, activation = None, _activation.DEFAULT_SLOPE, None
    found = _activation_at(module, user, last) if fusion.activates else None
    if found is not None and user is not None:
        child = module.get_submodule(str(user.target)) if user.op == "call_module" else None
        if child is None or (may_fuse(child) and not _fused.observed(child)):
            activation, (name, slope) = user, found
        elif addition is None:
            hooks = _fused.observed(child)
            return "the activation behind it " + ("has hooks" if hooks else "is not selected")
    if addition is None and activation is None:
        return _nothing_follows(module, node, between or node, fusion, path[-1])
    if addition is not None and _may_change(module, graph, node, addition):
        return "what it reads may change before the addition"
    return Chain(fusion.name, node, between, addition, activation, name, slope)


def path_to_last(layer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The layer itself, after the sequences that end in it."""
    yield layer
    while _fused.is_sequence(layer):
        layer = list(layer.children())[-1]
        yield layer


def last_in(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer that a sequence ends in, or the layer itself."""
    return list(path_to_last(layer))[-1]


def _only_user(node: torch.fx.Node) -> torch.fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_identity(module: torch.nn.Module, node: torch.fx.Node) -> bool:
    if node.op != "call_module" or len(node.args) != 1:
        return False
    child = module.get_submodule(str(node.target))
    return type(child) is torch.nn.Identity and not _fused.observed(child)


def _is_addition(node: torch.fx.Node, operand: torch.fx.Node) -> bool:
    """Whether a node is the sum of the operand and another value, and writes into nothing but the operand."""
    if node.op not in ("call_function", "call_method") or node.kwargs or len(node.args) != 2:
        return False
    left, right = node.args
    if not (isinstance(left, torch.fx.Node) and isinstance(right, torch.fx.Node)) or left is right:
        return False
    return node.target in _ADDITIONS or (node.target in _ADDITIONS_IN_PLACE and left is operand)


def _activation_at(
    module: torch.nn.Module, node: torch.fx.Node | None, argument: torch.fx.Node
) -> tuple[str, float] | None:
    """Name and slope of the activation that a node applies to the argument; None if it is none that we know."""
    if node is None or not node.args or node.args[0] is not argument:
        return None
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        plain = len(node.args) == 1 and not node.kwargs and _fused.is_activation(child)
        return _activation.activation_of(child) if plain else None
    if node.op not in ("call_function", "call_method") or node.target not in _FUNCTIONS:
        return None
    name, order = _FUNCTIONS[node.target]
    options: dict[str, Any] = {**dict(zip(order, node.args[1:], strict=False)), **node.kwargs}
    if any(isinstance(value, torch.fx.Node) for value in options.values()):
        return None
    if options.get("approximate", "none") == "tanh":
        name = "gelu_tanh"
    elif options.get("approximate", "none") != "none":
        return None
    return name, float(options.get("negative_slope", _activation.DEFAULT_SLOPE))


def _may_change(
    module: torch.nn.Module, graph: torch.fx.Graph, layer: torch.fx.Node, addition: torch.fx.Node
) -> bool:
    """Whether anything between a layer and the addition could write into the layer's input, or runs the same layer.

    The layer is to run where the addition is. What it reads must then still be what it was.
    """
    same = last_in(module.get_submodule(str(layer.target)))
    source = layer.args[0]
    shared = _sources(module, source) if isinstance(source, torch.fx.Node) else set()
    passed = False
    for node in graph.nodes:
        if node is addition:
            return False
        if node is layer:
            passed = True
            continue
        if passed and node.op == "call_module" and same in module.get_submodule(str(node.target)).modules():
            return True
        if any(each in shared for each in node.all_input_nodes) and not _is_fresh(module, node):
            if passed and _may_write(module, node):
                return True
            shared.add(node)
    return False


def _written_between(
    module: torch.nn.Module, graph: torch.fx.Graph, total: torch.fx.Node, norm: torch.fx.Node
) -> bool:
    """Whether anything between a sum and its norm could write into the sum.

    The norm is to run where the sum is made.
    """
    shared: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node is norm:
            return False
        if node is total:
            shared.add(node)
        elif any(each in shared for each in node.all_input_nodes) and not _is_fresh(module, node):
            if _may_write(module, node):
                return True
            shared.add(node)
    return False


def _is_fresh(module: torch.nn.Module, node: torch.fx.Node) -> bool:
    """Whether a node only reads its inputs, and its value is memory of its own."""
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), _FRESH)


def _sources(module: torch.nn.Module, node: torch.fx.Node) -> set[torch.fx.Node]:
    """The nodes before this one whose memory its value may lie in."""
    found: set[torch.fx.Node] = set()
    pending = [node]
    while pending:
        each = pending.pop()
        if each not in found:
            found.add(each)
            pending += [] if _is_fresh(module, each) else each.all_input_nodes
    return found


def _may_write(module: torch.nn.Module, node: torch.fx.Node) -> bool:
    """Whether a node may write into what it is given."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) is not torch.nn.Identity
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    home = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    if node.op == "call_function" and home not in ("torch", "_operator"):
        return True
    if name.endswith("_") or (home == "_operator" and name.startswith("i")) or "out" in node.kwargs:
        return True
    # relu(x, True)
    functional = getattr(node.target, "__module__", None) in ("torch.nn.functional", "torch._C._nn")
    return node.kwargs.get("inplace", False) is not False or (functional and True in node.args)


def _nothing_follows(
    module: torch.nn.Module,
    node: torch.fx.Node,
    last: torch.fx.Node,
    fusion: _fused.Fusion,
    layer: torch.nn.Module,
) -> str:
    if len(node.users) > 1 or len(last.users) > 1:
        return "its output is used more than once"
    user = _only_user(last)
    if user is None or user.op == "output":
        return NOTHING
    if not fusion.adds and _is_addition(user, last):
        return f"followed by an addition, which {type(layer).__name__} is not fused with"
    target: Any = user.target
    if user.op == "call_module":
        what = type(module.get_submodule(str(target))).__name__
    else:
        what = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return unknown(what)

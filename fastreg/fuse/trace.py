"""``torch.fx``'s picture of one module's forward, or the reason why there is none that can be trusted.

``torch.fx`` runs a forward once with stand-ins for its tensors. What Python does meanwhile (a branch on the type of a
value, a ``with`` block, an attribute that is set, a random number) leaves no trace in its graph, and a graph without it
would be another function. So the code that runs is watched, and a forward that does such things is not taken.
"""

from __future__ import annotations

import dis
import gc
import inspect
import operator
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.fx
from torch.overrides import TorchFunctionMode

_TORCH = str(Path(torch.__file__).parent)

# Instructions of the model's code by which something happens that a graph does not show.
_UNSEEN = {
    "STORE_ATTR": "sets an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_SUBSCR": "assigns to an element",
    "DELETE_SUBSCR": "deletes an element",
    "STORE_GLOBAL": "sets a global variable",
    "DELETE_GLOBAL": "deletes a global variable",
    "SETUP_WITH": "has a with block",
    "WITH_EXCEPT_START": "has a with block",
    "SETUP_FINALLY": "has a try block",
    "PUSH_EXC_INFO": "has a try block",
}
# Files of torch whose code changes how operations run, and does so unseen.
_UNSEEN_FILES = (
    "utils/_contextlib.py",
    "utils/checkpoint.py",
    "amp/autocast_mode.py",
    "autograd/grad_mode.py",
    "_dynamo/eval_frame.py",
)
# Builtins whose answer may be another one in the next call.
_CHANGING = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "print", "input")


@dataclass(frozen=True)
class Picture:
    """A graph, and every name that the code behind it mentions: an attribute of another name does not matter to it."""

    graph: torch.fx.Graph
    names: frozenset[str]


class NoGraph(Exception):
    """There is no graph of this forward that could take its place; the text says why."""


def trace(module: torch.nn.Module, training: bool) -> Picture:
    """The graph of a module's forward in one of the two modes, in which all its submodules are single nodes.

    The inputs are the arguments that have no default, all of them tensors; the others have their default.

    Raises:
        NoGraph: the graph would not be the same function.
    """
    before = _snapshot(module)
    try:
        vars(module)["training"] = training
        tracer = _Tracer()
        graph = tracer.trace(module)
        return Picture(graph, frozenset(tracer.names))
    except NoGraph:
        raise
    except Exception as error:  # the model's own code, run on stand-ins, may raise anything
        text = (str(error).strip() or "no text").splitlines()[0]
        raise NoGraph(f"torch.fx cannot trace it: {type(error).__name__}: {text}") from error
    finally:
        _put_back(before)


_State = list[tuple[dict[str, Any], dict[str, Any]]]


def _snapshot(module: torch.nn.Module) -> _State:
    """What the attributes, parameters, buffers and children of all modules are: a forward may set stand-ins there."""
    kept: _State = []
    for each in module.modules():
        places = (vars(each), each._parameters, each._buffers, each._modules)
        kept += [(attributes, dict(attributes)) for attributes in places]
    return kept


def _put_back(state: _State) -> None:
    for attributes, before in state:
        attributes.clear()
        attributes.update(before)


def required_arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the arguments without a default, but for ``self``."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    required = [each for each in parameters if each.default is each.empty]
    if any(each.kind is each.KEYWORD_ONLY for each in required):
        raise NoGraph("it has an argument that is keyword-only")
    return tuple(
        each.name for each in required if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    )


def names_in(code: CodeType) -> set[str]:
    """The names that code mentions, also as strings for getattr, and also in functions inside it."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= names_in(constant)
        elif isinstance(constant, str):
            found.add(constant)
    return found


class _Proxy(torch.fx.Proxy):
    """A stand-in that also records ``+=`` and its kin, and is not silently of no type at all."""

    _is_param = False

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What isinstance asks for: the inputs are tensors, and of other values nothing is known."""
        if sys._getframe(1).f_code.co_filename.startswith(_TORCH):
            return _Proxy
        if self.node.op == "placeholder":
            return torch.Tensor
        raise NoGraph("it asks for the type of a value that it computed")


def _recorder(function: Callable[..., Any]) -> Callable[..., Any]:
    def record(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "imatmul",
    "iand",
    "ior",
    "ixor",
):
    setattr(_Proxy, f"__{_name}__", _recorder(getattr(operator, _name)))


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True
    names: set[str]

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: torch.fx.Node) -> _Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        # Before torch.fx asks whether it is a tensor.
        if issubclass(type(a), torch.fx.Proxy):
            return a.node
        found = super().create_arg(a)
        if isinstance(a, torch.Tensor) and str(getattr(found, "target", "")).startswith("_tensor_constant"):
            raise NoGraph("it uses a tensor that is neither an input, nor a parameter, nor a buffer")
        return found

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        names = required_arguments(root_fn)
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in names]

        def run(*arguments: Any) -> Any:
            watch = _Watch()
            try:
                with watch, _OnlyStandIns():
                    output = root_fn(*arguments)
            finally:
                # Also where it failed: what is said here is nearer to the cause.
                watch.judge()
            self.names = set().union(*map(names_in, watch.codes))
            return output

        return run, [self.root, *inputs]


class _OnlyStandIns(TorchFunctionMode):
    """Refuses torch's functions where no argument is a stand-in: they would run now, and never again."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not any(issubclass(each, torch.fx.Proxy) for each in types):
            name = getattr(func, "__name__", str(func))
            raise NoGraph(f"{name} computes something that does not come from its input")
        return func(*args, **(kwargs or {}))


class _Watch:
    """Notes what the model's code does and calls; what torch calls in turn is torch's affair.

    Nothing is collected meanwhile: a finalizer that the collector calls would be taken for the model's code.
    """

    def __init__(self) -> None:
        # In the order of the first calls.
        self.codes: dict[CodeType, None] = {}
        self.changing: set[str] = set()
        # How many calls deep in torch, or in this file, the program is.
        self._inside = 0

    def __enter__(self) -> _Watch:
        self._before, self._collects = sys.getprofile(), gc.isenabled()
        gc.disable()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)
        if self._collects:
            gc.enable()

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            file = frame.f_code.co_filename
            if self._inside == 0 or file.endswith(_UNSEEN_FILES):
                self.codes[frame.f_code] = None
            if self._inside > 0 or file == __file__ or file.startswith(_TORCH):
                self._inside += 1
        elif event == "return":
            self._inside = max(0, self._inside - 1)
        elif event == "c_call" and self._inside == 0:
            name = getattr(argument, "__name__", "")
            if name in _CHANGING or isinstance(getattr(argument, "__self__", None), random.Random):
                self.changing.add(name)

    def judge(self) -> None:
        """Raise NoGraph if the code did what a graph does not show."""
        if self.changing:
            raise NoGraph(f"it calls {min(self.changing)}, which may do something else in the next call")
        in_torch = [code for code in self.codes if code.co_filename.startswith(_TORCH)]
        for code in self.codes:
            if code in in_torch or code.co_filename == __file__:
                continue
            instructions = {each.opname for each in dis.get_instructions(code)}
            does = [what for name, what in _UNSEEN.items() if name in instructions]
            if does:
                raise NoGraph(f"{code.co_name} {does[0]}")
        for code in in_torch:
            if code.co_filename.endswith(_UNSEEN_FILES):
                name = Path(code.co_filename).name
                raise NoGraph(f"it runs torch's {name}, which leaves no trace in a graph")

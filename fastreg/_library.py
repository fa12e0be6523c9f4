"""Define an operator, its implementation and its fake in one call.

Every operator exists twice under one schema: ``fastreg::<name>``, whose implementation asks ``fastreg.backends`` which
backend serves the call, and, where the native libraries are loaded, ``fastreg_native::<name>``. Eager calls that the
native backend serves go to the second one at once, so that a call crosses a single dispatcher boundary; everything that
is traced (``torch.compile``, ``torch.export``) records the first one, so that a graph does not depend on the backend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastreg import backends
from fastreg.backends import native

_LIBRARY = torch.library.Library("fastreg", "DEF")


class Operator:
    """One operator of one op: callable, and aware of the backends that implement it.

    Attributes:
        op: the op it belongs to, which is also the file stem ("layer_norm").
        name: the operator's own name ("layer_norm_fwd").
        schema: the schema shared by both namespaces.
        overload: the cached ``fastreg::`` overload.
    """

    def __init__(self, op: str, name: str, schema: str, fake: Callable[..., Any]) -> None:
        self.op = op
        self.name = name
        self.schema = schema
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastreg::{name}", fake, lib=_LIBRARY)
        native.register_fake(name, fake)
        self.overload = getattr(torch.ops.fastreg, name).default
        self._routes: dict[tuple[str | None, torch.device, torch.dtype], Callable[..., Any]] = {}

    def _run(self, tensor: torch.Tensor, *arguments: Any) -> Any:
        implementation = backends.implementation(backends.pick(self.op, tensor), self.op, self.name)
        return implementation(tensor, *arguments)

    def __call__(self, tensor: torch.Tensor, *arguments: Any) -> Any:
        return self.route(tensor)(tensor, *arguments)

    def route(self, tensor: torch.Tensor) -> Callable[..., Any]:
        """What a call with this first argument runs; a forward keeps it, so that its backward runs where it ran."""
        if torch.compiler.is_compiling():
            return self.overload  # type: ignore[no-any-return]
        route = self._routes.get((backends.requested(), tensor.device, tensor.dtype))
        return self._new_route(tensor) if route is None else route

    def _new_route(self, tensor: torch.Tensor) -> Callable[..., Any]:
        request = backends.requested()
        route: Callable[..., Any] = self.overload
        # On a meta tensor only the fake runs, which no backend needs to serve.
        if not tensor.is_meta:
            if backends.pick(self.op, tensor) == "native":
                route = native.overload(self.name)
            elif request is not None:
                route = partial(self._run_as, request)
        self._routes[request, tensor.device, tensor.dtype] = route
        return route

    def _run_as(self, request: str, tensor: torch.Tensor, *arguments: Any) -> Any:
        """The call as it was when ``request`` was asked for, even if by now something else is."""
        if request == backends.requested():
            return self.overload(tensor, *arguments)
        implementation = backends.implementation(request, self.op, self.name)
        return implementation(tensor, *arguments)


OPERATORS: dict[str, Operator] = {}


def define(op: str, name: str, schema: str, fake: Callable[..., Any]) -> Operator:
    """Register ``fastreg::<name>`` with ``schema``, implemented by the backends' functions of that name.

    The first argument of every operator is a tensor; its device and dtype decide which backend serves the call.
    """
    operator = Operator(op, name, schema, fake)
    OPERATORS[name] = operator
    return operator


def define_for_tracing(
    name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register ``fastreg::<name>``, which no backend implements: plain torch that a compiler is not to look into."""
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastreg::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fastreg, name).default  # type: ignore[no-any-return]

"""Define an operator, its implementation and its fake in one call.

Every operator exists twice under one schema: ``fastreg::<name>``, whose implementation asks ``fastreg.backends`` which
backend serves the call, and, where the native libraries are loaded, ``fastreg_native::<name>``. Eager calls that the
native backend serves go to the second one at once, so that a call crosses a single dispatcher boundary; everything that
is traced (``torch.compile``, ``torch.export``) records the first one, so that a graph does not depend on the backend.
"""

from __future__ import annotations

from collections.abc import Callable
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
        if torch.compiler.is_compiling():
            return self.overload(tensor, *arguments)
        key = (backends.requested(), tensor.device, tensor.dtype)
        route = self._routes.get(key)
        if route is None:
            # On a meta tensor only the fake runs, which no backend needs to serve.
            is_native = not tensor.is_meta and backends.pick(self.op, tensor) == "native"
            route = self._routes[key] = native.overload(self.name) if is_native else self.overload
        return route(tensor, *arguments)

    def as_requested(self, request: str | None, tensor: torch.Tensor, *arguments: Any) -> Any:
        """The call as it would be with ``request`` asked for: a backward runs where its forward ran."""
        if request == backends.requested() or tensor.is_meta or torch.compiler.is_compiling():
            return self(tensor, *arguments)
        implementation = backends.implementation(
            backends.pick_as(request, self.op, tensor), self.op, self.name
        )
        return implementation(tensor, *arguments)


OPERATORS: dict[str, Operator] = {}


def define(op: str, name: str, schema: str, fake: Callable[..., Any]) -> Operator:
    """Register ``fastreg::<name>`` with ``schema``, implemented by the backends' functions of that name.

    The first argument of every operator is a tensor; its device and dtype decide which backend serves the call.
    """
    operator = Operator(op, name, schema, fake)
    OPERATORS[name] = operator
    return operator

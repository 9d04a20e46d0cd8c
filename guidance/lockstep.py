"""Run the parts of a classifier-free guidance batch in step, with a graph for one part only.

The gradient of guidance needs a graph for the conditional part alone, but a forward for each part reads and unpacks
every weight once a part, which costs 10 to 20% of a step at batch 1 on a CPU.  A :class:`Lockstep` tensor is the
conditional part with the others at its side: operations with weights run once on the whole batch, all others part by
part, and only the conditional part remembers them for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Operations whose second argument is a weight that all parts share.
_WEIGHTED = (F.conv2d, F.linear)


class NotInStepError(Exception):
    """An operation that cannot run part by part; the parts have to run one after another then."""


class Lockstep(Tensor):
    """The conditional part of a batch; ``others`` holds the other parts, each of the same shape."""

    others: list[Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _WEIGHTED and isinstance(args[0], Lockstep) and not any(map(_moves, args[1:])):
                return _joint(func, args[0], args[1:], kwargs)
            if _fills(func, args, kwargs):
                raise NotInStepError(f"{func} writes parts into one tensor")
            result = func(*_pick(args, None), **_pick(kwargs, None))
            count = _count(args) or _count(kwargs)
            if not count or not _has_tensor(result):
                return result
            with torch.no_grad():
                rest = [func(*_pick(args, i), **_pick(kwargs, i)) for i in range(count)]
            return _merge(result, rest)


def lockstep(parts: Sequence[Any], conditional: int) -> Any:
    """Join the same argument of several parts: tensors that differ become one :class:`Lockstep`.

    Args:
        parts: The argument as each part would get it: tensors, or containers of them.
        conditional: Index of the part that may have a graph.
    """
    first = parts[conditional]
    others = [p for i, p in enumerate(parts) if i != conditional]
    if isinstance(first, Tensor):
        return first if all(o is first for o in others) else _tie(first, others)
    if isinstance(first, dict):
        return {k: lockstep([p[k] for p in parts], conditional) for k in first}
    if isinstance(first, list | tuple):
        return type(first)(lockstep(items, conditional) for items in zip(*parts, strict=True))
    return first


def plain(x: Tensor) -> Tensor:
    """The conditional part alone, as an ordinary tensor with its graph."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor) if isinstance(x, Lockstep) else x


def split_parts(x: Tensor, conditional: int) -> list[Tensor]:
    """All parts in their order: the inverse of :func:`lockstep`."""
    parts = list(x.others) if isinstance(x, Lockstep) else []
    parts.insert(conditional, plain(x))
    return parts


def _tie(first: Tensor, others: Sequence[Tensor]) -> Tensor:
    tied = first.as_subclass(Lockstep)
    tied.others = list(others)
    return tied


def _moves(value: Any) -> bool:
    return isinstance(value, Lockstep)


def _fills(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a tensor that all parts share is written to, as sliced attention does: the last part would win."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and not isinstance(args[0], Lockstep)
    return "out" in kwargs or name == "__setitem__" or in_place


def _pick(value: Any, part: int | None) -> Any:
    """The arguments as one part sees them; None: the conditional one."""
    if isinstance(value, Lockstep):
        return plain(value) if part is None else value.others[part]
    if isinstance(value, dict):
        return {k: _pick(v, part) for k, v in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(_pick(v, part) for v in value)
    return value


def _count(value: Any) -> int:
    """Number of other parts, 0 where no argument has any."""
    if isinstance(value, Lockstep):
        return len(value.others)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return max(map(_count, items), default=0)


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_has_tensor, value)))


def _merge(first: Any, rest: Sequence[Any]) -> Any:
    if isinstance(first, Tensor):
        return _tie(first, rest)
    if isinstance(first, list | tuple):
        return type(first)(_merge(a, b) for a, b in zip(first, zip(*rest, strict=True), strict=True))
    return first


def _joint(func: Callable[..., Tensor], x: Lockstep, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """One call on the whole batch, cut into parts again."""
    found: list[Tensor] = []
    first = plain(x)
    run = lambda c: func(torch.cat([*x.others, c]), *args, **kwargs)  # noqa: E731
    if torch.is_grad_enabled() and first.requires_grad:
        weight = args[0] if args else kwargs["weight"]
        options = _conv_options(args, kwargs) if func is F.conv2d else None
        cond = _Joint.apply(first, weight, run, options, found)
    else:
        with torch.no_grad():
            *found, cond = run(first).chunk(len(x.others) + 1)
    return _tie(cond, found)


def _conv_options(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """stride, padding, dilation, groups of a ``conv2d`` call."""
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given = dict(zip(("weight", "bias", *defaults), args, strict=False)) | kwargs
    return tuple(given.get(k, v) for k, v in defaults.items())


class _Joint(torch.autograd.Function):
    """A weighted operation on all parts whose backward pass knows the conditional one; the weight is frozen."""

    @staticmethod
    def forward(
        ctx: Any, cond: Tensor, weight: Tensor, run: Any, options: Any, found: list[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.options = cond.shape, options
        whole = run(cond)
        parts = whole.shape[0] // cond.shape[0]
        *others, first = whole.chunk(parts)
        found += others
        # Its own memory: what is kept of it for the gradient must not hold the other parts' too.
        return first.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        weight = weight.to(grad.dtype)
        if ctx.options is None:
            return grad @ weight, None, None, None, None
        return torch.nn.grad.conv2d_input(ctx.shape, weight, grad, *ctx.options), None, None, None, None

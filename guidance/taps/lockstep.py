"""Run the parts of a classifier-free guidance batch in step, with a graph for one part only.

The gradient of guidance needs a graph for the conditional part alone, but separate forwards read and unpack every
weight once per part, which costs 10 to 20% of a step at batch 1 on a CPU.  A :class:`Lockstep` tensor is the
conditional part with the others beside it: operations with large weights run once on the whole batch, all others part
by part, and only the conditional part records them for the backward pass.  Weights smaller than a part's input are read
again for each part, which is cheaper than concatenating the parts.

Where no graph is needed any more, whole modules run on the batch as one (:func:`as_batch`, :func:`as_parts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Operations whose second argument is a weight that all parts share.
_WEIGHTED = (F.conv2d, F.linear)


#: Tensors in nested tuples, lists and dicts, beside other values.
Tree = Any


class NotInStepError(Exception):
    """Report an operation that cannot run part by part; the parts must then run one after another."""


class Lockstep(Tensor):
    """The conditional part of a batch; ``others`` holds the other parts, each of the same shape.

    ``whole`` is the tensor of which they all are views, the conditional part last, if there is one.
    """

    others: list[Tensor]
    whole: Tensor | None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _WEIGHTED and isinstance(args[0], Lockstep) and _pays(args[0], args[1:], kwargs):
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


def lockstep(parts: Sequence[Tree], conditional: int) -> Tree:
    """Join the same argument of several parts: tensors that differ become one :class:`Lockstep`.

    Args:
        parts: The argument of each part: tensors, or containers of them.
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
    """Return the conditional part alone, as an ordinary tensor with its graph."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor) if isinstance(x, Lockstep) else x


def split_parts(x: Tensor, conditional: int) -> list[Tensor]:
    """Return all parts in order: the inverse of :func:`lockstep`."""
    parts = list(x.others) if isinstance(x, Lockstep) else []
    parts.insert(conditional, plain(x))
    return parts


def as_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], int] | None:
    """Return a module's arguments for the whole batch, the conditional part last, and the number of parts.

    A shared argument with a batch dimension is repeated.

    Returns:
        None if no argument has parts, or not all of them have the batch dimension.
    """
    tied = list(_find((args, kwargs)))
    if not tied or any(x.ndim == 0 or len(x) != len(tied[0]) for x in tied):
        return None
    size, parts = len(tied[0]), len(tied[0].others) + 1

    def whole(value: Tree) -> Tree:
        shared = type(value) is Tensor and value.ndim > 0 and len(value) == size
        return torch.cat([value] * parts) if shared else _map(_whole, value)

    return tuple(map(whole, args)), {k: whole(v) for k, v in kwargs.items()}, parts


def as_parts(output: Tree, parts: int) -> Tree:
    """Split a module's output for :func:`as_batch` into parts again."""
    return _map(lambda x: _cut(x, parts), output)


def _whole(x: Tensor) -> Tensor:
    if not isinstance(x, Lockstep):
        return x
    return torch.cat([*x.others, plain(x)]) if x.whole is None else x.whole


def _cut(whole: Tensor, parts: int) -> Tensor:
    """Return the parts of a batch whose last part is the conditional one, as views of it."""
    *others, first = whole.chunk(parts)
    return _tie(first, others, whole)


def _map(f: Callable[[Tensor], Any], value: Tree) -> Tree:
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, dict):
        return {k: _map(f, v) for k, v in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(_map(f, v) for v in value)
    return value


def _find(value: Tree) -> Iterator[Lockstep]:
    """Yield all tensors with parts."""
    if isinstance(value, Lockstep):
        yield value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for item in items:
        yield from _find(item)


def _tie(first: Tensor, others: Sequence[Tensor], whole: Tensor | None = None) -> Tensor:
    tied = first.as_subclass(Lockstep)
    tied.others, tied.whole = list(others), whole
    return tied


def _pays(x: Lockstep, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Tell whether all parts share the weight, and reading it costs more than concatenating the parts."""
    if any(isinstance(value, Lockstep) for value in args):
        return False
    return x.whole is not None or _weight(args, kwargs).numel() > x.numel()


def _weight(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["weight"]


def _fills(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Tell whether a shared tensor is written to, as in sliced attention: the last part would win."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__") and not isinstance(args[0], Lockstep)
    return "out" in kwargs or name == "__setitem__" or in_place


def _pick(value: Tree, part: int | None) -> Tree:
    """Return the arguments of one part; None: the conditional one."""

    def pick(x: Tensor) -> Tensor:
        if not isinstance(x, Lockstep):
            return x
        return plain(x) if part is None else x.others[part]

    return _map(pick, value)


def _count(value: Tree) -> int:
    """Return the number of other parts, 0 where no argument has any."""
    return max((len(x.others) for x in _find(value)), default=0)


def _has_tensor(value: Tree) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_has_tensor, value)))


def _merge(first: Tree, rest: Sequence[Tree]) -> Tree:
    if isinstance(first, Tensor):
        return _tie(first, rest)
    if isinstance(first, list | tuple):
        return type(first)(_merge(a, b) for a, b in zip(first, zip(*rest, strict=True), strict=True))
    return first


def _joint(func: Callable[..., Tensor], x: Lockstep, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Call once on the whole batch and split the result into parts."""
    first = plain(x)
    if not (torch.is_grad_enabled() and first.requires_grad):
        with torch.no_grad():
            return _cut(func(_whole(x), *args, **kwargs), len(x.others) + 1)
    found: list[Tensor] = []

    def run(conditional: Tensor) -> Tensor:
        return func(torch.cat([*x.others, conditional]), *args, **kwargs)

    options = _conv_options(args, kwargs) if func is F.conv2d else None
    return _tie(_Joint.apply(first, _weight(args, kwargs), run, options, found), found)


def _conv_options(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return stride, padding, dilation and groups of a ``conv2d`` call."""
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given = dict(zip(("weight", "bias", *defaults), args, strict=False)) | kwargs
    return tuple(given.get(k, v) for k, v in defaults.items())


class _Joint(torch.autograd.Function):
    """A weighted operation on all parts with a backward pass of the conditional one; the weight is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        cond: Tensor,
        weight: Tensor,
        run: Callable[[Tensor], Tensor],
        options: tuple[Any, ...] | None,
        found: list[Tensor],
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.options = cond.shape, options
        whole = run(cond)
        parts = whole.shape[0] // cond.shape[0]
        *others, first = whole.chunk(parts)
        found += others
        # a copy: what the graph keeps of it must not keep the other parts alive
        return first.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        weight = weight.to(grad.dtype)
        if ctx.options is None:
            return grad @ weight, None, None, None, None
        return torch.nn.grad.conv2d_input(ctx.shape, weight, grad, *ctx.options), None, None, None, None

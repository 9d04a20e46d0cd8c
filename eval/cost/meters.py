"""Meters of a step: FLOPs, seconds, peak memory, and activations saved for a backward pass."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Run = Callable[[], Any]

_packing: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("packing", default=None)


class _GlobalTracker:
    """Module tracker that puts everything under one name: torch's cannot follow gradients of an input."""

    parents: ClassVar[set[str]] = {"Global"}

    def __enter__(self) -> _GlobalTracker:
        return self

    def __exit__(self, *args: object) -> None:
        pass


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


#: Fused attention on a CPU, which torch's counter ignores.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count_flops(run: Run) -> int:
    """Count the floating point operations of a call; a multiply-add is two."""
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    counter.mod_tracker = _GlobalTracker()
    with counter:
        run()
    return counter.get_total_flops()


def count_saved(run: Run, networks: Iterable[nn.Module]) -> int:
    """Count the bytes of activations that a call saves for its backward pass: each storage once, no weights."""
    weights = {p.untyped_storage().data_ptr() for network in networks for p in network.parameters()}
    kept: dict[int, Any] = {}  # the storages themselves, so that no address is reused

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    token = _packing.set(pack)
    try:
        with counted():
            run()
    finally:
        _packing.reset(token)
    return sum(storage.nbytes() for storage in kept.values())


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """Restore the hooks of :func:`count_saved` inside a region that replaces them."""
    pack = _packing.get()
    with contextlib.nullcontext() if pack is None else saved_tensors_hooks(pack, lambda x: x):
        yield


def time_run(run: Run, device: str) -> float:
    """Time a call in seconds: CPU time of all threads on a CPU, wall time on an accelerator."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.accelerator.synchronize()
    start = time.perf_counter()
    run()
    torch.accelerator.synchronize()
    return time.perf_counter() - start


def peak_memory(run: Run, device: str) -> int | None:
    """Measure the peak memory of a call in bytes, weights included: of the process on Linux, of the allocator on CUDA.

    Returns:
        None on other platforms.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    if device != "cpu" or not _reset_peak():
        return None
    run()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _reset_peak() -> bool:
    """Return freed memory to the kernel and reset its peak counter; False where that is unsupported."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True

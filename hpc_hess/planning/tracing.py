"""What a program would do to one rank's machine, seen without doing it: memory, arithmetic, traffic.

A dispatch mode around fake tensors (which have shapes and no numbers) sees every operation of the real program. Values
that the program reads back are those of a healthy run: true flags, ones.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_hess.errors import ModelError
from hpc_hess.profiling.flops import count_flops

_aten, _c10d = torch.ops.aten, torch.ops.c10d

# collective -> which argument holds what travels; its bytes are those of the whole group's tensor
_COLLECTIVES: dict[Any, tuple[str, int]] = {
    _c10d._allgather_base_.default: ("all-gather", 0),
    _c10d._reduce_scatter_base_.default: ("reduce-scatter", 1),
    _c10d.alltoall_base_.default: ("all-to-all", 1),
    _c10d.allreduce_.default: ("all-reduce", 0),
    _c10d.broadcast_.default: ("broadcast", 0),
}


class Operation(NamedTuple):
    """One operation: the dtype it computes in, its floating-point operations, the bytes it reads and writes."""

    dtype: str
    flops: int
    bytes: int


class Collective(NamedTuple):
    """One collective: its kind, and the bytes of the tensor that the whole group has before or after it."""

    kind: str
    bytes: int


@dataclass(frozen=True)
class Work:
    """What a stretch of the program asks of a machine: how often it does each operation and each collective."""

    operations: Counter[Operation] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.collectives + other.collectives)

    def __sub__(self, other: Work) -> Work:
        """Return what is here and not in ``other``."""
        return Work(self.operations - other.operations, self.collectives - other.collectives)

    def __mul__(self, count: int) -> Work:
        return Work(
            Counter({key: count * n for key, n in self.operations.items()}),
            Counter({key: count * n for key, n in self.collectives.items()}),
        )

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return sum(n * operation.flops for operation, n in self.operations.items())

    @property
    def bytes(self) -> int:
        """Bytes read and written by operations, each counted alone."""
        return sum(n * operation.bytes for operation, n in self.operations.items())

    def sent(self) -> dict[str, int]:
        """Return the bytes of each kind of collective, as the whole group's tensors have them."""
        found: Counter[str] = Counter()
        for collective, n in self.collectives.items():
            found[collective.kind] += n * collective.bytes
        return dict(found)


@dataclass
class Peak:
    """The most memory held at one time, in bytes, and what it was then, by category."""

    bytes: int = 0
    parts: Counter[str] = field(default_factory=Counter)


@dataclass
class Stretch:
    """What a stretch of the program does, and the most it holds."""

    work: Work
    peak: Peak


class Tracer(TorchDispatchMode):
    """Counts what goes on inside ``with tracer:``; enter it inside a FakeTensorMode.

    Attributes
    ----------
    work : everything so far.
    held : bytes held now, by category: see :meth:`category`.

    Parameters
    ----------
    experts : of a mixture: tokens are spread over them evenly.

    """

    def __init__(self, experts: int = 1) -> None:
        super().__init__()
        self.work, self._experts = Work(), experts
        self.held: Counter[str] = Counter()
        self._total = 0
        self._category = "other"
        self._peaks: list[Peak] = []
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._resize: Callable[..., Any] = torch.UntypedStorage.resize_

    def __enter__(self) -> Tracer:
        tracer, resize = self, self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:  # FSDP frees by this; no dispatch mode sees it
            result = resize(storage, size)
            tracer._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    @contextlib.contextmanager
    def category(self, name: str) -> Iterator[None]:
        """File memory that is allocated inside under ``name``, for as long as it lives."""
        before, self._category = self._category, name
        try:
            yield
        finally:
            self._category = before

    @contextlib.contextmanager
    def stretch(self) -> Iterator[Stretch]:
        """Yield what the block does and holds, which is filled by its end."""
        before = Work(self.work.operations.copy(), self.work.collectives.copy())
        found = Stretch(Work(), Peak(self._total, Counter(self.held)))
        self._peaks.append(found.peak)
        try:
            yield found
        finally:
            self._peaks = [peak for peak in self._peaks if peak is not found.peak]
            found.work = self.work - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # what it does to its local part comes back here
        kwargs = kwargs or {}
        try:
            out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self._of_a_healthy_run(func, args)
        if func in _COLLECTIVES:
            kind, place = _COLLECTIVES[func]
            self.work.collectives[Collective(kind, sum(_nbytes(t) for t in _tensors(args[place])))] += 1
        elif func.namespace != "c10d":
            self._count(func, args, kwargs, out)
        for tensor in _tensors(out):
            self._hold(tensor)
        return out

    def _of_a_healthy_run(self, func: Any, args: Any) -> Any:
        """What an operation whose result depends on numbers gives: true, one, every element that can be chosen."""
        if func is _aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if func in (_aten.equal.default, _aten.allclose.default):
            return True
        if func is _aten.nonzero.default:
            mask = args[0]
            if mask.ndim == 1:  # which experts are asked, for one: the numbers are known
                with unset_fake_temporarily():
                    numbers = torch.arange(mask.numel())[:, None]
                return mask.fake_mode.fake_tensor_converter.from_real_tensor(mask.fake_mode, numbers, make_constant=True)
            # one of two dimensions tells which tokens an expert gets
            count = -(-mask.numel() // self._experts) if mask.ndim == 2 else mask.numel()
            return torch.empty(count, mask.ndim, dtype=torch.int64, device=mask.device)
        if func is _aten.index.Tensor and args[1][0].dtype == torch.bool and len(args[1]) == 1:
            return args[0].flatten(0, args[1][0].ndim - 1).clone()
        raise ModelError(
            f"the plan cannot follow this model: the result of {func} depends on the numbers; measure small runs and fit "
            "them with hpc-hess scaling fit instead"
        )

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        found = _tensors(out)
        if func.is_view or not found:
            return
        dtype = str(found[0].dtype).removeprefix("torch.")
        moved = sum(_nbytes(t) for t in [*_tensors((args, kwargs)), *found])
        self.work.operations[Operation(dtype, count_flops(func, args, kwargs, out), moved)] += 1

    def _hold(self, tensor: torch.Tensor) -> None:
        """Count the memory of a tensor, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        known = self._storages.get(key)
        if known is not None and known[0]() is not None:
            return
        if size and tensor.device.type != "meta":
            self._storages[key] = weakref.ref(storage, lambda _: self._gone(key)), size, self._category
            self._change(self._category, size)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            reference, size, category = self._storages[key]
            self._storages[key] = reference, storage.nbytes(), category
            self._change(category, storage.nbytes() - size)

    def _gone(self, key: int) -> None:
        if key in self._storages:
            _, size, category = self._storages.pop(key)
            self._change(category, -size)

    def _change(self, category: str, count: int) -> None:
        self.held[category] += count
        self._total += count
        for peak in self._peaks:
            if self._total > peak.bytes:
                peak.bytes, peak.parts = self._total, Counter(self.held)


def _tensors(tree: Any) -> list[torch.Tensor]:
    """Return the tensors of nested arguments: torch's own walk over trees takes a tenth of a trace."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return []
    return [tensor for part in tree for tensor in _tensors(part)]


def _nbytes(tensor: torch.Tensor) -> int:
    """Bytes that reading the tensor takes: a broadcast one has fewer than its shape says."""
    count = 1
    for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= extent if stride or extent <= 1 else 1
    return count * tensor.element_size()

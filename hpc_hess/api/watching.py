"""A call while it computes: a bar on a terminal or in a notebook, and an interrupt that keeps what there is."""

from __future__ import annotations

import contextlib
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from hpc_hess.linalg.operator import Enough, LinearOperator, products
from hpc_hess.parallel.vector import Vector

_DELAY_S = 0.5  # calls that end sooner show no bar


class Watch:
    """An operator whose products are counted. After an interrupt the next one raises Enough instead, on every rank.

    So an interrupt finds neither the model nor an algorithm halfway. The second one does not wait for the product's end.
    """

    def __init__(self, operator: LinearOperator, bar: Any) -> None:
        self.space, self.bar = operator.space, bar
        self.num_products, self.stopped = 0, False
        self.asked, self._operator, self._within = False, operator, False

    def matvec(self, v: Vector) -> Vector:
        """Return the product as a new Vector. Collective: yes. Raises Enough."""
        return self.matmat([v])[0]

    def matmat(self, vectors: Sequence[Vector]) -> list[Vector]:
        """Return the products with several Vectors. Collective: yes. Raises Enough."""
        if self.space.world.any_true(self.asked, "interrupted?"):
            self.asked = self.stopped = True
            raise Enough
        try:
            self._within = True
            found = products(self._operator, vectors)
        except KeyboardInterrupt:
            self.asked = self.stopped = True
            raise Enough from None
        finally:
            self._within = False
        self.num_products += len(vectors)
        self.bar.update(len(vectors))
        return found

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal of an interrupt."""
        if self.asked and self._within:
            raise KeyboardInterrupt
        self.asked = True
        self.bar.set_postfix_str("stopping after this product; interrupt again to stop at once")


@contextlib.contextmanager
def watched(operator: LinearOperator, what: str, total: int, progress: bool) -> Iterator[Watch]:
    """Show a bar of ``total`` products and take interrupts. Warns where the result is that of fewer. Collective: yes.

    Raises
    ------
    KeyboardInterrupt : there was an interrupt before anything that can be used was computed.

    """
    from tqdm.auto import tqdm

    shown = progress and operator.space.world.rank == 0 and (_notebook() or sys.stderr.isatty())
    with tqdm(total=total, desc=what, unit="product", disable=not shown, delay=_DELAY_S, leave=False) as bar:
        watch = Watch(operator, bar)
        try:
            with _interrupts(watch):
                yield watch
        except Enough:
            raise KeyboardInterrupt(f"{what}: interrupted before there was a result") from None
    if watch.asked:
        found = "the result is that of these" if watch.stopped else "which were all it needed"
        text = f"{what} was interrupted after {watch.num_products} of at most {total} products: {found}"
        warnings.warn(text, RuntimeWarning, stacklevel=5)  # of the caller: two contexts, and what @collective puts around


@contextlib.contextmanager
def _interrupts(watch: Watch) -> Iterator[None]:
    """Hand interrupts to ``watch``: where Python's own handler would raise them, in the main thread."""
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with contextlib.suppress(ValueError):  # not the main thread, which no signal reaches
        if own:
            signal.signal(signal.SIGINT, watch.interrupt)
    try:
        yield
    finally:
        if own and signal.getsignal(signal.SIGINT) == watch.interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _notebook() -> bool:
    """Whether this is a notebook's kernel, whose output is no terminal but shows bars (as tqdm.auto finds out)."""
    return "ipykernel.zmqshell" in sys.modules

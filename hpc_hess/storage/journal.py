"""What one rank knows of the committed state, and the rules of the next commit. No files, no communication.

A commit may not touch anything that the newest record covers: until the next record is durable, that one must hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_hess.storage.commit import Committed, Ledger, encode, newest
from hpc_hess.storage.drivers import Driver
from hpc_hess.storage.schema import Schema


@dataclass(frozen=True)
class Plan:
    """One commit, ready to be written: coefficients [first, state.step), checksums of ``rows``, extra, ``record``."""

    state: Committed
    first: int
    rows: tuple[int, ...]
    record: bytes


class Journal:
    """The ledger as it is on disk, the checksums of rows written since the last commit, the newest state."""

    def __init__(self, schema: Schema, ledger: Ledger, where: Any) -> None:
        self.schema, self.ledger = schema, ledger
        self.state = newest(schema.slots, ledger, where)
        self._pending: dict[tuple[int, int], int] = {}

    def recurrence(self, probe: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return copies of (alpha, beta), ``steps`` long, NaN beyond the committed steps."""
        alpha, beta = self.ledger.alpha[probe].copy(), self.ledger.beta[probe].copy()
        alpha[self.state.lengths[probe] :] = np.nan
        beta[self.state.lengths[probe] :] = np.nan
        return alpha, beta

    # -- rows ----------------------------------------------------------------------------------------------------

    def check_row(self, probe: int, row: int) -> None:
        """Raise ValueError unless the store has such a row."""
        if not (0 <= probe < self.schema.probes and 0 <= row < self.schema.rows):
            raise ValueError(f"no row {row} of probe {probe}: {self.schema.probes} probes x {self.schema.rows} rows")

    def begin_row(self, probe: int, row: int) -> bool:
        """Note that a row is about to be overwritten; return whether a finished probe must let go of it first.

        Raises ValueError if the newest commit needs it.
        """
        self.check_row(probe, row)
        state = self.state
        if self.schema.basis_index(probe) == self.schema.basis_index(state.probe) and row in state.rows:
            if not (state.finished and probe > state.probe):
                raise ValueError(f"row {row} is needed by the last commit (probe {state.probe}, step {state.step})")
            return True
        self._pending.pop((probe, row), None)
        return False

    def end_row(self, probe: int, row: int, checksum: int) -> None:
        """Note the checksum of a row that is on disk now."""
        self._pending[probe, row] = checksum

    def checksum(self, probe: int, row: int) -> int:
        """Return the checksum that a row's data should have."""
        return self._pending.get((probe, row), int(self.ledger.checksum[probe, row]))

    # -- commits -------------------------------------------------------------------------------------------------

    def plan(
        self, probe: int, step: int, alpha: NDArray[np.float64], beta: NDArray[np.float64], *, finished: bool,
        extra: bytes, rows_needed: Iterable[int] | None,
    ) -> Plan:  # fmt: skip
        """Return the next commit and put its numbers into the ledger. Raises ValueError if it breaks a rule."""
        self._check(probe, step, alpha, beta, extra)
        ledger, old, schema = self.ledger, self.state, self.schema
        rows = self._rows_needed(probe, step, finished, rows_needed)
        first = old.step if probe == old.probe else 0
        ledger.alpha[probe, first:step], ledger.beta[probe, first:step] = alpha[first:step], beta[first:step]
        fresh = tuple(sorted(row for p, row in self._pending if p == probe))
        for row in fresh:
            ledger.checksum[probe, row] = self._pending[probe, row]
        lengths = (*old.lengths[:probe], step, *(0,) * (schema.probes - probe - 1))
        state = Committed(old.sequence + 1, probe, step, finished, extra, rows, lengths)
        return Plan(state, first, fresh, encode(state, schema.slots, ledger))

    def accept(self, plan: Plan) -> None:
        """Make a plan that is durable the newest state."""
        self.state = plan.state
        for row in plan.rows:
            del self._pending[plan.state.probe, row]

    def release(self) -> Plan:
        """Return the commit by which a finished probe gives up its rows."""
        s = self.state
        return self.plan(
            s.probe, s.step, self.ledger.alpha[s.probe], self.ledger.beta[s.probe], finished=True, extra=s.extra,
            rows_needed=(),
        )  # fmt: skip

    def _rows_needed(self, probe: int, step: int, finished: bool, given: Iterable[int] | None) -> tuple[int, ...]:
        known = {row for p, row in self._pending if p == probe}
        known |= set(np.flatnonzero(self.ledger.checksum[probe]).tolist())
        if given is not None:
            rows = sorted(set(given))
        elif finished and not self.schema.keep_basis and probe + 1 < self.schema.probes:
            rows = []  # the next probe reuses the space
        else:
            rows = list(range(min(step + 1, self.schema.rows)))
            if finished:  # an end, early or not, need not have written the vector of the next step
                rows = [row for row in rows if row in known]
        missing = [row for row in rows if row not in known]
        if missing:
            raise ValueError(f"rows {missing[:3]} of probe {probe} are to be committed but were never written")
        return tuple(rows)

    def _check(self, probe: int, step: int, alpha: NDArray, beta: NDArray, extra: bytes) -> None:
        old, schema = self.state, self.schema
        if not old.probe <= probe < schema.probes or not 0 <= step <= min(schema.steps, len(alpha), len(beta)):
            raise ValueError(f"cannot commit probe {probe}, step {step} after probe {old.probe}, step {old.step}")
        if len(extra) > schema.extra_bytes:
            raise ValueError(f"{len(extra)} bytes of extra state, room for {schema.extra_bytes}")
        n = min(step, old.step) if probe == old.probe else 0
        for mine, kept in ((alpha, self.ledger.alpha), (beta, self.ledger.beta)):
            if np.asarray(mine[:n], np.float64).tobytes() != kept[probe, :n].tobytes():
                raise ValueError(f"the first {n} recurrence coefficients are committed and cannot change")


def write_plan(driver: Driver, plan: Plan, ledger: Ledger) -> None:
    """Write the data of a commit, sync, write its record, sync: two syncs on every rank, come what may (MPI).

    Raises whatever went wrong first, after both. The record is never written after a failure here.
    """
    small, error, state = driver.small, None, plan.state
    slot = state.sequence % 2
    for record_now in (False, True):
        try:
            if small is not None and error is None:
                if record_now:
                    small.put_slot("commit", slot, plan.record)
                else:
                    small.put("alpha", state.probe, plan.first, ledger.alpha[state.probe, plan.first : state.step])
                    small.put("beta", state.probe, plan.first, ledger.beta[state.probe, plan.first : state.step])
                    for row in plan.rows:
                        small.put("checksum", state.probe, row, ledger.checksum[state.probe, row : row + 1])
                    small.put_slot("extra", slot, state.extra)
        except Exception as caught:
            error = caught
        try:
            driver.sync_small()
        except Exception as caught:
            error = error or caught
    if error is not None:
        raise error

"""What one rank knows of the committed state, and the rules of the next commit. No files, no communication.

A commit may not touch anything that the newest record covers: until the next record is durable, that one must hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_hess.storage.commit import Committed, Ledger, encode, newest
from hpc_hess.storage.drivers import Driver
from hpc_hess.storage.schema import Schema


@dataclass(frozen=True)
class Member:
    """One probe of a group as a commit leaves it.

    Parameters
    ----------
    alpha, beta : of its completed steps, float64; what was committed before cannot change.
    rows : the basis rows that a resume needs; they must have been written. Default: rows 0 to the number of steps, as
        far as the store has them; none if the group is finished and the next one reuses its space.
    ended : it goes no further: all steps are done, or it broke down.

    """

    alpha: NDArray[np.float64]
    beta: NDArray[np.float64]
    rows: Iterable[int] | None = None
    ended: bool = False


@dataclass(frozen=True)
class Plan:
    """One commit, ready to be written: small data (name, probe, first entry, values), extra, then ``record``."""

    state: Committed
    entries: tuple[tuple[str, int, int, NDArray], ...]
    record: bytes


class Journal:
    """The ledger as it is on disk, the checksums of rows written since the last commit, the newest state."""

    def __init__(self, schema: Schema, ledger: Ledger, where: Path) -> None:
        self.schema, self.ledger = schema, ledger
        self.state = newest(schema.slots, ledger, where)
        self._pending: dict[tuple[int, int], int] = {}

    def recurrence(self, probe: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return copies of (alpha, beta) of the committed steps."""
        steps = self.state.lengths[probe]
        return self.ledger.alpha[probe, :steps].copy(), self.ledger.beta[probe, :steps].copy()

    # -- rows ----------------------------------------------------------------------------------------------------

    def check_row(self, probe: int, row: int) -> None:
        """Raise ValueError unless the store has such a row."""
        if not (0 <= probe < self.schema.probes and 0 <= row < self.schema.rows):
            raise ValueError(f"no row {row} of probe {probe}: {self.schema.probes} probes x {self.schema.rows} rows")

    def begin_row(self, probe: int, row: int) -> bool:
        """Note that a row is about to be overwritten; return whether a finished group must let go of it first.

        Raises ValueError if the newest commit needs it.
        """
        self.check_row(probe, row)
        state, basis = self.state, self.schema.basis_index
        if probe < state.probe:
            raise ValueError(f"probe {probe} is finished: its rows cannot change")
        if any(basis(k) == basis(probe) and row in state.rows_of(k) for k in state.group):
            if not (state.finished and probe not in state.group):
                raise ValueError(f"row {row} is needed by the last commit (probe {state.probe}, step {state.step})")
            return True
        self._pending.pop((probe, row), None)
        return False

    def end_row(self, probe: int, row: int, checksum: int) -> None:
        """Note the checksum of a row that is on disk now."""
        self._pending[probe, row] = checksum

    def checksum(self, probe: int, row: int) -> int:
        """Return the checksum that a row's data should have."""
        return self._pending.get((probe, row), self.ledger.row_checksum(probe, row))

    # -- commits -------------------------------------------------------------------------------------------------

    def plan(self, probe: int, members: Sequence[Member], extra: bytes) -> Plan:
        """Return the next commit and put its numbers into the ledger. Raises ValueError if it breaks a rule."""
        self._check(probe, members, extra)
        ledger, old, schema = self.ledger, self.state, self.schema
        group = range(probe, probe + len(members))
        released = all(m.ended for m in members) and not schema.keep_basis and group.stop < schema.probes
        rows = tuple(self._rows_needed(k, member, released) for k, member in zip(group, members, strict=True))
        entries: list[tuple[str, int, int, NDArray]] = []
        for k, member in zip(group, members, strict=True):
            first, step = old.lengths[k], len(member.alpha)
            for name, mine, kept in (("alpha", member.alpha, ledger.alpha), ("beta", member.beta, ledger.beta)):
                kept[k, first:step] = mine[first:]
                entries.append((name, k, first, kept[k, first:step]))
            for row in sorted(row for p, row in self._pending if p == k):
                ledger.checksum[k, row] = self._pending[k, row]
                entries.append(("checksum", k, row, ledger.checksum[k, row : row + 1]))
        lengths = (*old.lengths[:probe], *(len(m.alpha) for m in members), *(0,) * (schema.probes - group.stop))
        state = Committed(old.sequence + 1, probe, tuple(bool(m.ended) for m in members), rows, extra, lengths)
        return Plan(state, tuple(entries), encode(state, schema.slots, ledger))

    def accept(self, plan: Plan) -> None:
        """Make a plan that is durable the newest state."""
        self.state = plan.state
        for name, probe, row, _ in plan.entries:
            if name == "checksum":
                del self._pending[probe, row]

    def release(self) -> Plan:
        """Return the commit by which a finished group gives up its rows."""
        members = [Member(*self.recurrence(k), rows=(), ended=True) for k in self.state.group]
        return self.plan(self.state.probe, members, self.state.extra)

    def _rows_needed(self, probe: int, member: Member, released: bool) -> tuple[int, ...]:
        known = {row for p, row in self._pending if p == probe}
        known |= {*np.flatnonzero(self.ledger.checksum[probe]).tolist(), *self.state.rows_of(probe)}
        if member.rows is not None:
            rows = sorted(set(member.rows))
        elif released:
            rows = []  # the next group reuses the space
        else:
            rows = list(range(min(len(member.alpha) + 1, self.schema.rows)))
            if member.ended:  # an end, early or not, need not have written the vector of the next step
                rows = [row for row in rows if row in known]
        missing = [row for row in rows if row not in known]
        if missing:
            raise ValueError(f"rows {missing[:3]} of probe {probe} are to be committed but were never written")
        return tuple(rows)

    def _check(self, probe: int, members: Sequence[Member], extra: bytes) -> None:
        old, schema = self.state, self.schema
        group = range(probe, probe + len(members))
        if not (1 <= len(members) <= schema.width and group.stop <= schema.probes):
            raise ValueError(
                f"cannot commit probes {probe} to {group.stop - 1}: room for {schema.probes}, {schema.width} at a time"
            )
        if group != old.group and not (old.finished and probe == old.group.stop):
            raise ValueError(f"cannot commit {group} after {old.group} at step {old.step}, finished: {old.finished}")
        if len(extra) > schema.extra_bytes:
            raise ValueError(f"{len(extra)} bytes of extra state, room for {schema.extra_bytes}")
        if len({len(m.alpha) for m in members if not m.ended}) > 1:
            raise ValueError(f"probes {probe} to {group.stop - 1} are not at the same step")
        for k, member in zip(group, members, strict=True):
            if len(member.alpha) != len(member.beta) or len(member.alpha) > schema.steps:
                raise ValueError(f"cannot commit {len(member.alpha)} steps of probe {k}: room for {schema.steps}")
            n = min(len(member.alpha), old.lengths[k])
            for mine, kept in ((member.alpha, self.ledger.alpha), (member.beta, self.ledger.beta)):
                if np.asarray(mine[:n], np.float64).tobytes() != kept[k, :n].tobytes():
                    raise ValueError(f"the first {n} recurrence coefficients are committed and cannot change")


def write_plan(driver: Driver, plan: Plan) -> None:
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
                    for entry in plan.entries:
                        small.put(*entry)
                    small.put_slot("extra", slot, state.extra)
        except Exception as caught:
            error = caught
        try:
            driver.sync_small()
        except Exception as caught:
            error = error or caught
    if error is not None:
        raise error

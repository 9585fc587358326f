"""The commit record: two slots, written in turn, and the rule that finds the newest one that holds.

A record names the probe and step that are complete and which basis rows are needed to go on. Its checksum covers the
record, the recurrence coefficients up to that step and the checksums of those rows: what it says is in the file, or it
is not believed. All that the newest record covers stays unwritten until the next one is durable.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_hess.errors import StoreError

_MAGIC = b"HHCOMMIT"
_HEAD = struct.Struct("<8sQqq??6xQ32s")  # magic, sequence, probe, step, finished, spare, extra length, data digest
_PAGE = 4096


@dataclass(frozen=True)
class Committed:
    """A committed state. ``sequence`` is 0 before the first commit.

    ``lengths`` holds the number of completed steps of each probe, ``rows`` the basis rows needed to go on.
    """

    sequence: int = 0
    probe: int = 0
    step: int = 0
    finished: bool = False
    extra: bytes = b""
    rows: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Slots:
    """Sizes of the slots: whole pages apart, so that no sector holds parts of both."""

    probes: int
    rows: int
    extra_bytes: int

    @property
    def record_bytes(self) -> int:
        """Bytes of one record: head, lengths, row bitmap, digest."""
        return _HEAD.size + 8 * self.probes + (self.rows + 7) // 8 + 32

    @property
    def commit_stride(self) -> int:
        """Bytes from one commit slot to the other."""
        return -(-self.record_bytes // _PAGE) * _PAGE + _PAGE

    @property
    def extra_stride(self) -> int:
        """Bytes from one extra area to the other."""
        return -(-self.extra_bytes // _PAGE) * _PAGE + _PAGE


@dataclass
class Ledger:
    """The small arrays of a store as they are on disk: alpha, beta (probes, steps), checksum (probes, rows), slots."""

    alpha: NDArray[np.float64]
    beta: NDArray[np.float64]
    checksum: NDArray[np.uint64]
    commit: NDArray[np.uint8]
    extra: NDArray[np.uint8]

    @classmethod
    def empty(cls, slots: Slots, steps: int) -> Ledger:
        """Return the ledger of a store without a commit."""
        return cls(
            alpha=np.full((slots.probes, steps), np.nan), beta=np.full((slots.probes, steps), np.nan),
            checksum=np.zeros((slots.probes, slots.rows), np.uint64),
            commit=np.zeros((2, slots.commit_stride), np.uint8), extra=np.zeros((2, slots.extra_stride), np.uint8),
        )  # fmt: skip

    def digest(self, probe: int, step: int, rows: tuple[int, ...], extra: bytes) -> bytes:
        """Return the checksum over the data that a record covers: earlier probes whole, this one up to ``step``."""
        h = hashlib.blake2b(digest_size=32)
        for part in (self.alpha[:probe], self.beta[:probe], self.checksum[:probe], self.alpha[probe, :step],
                     self.beta[probe, :step], self.checksum[probe, list(rows)]):  # fmt: skip
            h.update(np.ascontiguousarray(part).astype(part.dtype.newbyteorder("<"), copy=False).tobytes())
            h.update(b"|")
        h.update(extra)
        return h.digest()


def encode(state: Committed, slots: Slots, ledger: Ledger) -> bytes:
    """Return the record of ``state``; ``ledger`` must hold what it covers."""
    digest = ledger.digest(state.probe, state.step, state.rows, state.extra)
    needed = np.zeros(slots.rows, bool)
    needed[list(state.rows)] = True
    body = _HEAD.pack(_MAGIC, state.sequence, state.probe, state.step, state.finished, False, len(state.extra), digest)
    lengths = [*state.lengths, *[0] * (slots.probes - len(state.lengths))]
    body += struct.pack(f"<{slots.probes}q", *lengths) + np.packbits(needed, bitorder="little").tobytes()
    return body + hashlib.blake2b(body, digest_size=32).digest()


def decode(record: bytes, extra_area: bytes, slots: Slots, ledger: Ledger) -> Committed | None:
    """Return the state that ``record`` describes, or None if the record or anything it covers does not hold."""
    body, digest = record[: slots.record_bytes - 32], record[slots.record_bytes - 32 : slots.record_bytes]
    if body[:8] != _MAGIC or hashlib.blake2b(body, digest_size=32).digest() != digest:
        return None
    _, sequence, probe, step, finished, _, extra_length, data_digest = _HEAD.unpack_from(body)
    lengths = struct.unpack_from(f"<{slots.probes}q", body, _HEAD.size)
    bitmap = np.frombuffer(body, np.uint8, offset=_HEAD.size + 8 * slots.probes)
    rows = tuple(int(r) for r in np.flatnonzero(np.unpackbits(bitmap, count=slots.rows, bitorder="little")))
    state = Committed(sequence, probe, step, finished, extra_area[:extra_length], rows, lengths)
    return state if ledger.digest(probe, step, rows, state.extra) == data_digest else None


def newest(slots: Slots, ledger: Ledger, where: Any) -> Committed:
    """Return the newest state that holds. A store that was never committed has sequence 0.

    Raises
    ------
    StoreError : records exist and none holds.

    """
    found = [decode(ledger.commit[i].tobytes(), ledger.extra[i].tobytes(), slots, ledger) for i in range(2)]
    valid = [state for state in found if state is not None]
    if valid:
        return max(valid, key=lambda state: state.sequence)
    if ledger.commit[0].any() and ledger.commit[1].any():
        raise StoreError(
            f"{where} is damaged: neither of its two commit records matches the data; restore it from a copy, or start "
            'anew in another run.out or with run.resume = "never"'
        )
    return Committed(lengths=(0,) * slots.probes)  # nothing, or a first record that was torn


def kept_rows(state: Committed, ledger: Ledger, keep_basis: bool, probe: int) -> tuple[int, ...]:
    """Return the basis rows of ``probe`` that are committed and not given up: of a finished one all, if it is kept."""
    if probe < state.probe or (probe == state.probe and state.finished and keep_basis):
        return tuple(int(row) for row in np.flatnonzero(ledger.checksum[probe])) if keep_basis else ()
    return state.rows if probe == state.probe else ()

"""The commit record: two slots, written in turn, and the rule that finds the newest one that holds.

Probes advance in groups, in lock-step; a single probe is a group of one. A record names the group, how far each of its
members is and which basis rows are needed to go on. Its checksum covers the record, the recurrence coefficients up to
there and the checksums of those rows: what it says is in the file, or it is not believed. All that the newest record
covers stays unwritten until the next one is durable.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_hess.errors import StoreError
from hpc_hess.storage.checksum import ZERO
from hpc_hess.storage.disk import remedy

_MAGIC = b"HHCOMMIT"
_HEAD = struct.Struct("<8sQqqQ32s")  # magic, sequence, first probe, width, extra length, data digest
_PAGE = 4096


@dataclass(frozen=True)
class Committed:
    """A committed state. Before the first commit ``sequence`` is 0 and the group is empty: probe 0 is the next.

    ``probe`` is the group's first member; ``ended`` says of each member whether it goes no further, ``rows`` which of
    its basis rows are needed to go on. ``lengths`` holds the number of completed steps of each probe of the store.
    """

    sequence: int = 0
    probe: int = 0
    ended: tuple[bool, ...] = ()
    rows: tuple[tuple[int, ...], ...] = ()
    extra: bytes = b""
    lengths: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Number of probes in the group."""
        return len(self.ended)

    @property
    def group(self) -> range:
        """The probes of the group."""
        return range(self.probe, self.probe + self.width)

    @property
    def step(self) -> int:
        """Completed steps of the members that go furthest: those that have not ended are all here."""
        return max((self.lengths[k] for k in self.group), default=0)

    @property
    def finished(self) -> bool:
        """Whether every member has ended, so that a next group may begin."""
        return all(self.ended)

    def complete(self, probes: int) -> bool:
        """Return whether the first ``probes`` probes have been computed, all to their ends."""
        return self.finished and self.group.stop >= probes

    def over(self, probe: int) -> bool:
        """Return whether ``probe`` has been computed to its end."""
        return probe < self.probe or (probe in self.group and self.ended[probe - self.probe])

    def rows_of(self, probe: int) -> tuple[int, ...]:
        """Return the rows of ``probe`` that are needed to go on: none unless it is in the group."""
        return self.rows[probe - self.probe] if probe in self.group else ()


@dataclass(frozen=True)
class Slots:
    """Sizes of the slots: whole pages apart, so that no sector holds parts of both. ``width``: of the widest group."""

    probes: int
    width: int
    rows: int
    extra_bytes: int

    @property
    def record_bytes(self) -> int:
        """Bytes of one record: head, lengths, bitmaps of the ended members and of the rows, digest."""
        return _HEAD.size + 8 * self.probes + _bitmap_bytes(self.width) + _bitmap_bytes(self.width * self.rows) + 32

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
            alpha=np.full((slots.probes, steps), np.nan),
            beta=np.full((slots.probes, steps), np.nan),
            checksum=np.zeros((slots.probes, slots.rows), np.uint64),
            commit=np.zeros((2, slots.commit_stride), np.uint8),
            extra=np.zeros((2, slots.extra_stride), np.uint8),
        )

    def row_checksum(self, probe: int, row: int) -> int:
        """Return the checksum that a row's data should have. Earlier versions kept the 0 of a row of zeros as it is."""
        return int(self.checksum[probe, row]) or ZERO

    def digest(self, state: Committed) -> bytes:
        """Return the checksum over the data that ``state`` covers: earlier probes whole, its own as far as they are."""
        h = hashlib.blake2b(digest_size=32)
        parts = [self.alpha[: state.probe], self.beta[: state.probe], self.checksum[: state.probe]]
        for k, rows in zip(state.group, state.rows, strict=True):
            n = state.lengths[k]
            parts += [self.alpha[k, :n], self.beta[k, :n], self.checksum[k, list(rows)]]
        for part in parts:
            h.update(np.ascontiguousarray(part).astype(part.dtype.newbyteorder("<"), copy=False).tobytes())
            h.update(b"|")
        h.update(state.extra)
        return h.digest()


def encode(state: Committed, slots: Slots, ledger: Ledger) -> bytes:
    """Return the record of ``state``; ``ledger`` must hold what it covers."""
    ended, needed = np.zeros(slots.width, bool), np.zeros((slots.width, slots.rows), bool)
    ended[: state.width] = state.ended
    for i, rows in enumerate(state.rows):
        needed[i, list(rows)] = True
    digest = ledger.digest(state)
    body = _HEAD.pack(_MAGIC, state.sequence, state.probe, state.width, len(state.extra), digest)
    lengths = [*state.lengths, *[0] * (slots.probes - len(state.lengths))]
    body += struct.pack(f"<{slots.probes}q", *lengths) + _to_bitmap(ended) + _to_bitmap(needed)
    return body + hashlib.blake2b(body, digest_size=32).digest()


def decode(record: bytes, extra_area: bytes, slots: Slots, ledger: Ledger) -> Committed | None:
    """Return the state that ``record`` describes, or None if the record or anything it covers does not hold."""
    body, digest = record[: slots.record_bytes - 32], record[slots.record_bytes - 32 : slots.record_bytes]
    if body[:8] != _MAGIC or hashlib.blake2b(body, digest_size=32).digest() != digest:
        return None
    _, sequence, probe, width, extra_length, data_digest = _HEAD.unpack_from(body)
    lengths = struct.unpack_from(f"<{slots.probes}q", body, _HEAD.size)
    at = _HEAD.size + 8 * slots.probes
    ended = _from_bitmap(body[at:], slots.width)[:width]
    needed = _from_bitmap(body[at + _bitmap_bytes(slots.width) :], slots.width * slots.rows)
    rows = tuple(tuple(np.flatnonzero(bits).tolist()) for bits in needed.reshape(slots.width, slots.rows)[:width])
    state = Committed(sequence, probe, tuple(ended.tolist()), rows, extra_area[:extra_length], lengths)
    return state if ledger.digest(state) == data_digest else None


def newest(slots: Slots, ledger: Ledger, where: Path | str) -> Committed:
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
        raise StoreError(f"{where} is damaged: neither of its two commit records matches the data: {remedy(Path(where))}")
    return Committed(lengths=(0,) * slots.probes)  # nothing, or a first record that was torn


def kept_rows(state: Committed, ledger: Ledger, keep_basis: bool, probe: int) -> tuple[int, ...]:
    """Return the basis rows of ``probe`` that are committed and not given up: of earlier groups all, if they are kept."""
    if keep_basis and probe < state.probe:
        return tuple(int(row) for row in np.flatnonzero(ledger.checksum[probe]))
    return state.rows_of(probe)


def _bitmap_bytes(bits: int) -> int:
    return (bits + 7) // 8


def _to_bitmap(bits: NDArray[np.bool_]) -> bytes:
    return np.packbits(bits.reshape(-1), bitorder="little").tobytes()


def _from_bitmap(data: bytes, bits: int) -> NDArray[np.bool_]:
    if not bits:
        return np.zeros(0, bool)
    array = np.frombuffer(data, np.uint8, count=_bitmap_bytes(bits))
    return np.unpackbits(array, count=bits, bitorder="little").astype(bool)

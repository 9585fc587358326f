"""The parts of the store that need no processes: checksum, blocks, commit records, rules of a commit."""

import numpy as np
import pytest

from hpc_hess.errors import StoreError
from hpc_hess.parallel.layout import Layout
from hpc_hess.storage.blocks import Block, bounded, clipped, overlaps, regular_blocks
from hpc_hess.storage.checksum import combine, multiplier, partial_checksum
from hpc_hess.storage.commit import Committed, Ledger, Slots, decode, encode, newest

MASK = (1 << 64) - 1


def one(*numbers):
    return np.array(numbers, np.int64)


# -- checksum ----------------------------------------------------------------------------------------------------


def plain_multiplier(w):
    """The definition, in Python integers."""

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
        return z ^ (z >> 31)

    inner = mix((w % 32768 * 0x9E3779B97F4A7C15 + 0x243F6A8885A308D3) & MASK) | 1
    outer = mix((w // 32768 * 0x9E3779B97F4A7C15 + 0x13198A2E03707344) & MASK) | 1
    return inner * outer & MASK


@pytest.mark.parametrize("w", [0, 1, 32767, 32768, 2**32 - 1, 2**32, 70 * 10**9])
def test_multiplier_is_the_definition_and_odd(w):
    assert multiplier(w) == plain_multiplier(w)
    assert multiplier(w) % 2 == 1


def test_checksum_vectors():
    """Stores depend on these numbers: they may never change within a format version."""
    x32 = np.array([1.0, -2.5, 0.0, 3e-40, np.inf], np.float32)
    x64 = np.array([1.0, -2.5, 1e-310], np.float64)
    expected32 = sum(int(b) * plain_multiplier(i) for i, b in enumerate(x32.view(np.uint32))) & MASK
    expected64 = sum(int(b) * plain_multiplier(2 * 7 + i) for i, b in enumerate(x64.view(np.uint32))) & MASK
    assert partial_checksum(x32, one(0), one(5)) == expected32 == 0x3043F7083B6528BD
    assert partial_checksum(x64, one(7), one(3)) == expected64 == 0x6DB82F890E29E127


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("cuts", [[], [1], [3, 40000, 40001, 99990], list(range(7, 100000, 113))])
def test_checksum_does_not_depend_on_the_cut(dtype, cuts):
    x = np.random.default_rng(0).standard_normal(100_000).astype(dtype)
    start = 2**33 + 12345
    whole = partial_checksum(x, one(start), one(len(x)))
    edges = [0, *cuts, len(x)]
    starts, lengths = np.array(edges[:-1]), np.diff(edges)
    owner = np.arange(len(starts)) % 3  # three ranks, every third interval each
    parts = []
    for rank in range(3):
        mine = owner == rank
        pieces = [x[s : s + n] for s, n in zip(starts[mine], lengths[mine], strict=True)]
        values = np.concatenate(pieces or [x[:0]])
        parts.append(partial_checksum(values, starts[mine] + start, lengths[mine]))
    assert combine(parts) == whole


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_checksum_sees_every_kind_of_damage(dtype):
    x = np.random.default_rng(1).standard_normal(70_000).astype(dtype)

    def total(y):
        return partial_checksum(y, one(5), one(len(y)))

    good = total(x)
    for bit in range(x.itemsize * 8):
        y = x.copy()
        y.view(f"u{x.itemsize}")[31_000] ^= np.array(1, f"u{x.itemsize}") << np.array(bit, f"u{x.itemsize}")
        assert total(y) != good, f"bit {bit}"
    changes = [
        lambda y: -y,
        lambda y: np.roll(y, 1),
        lambda y: np.r_[y[32768:65536], y[:32768], y[65536:]],
        lambda y: np.r_[y[:4096], 0 * y[4096:5120], y[5120:]],
        lambda y: np.r_[y[1], y[0], y[2:]],
    ]
    for change in changes:
        assert total(change(x).astype(dtype)) != good


def test_checksum_refuses_values_that_do_not_fill_the_intervals():
    with pytest.raises(ValueError, match="do not fill"):
        partial_checksum(np.zeros(4, np.float32), one(0), one(5))


# -- blocks ------------------------------------------------------------------------------------------------------


def entries(blocks):
    """Pairs (local, file) of every entry."""
    out = []
    for b in blocks:
        for k in range(b.count):
            out += [(b.local + k * b.length + j, b.start + k * b.stride + j) for j in range(b.length)]
    return out


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
@pytest.mark.parametrize("most", [4, 24, 1000])
def test_blocks_cover_each_entry_once_in_local_order(shards, most):
    layout = Layout({"a": (7, 3), "b": (90, 4, 5), "c": (), "d": (2, 9, 3), "e": (200,)}, shards, {"b": 1, "d": 1})
    seen = []
    for i in range(shards):
        shard = layout.shard(i)
        blocks = bounded(regular_blocks(*shard.file_intervals), 4, most)
        pairs = entries(blocks)
        assert [local for local, _ in pairs] == list(range(shard.size))
        starts, lengths = shard.file_intervals
        assert [f for _, f in pairs] == [s + j for s, n in zip(starts, lengths, strict=True) for j in range(n)]
        assert all(b.size * 4 <= max(most, 4) for b in blocks)
        seen += [f for _, f in pairs]
    assert sorted(seen) == list(range(layout.num_params))


def test_an_inner_sharded_dimension_is_one_block():
    shard = Layout({"experts": (500, 8, 16)}, 4, {"experts": 1}).shard(2)
    assert regular_blocks(*shard.file_intervals) == [Block(0, 64, 128, 500, 32)]


def test_overlaps_are_the_shared_entries():
    rng = np.random.default_rng(2)
    for _ in range(30):
        owner_a, owner_b = rng.integers(0, 2, 60).astype(bool), rng.integers(0, 2, 60).astype(bool)

        def intervals(mask):
            edges = np.flatnonzero(np.diff(np.r_[False, mask, False].astype(int)))
            return edges[::2], edges[1::2] - edges[::2]

        found = []
        for here, there, length in overlaps(intervals(owner_a), intervals(owner_b)):
            found += [(here + j, there + j) for j in range(length)]
        place_a, place_b = np.cumsum(owner_a) - 1, np.cumsum(owner_b) - 1
        assert found == [(place_a[i], place_b[i]) for i in np.flatnonzero(owner_a & owner_b)]


@pytest.mark.parametrize("span", [(0, 1), (0, 37), (5, 6), (3, 31), (12, 25), (36, 37), (7, 7)])
def test_clipped_blocks_hold_just_those_entries(span):
    blocks = [Block(0, 100, 10, 3, 4), Block(12, 7, 25, 1, 25)]
    places = np.concatenate([np.arange(s, s + 4) for s in (100, 110, 120)] + [np.arange(7, 32)])
    found = {}
    for b in clipped(blocks, *span):
        for k in range(b.count):
            for i in range(b.length):
                found[b.local + k * b.length + i] = b.start + k * b.stride + i
    assert [found[i] for i in range(span[1] - span[0])] == places[slice(*span)].tolist()
    assert len(found) == span[1] - span[0]


# -- commit records ----------------------------------------------------------------------------------------------

SLOTS = Slots(probes=3, width=2, rows=11, extra_bytes=100)


def ledger_with(*states):
    ledger = Ledger.empty(SLOTS, 10)
    ledger.alpha[:], ledger.beta[:] = np.arange(30).reshape(3, 10), -np.arange(30.0).reshape(3, 10)
    ledger.checksum[:] = np.arange(33, dtype=np.uint64).reshape(3, 11) + np.uint64(2**63)
    for state in states:
        record = np.frombuffer(encode(state, SLOTS, ledger), np.uint8)
        ledger.commit[state.sequence % 2, : len(record)] = record
        ledger.extra[state.sequence % 2, : len(state.extra)] = np.frombuffer(state.extra, np.uint8)
    return ledger


def flip(array, place):
    bits = array.view(f"u{array.itemsize}")
    bits[place] ^= bits.dtype.type(1)


# the group of probes 1 and 2; the latter has ended
OLD = Committed(6, 1, (False, True), ((0, 2, 3), (1,)), b"old state", (10, 3, 2))
NEW = Committed(7, 1, (False, True), ((1, 3, 4, 10), (0, 1)), b"new", (10, 4, 2))


def test_a_record_comes_back():
    ledger = ledger_with(OLD, NEW)
    assert newest(SLOTS, ledger, "x") == NEW
    assert decode(ledger.commit[0].tobytes(), ledger.extra[0].tobytes(), SLOTS, ledger) == OLD


def test_a_state_says_how_far_its_group_is():
    assert (NEW.width, NEW.group, NEW.step, NEW.finished) == (2, range(1, 3), 4, False)
    assert [NEW.over(k) for k in range(3)] == [True, False, True]
    assert [NEW.rows_of(k) for k in range(3)] == [(), (1, 3, 4, 10), (0, 1)]
    assert not NEW.complete(3)
    nothing = newest(SLOTS, ledger_with(), "x")  # an empty group, after which probe 0 is the next
    assert (nothing.group.stop, nothing.step, nothing.finished, nothing.complete(3)) == (0, 0, True, False)


def test_slots_share_no_page():
    assert SLOTS.commit_stride % 4096 == 0
    assert SLOTS.commit_stride - SLOTS.record_bytes >= 4096 - 1
    big = Slots(probes=3, width=2, rows=100_000, extra_bytes=9000)
    assert big.commit_stride - big.record_bytes >= 4096 - 1
    assert big.extra_stride - 9000 >= 4096 - 1


def test_every_torn_record_gives_the_one_before():
    whole = ledger_with(OLD, NEW)
    for cut in range(SLOTS.record_bytes):
        ledger = ledger_with(OLD, Committed(5, 1, (False,) * 2, ((0, 1, 2), ()), b"oldest", (10, 2, 2)))
        ledger.extra[1] = whole.extra[1]
        ledger.commit[1, :cut] = whole.commit[1, :cut]  # the rest is still the record of two commits ago
        assert newest(SLOTS, ledger, "x") == OLD, cut


@pytest.mark.parametrize("name", ["alpha", "beta", "checksum", "extra", "commit"])
def test_a_flipped_bit_of_what_the_newest_covers_falls_back(name):
    ledger = ledger_with(OLD, NEW)
    place = {"alpha": (1, 3), "beta": (1, 3), "checksum": (1, 10), "extra": (1, 2), "commit": (1, 60)}[name]
    flip(getattr(ledger, name), place)
    assert newest(SLOTS, ledger, "x") == OLD


@pytest.mark.parametrize(
    ("name", "place"), [("alpha", (0, 9)), ("beta", (1, 0)), ("checksum", (1, 3)), ("alpha", (2, 1)), ("checksum", (2, 1))]
)
def test_a_flipped_bit_of_what_both_cover_is_an_error(name, place):
    ledger = ledger_with(OLD, NEW)
    flip(getattr(ledger, name), place)
    with pytest.raises(StoreError, match=r"neither of its two commit records.*restore"):
        newest(SLOTS, ledger, "krylov.h5")


def test_what_no_record_covers_may_change():
    ledger = ledger_with(OLD, NEW)
    ledger.alpha[1, 4:], ledger.beta[2, 2:] = 99, 99
    ledger.checksum[1, [5, 6, 7, 8, 9]] = 1
    assert newest(SLOTS, ledger, "x") == NEW


def test_an_empty_store_and_a_torn_first_record_have_no_commit():
    ledger = ledger_with()
    assert newest(SLOTS, ledger, "x").sequence == 0
    ledger.commit[1, :50] = 7
    assert newest(SLOTS, ledger, "x").sequence == 0

"""What of a store's disk space nothing needs, and giving it back: one process, under the lock, no job at work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hpc_hess.parallel.layout import Layout
from hpc_hess.parallel.world import World
from hpc_hess.storage.commit import Committed, kept_rows, newest
from hpc_hess.storage.disk import allocated, give_back
from hpc_hess.storage.opening import rebuild
from hpc_hess.storage.schema import FILE, RANKS, TEMPORARY, Header, open_file, open_rank_file, read_header

Parts = dict[Path, list[tuple[int, int]]]  # file -> (first byte, length)


class Space:
    """The disk space of the store in ``folder``; reads its header and ledger.

    Attributes
    ----------
    state : the committed state.
    needed : bytes of the rows that the state needs, or keeps.

    Raises
    ------
    StoreError : it is damaged, or of a newer format.

    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._header: Header = read_header(folder / FILE)
        self.schema = schema = self._header.schema
        self.state: Committed = newest(schema.slots, self._header.ledger, folder / FILE)
        self._rows = {
            (schema.basis_index(k), row)
            for k in range(schema.probes)
            for row in kept_rows(self.state, self._header.ledger, schema.keep_basis, k)
        }
        self.needed = len(self._rows) * schema.num_params * schema.numpy_dtype.itemsize

    def leftovers(self) -> list[Path]:
        """Return what interrupted jobs have left beside the store."""
        ranks = self.folder / RANKS
        old = [path for path in (ranks.iterdir() if ranks.is_dir() else ()) if path.name != self.schema.generation]
        return [path for path in (self.folder / TEMPORARY, *old) if path.exists()]

    def files(self) -> list[Path]:
        """Return the files that hold rows."""
        schema = self.schema
        if schema.driver == "mpio":
            return [self.folder / FILE]
        return [schema.rank_file(self.folder, rank) for rank in range(schema.num_shards)]

    def basis_bytes(self) -> int:
        """Return the bytes on disk that go with the whole basis."""
        return min(self.schema.basis_bytes, sum(allocated(file) for file in self.files()))

    def spare_bytes(self) -> int:
        """Return about how many bytes on disk belong to rows that are not needed."""
        total = 0
        for file, parts in self._spare().items():
            length = sum(size for _, size in parts)
            total += max(0, min(length, allocated(file) - (file.stat().st_size - length)))
        return total

    def free_spare(self) -> None:
        """Free rows that are not needed, where the file system can. A run that goes on allocates them again."""
        for file, parts in self._spare().items():
            give_back(file, parts)

    def free_basis(self) -> None:
        """Put a store without a basis in the place of this one, whose group must have finished. Raises StoreError."""
        table, world = self._header.table, World.alone()
        shapes = self._header.stored_layout()
        layout = Layout({p.name: p.shape for p in shapes.parameters}, 1, {p.name: p.shard_dim for p in shapes.parameters})
        offsets = table["global_offset"].tolist()
        layout.parameters = [replace(p, global_offset=g) for p, g in zip(layout.parameters, offsets, strict=True)]
        rebuild(
            self.folder,
            self._header,
            self.schema.driver,
            {"rows": 0, "keep_basis": False},
            layout=layout,
            shard=layout.shard(0),
            world=world,
            comm=None,
        )

    def _spare(self) -> Parts:
        """Return where the rows lie that are not needed."""
        schema, found = self.schema, {}
        layout = self._header.stored_layout()
        for rank, path in enumerate(self.files()):
            if schema.driver == "mpio":
                file, names = open_file(path, "r"), [f"probes/{k}/basis" for k in range(schema.bases)]
            else:
                file = open_rank_file(self.folder, schema, rank, layout.shard(rank).size, "r")
                names = [f"basis/{k}" for k in range(schema.bases)]
            with file:
                parts = []
                for basis, name in enumerate(names if schema.rows else ()):
                    if name in file:  # a rank may own nothing
                        start, length = file[name].id.get_offset(), file[name].shape[1] * file[name].dtype.itemsize
                        parts += [
                            (start + row * length, length) for row in range(schema.rows) if (basis, row) not in self._rows
                        ]
                found[path] = parts
        return found

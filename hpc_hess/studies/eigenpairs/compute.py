"""The search for extreme eigenpairs as a part of a run: steps, commits, a resume, and what was found.

Its store lies in RUN/eigenpairs. A restart replaces most vectors at once, and the last commit must hold until the next one
does: so there are rows for both, and vectors lie in any of them. At the end the eigenvectors are written, by file index.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hpc_hess.config import Config
from hpc_hess.console.words import number
from hpc_hess.errors import StoreError
from hpc_hess.linalg import probes
from hpc_hess.linalg.eigen import Pairs, ThickRestart
from hpc_hess.parallel.basis import Basis
from hpc_hess.parallel.vector import Vector, VectorSpace
from hpc_hess.session.memory_budget import room_for_rows
from hpc_hess.session.operators import CurvatureOperator
from hpc_hess.session.partial_products import ProductWatch
from hpc_hess.session.session import Session
from hpc_hess.session.stopping import InterruptedProductError
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.commit import Committed, newest
from hpc_hess.storage.identity import must_match
from hpc_hess.storage.journal import Member
from hpc_hess.storage.schema import FILE, read_header
from hpc_hess.storage.store import Store, store_exists
from hpc_hess.studies.eigenpairs.settings import Settings
from hpc_hess.studies.localisation import localise

FOLDER = "eigenpairs"  # in the run directory
_SHOWN = 8  # parameters named for each eigenvector
_NOTHING = np.empty(0)


class EigenLoop:
    """Steps of a thick-restart search, each committed; goes on from what the store holds.

    Parameters
    ----------
    operator : at theta_0.
    store : from :func:`open_eigen_store`.
    watch : follows the operator's products.
    gradient : returns the gradient g at theta_0; where given, each pair (lambda, u) says the share <u, g>^2 / |g|^2 of it.

    """

    def __init__(
        self,
        session: Session,
        operator: CurvatureOperator,
        store: Store,
        device: torch.device,
        watch: ProductWatch,
        gradient: Callable[[], Vector] | None = None,
    ) -> None:
        self._config, self._world, self._operator, self._store = session.config, session.world, operator, store
        self._events, self._progress, self._stopper = session.events, session.progress, session.stopper
        self._watch = watch
        self._gradient = gradient
        self._settings = settings = Settings.of(session.config)
        size = settings.vectors
        self._basis = Basis(operator.space, size + 1, device)
        self._search = ThickRestart(operator, self._basis, size, settings.count, settings.which, settings.tolerance)
        self._rows: list[int] = []  # of the store, for each vector of the basis
        self._slowest_s = 0.0
        self._uncommitted: tuple[Member, bytes] | None = None

    def run(self) -> str:
        """Return why the search stopped early, or "" when it has ended. Collective: yes.

        Raises
        ------
        NumericsError, StoreError : with the remedy; the store keeps every committed step.

        """
        self._progress.phase("eigenpairs")
        self._resume() if self._store.state.extra else self._start()
        try:
            reason = self._advance()
            if not reason:
                self._finish()
        except InterruptedProductError as interrupted:
            reason = str(interrupted)
            self._settle()
        return reason

    # -- begin and go on -----------------------------------------------------------------------------------------

    def _start(self) -> None:
        lanczos = self._config.lanczos
        self._search.start(probes.draw(self._operator.space, seed=lanczos.seed, probe=0, distribution=lanczos.distribution))
        self._write([0])
        self._note_state()

    def _resume(self) -> None:
        state = json.loads(self._store.state.extra)
        self._search.from_state(state["search"])
        self._operator.from_state(state["operator"])
        self._rows = state["rows"]
        for vector, row in enumerate(self._rows):
            self._basis.load(vector, self._store.read_row(0, row))
        self._progress.note(f"going on with the search for eigenpairs after {self._search.num_products} products")
        if "found" in state:  # the pairs that it had ended with give way to its next vectors
            self._note_state()
            self._settle()

    # -- a step --------------------------------------------------------------------------------------------------

    def _advance(self) -> str:
        """Step until the search has ended; return why it stopped before, or "". Collective: yes."""
        search, reason = self._search, ""
        while not search.finished and search.num_products < self._settings.most_products:
            least_s = self._watch.least_s
            reason = self._stopper.agreed(self._slowest_s if least_s is None else least_s)
            if reason:
                break
            self._step()
        self._settle()
        return reason

    def _step(self) -> None:
        search, began = self._search, time.perf_counter()
        if search.full:
            self._settle()
            search.restart()
            self._rows = []
            self._write(list(range(search.filled + 1)))
            self._note_state()
        key = [self._store.schema.run_id, "eigenpairs", search.num_products]
        self._watch.begin_product(key, self._operator, self._slowest_s, self._settle)
        product = self._operator.matvec(self._basis[search.filled])
        self._watch.end_product()
        hvp_s = time.perf_counter() - began
        self._settle()
        search.advance(product)
        if search.has_next:
            self._write([search.filled])
        self._note_state()
        self._slowest_s = max(self._slowest_s, self._world.max_over_ranks(time.perf_counter() - began, "step time"))
        try:
            self._report(hvp_s)
        except StoreError:  # no room for an event, on every rank; the step itself has its place
            self._settle()
            raise

    def _report(self, hvp_s: float) -> None:
        search, pairs = self._search, self._search.pairs()
        converged = int((pairs.residuals <= search.tolerance * pairs.scale).sum())
        self._events.write(
            {
                "event": "eigenpairs",
                "product": search.num_products,
                "restarts": search.num_restarts,
                "converged": converged,
                "hvp_s": hvp_s,
                "values": pairs.values.tolist(),
                "residuals": pairs.residuals.tolist(),
            }
        )
        self._progress.status(
            f"eigenpairs: product {search.num_products} of at most {self._settings.most_products}, "
            f"{converged} of {search.num_wanted} converged | λ in [{number(pairs.values[0])}, {number(pairs.values[-1])}]"
        )

    # -- the store -----------------------------------------------------------------------------------------------

    def _write(self, vectors: list[int]) -> None:
        """Start to write ``vectors``, the newest, into rows that neither the last commit nor this basis needs."""
        taken = {*self._rows, *self._store.state.rows_of(0)}
        free = [row for row in range(self._store.schema.rows) if row not in taken]
        for vector, row in zip(vectors, free, strict=False):
            self._store.start_row(0, row, self._basis.stored(vector))
            self._rows.append(row)

    def _note_state(self) -> None:
        """Note what is to be committed once its rows are on disk."""
        self._uncommitted = Member(_NOTHING, _NOTHING, rows=list(self._rows)), json.dumps(self._state()).encode()

    def _state(self) -> dict[str, Any]:
        return {"search": self._search.to_state(), "operator": self._operator.to_state(), "rows": self._rows}

    def _settle(self) -> None:
        """Commit the last step. Collective: yes."""
        if self._uncommitted is not None:
            member, extra = self._uncommitted
            self._store.commit(0, [member], extra)
            self._uncommitted = None

    # -- the end -------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Write the eigenvectors and what is known of them, as the search's last commit. Collective: yes.

        The basis stays where more products would go on from it: the limit of products has ended the search.
        """
        gradient = self._gradient() if self._gradient else None
        square = gradient.dot(gradient) if gradient is not None else 0.0
        self._progress.phase("writing the eigenvectors")
        pairs, free = self._search.pairs(), set(range(self._store.schema.rows)) - set(self._rows)
        rows = sorted(free)[: len(pairs.values)]
        described = []
        for k, row in enumerate(rows):
            vector = pairs.vector(k)
            self._store.write_row(0, row, vector.data.cpu().numpy())
            where = localise(vector)
            described.append(
                {
                    "value": float(pairs.values[k]),
                    "residual": float(pairs.residuals[k]),
                    "row": row,
                    "converged": bool(pairs.residuals[k] <= self._search.tolerance * pairs.scale),
                    "gradient_share": vector.dot(gradient) ** 2 / square if gradient is not None and square else None,
                    "participation": where.participation,
                    "parameters": where.largest(_SHOWN),
                    "groups": where.by_group(),
                }
            )
        state = {"found": self._summary(pairs) | {"pairs": described}, "finished": self._search.finished}
        if not state["finished"] or self._config.store.keep_basis:
            state |= self._state()
            rows = [*rows, *self._rows]
        self._store.commit(0, [Member(_NOTHING, _NOTHING, rows=rows, ended=True)], json.dumps(state).encode())

    def _summary(self, pairs: Pairs) -> dict[str, Any]:
        search = self._search
        return {
            "which": search.which,
            "tolerance": search.tolerance,
            "products": search.num_products,
            "restarts": search.num_restarts,
            "vectors": search.size,
            "asymmetry": search.asymmetry / (pairs.scale or 1.0),
            "multiplicity_resolved": search.complete,
            "orthogonality": self._orthogonality(pairs),
            "store": f"{FOLDER}/{FILE}",
        }

    def _orthogonality(self, pairs: Pairs) -> float:
        """Return the largest |<u_i, u_j> - (i = j)|: a ghost, a second copy of a pair, would make it 1."""
        gram = torch.zeros(len(pairs.values), len(pairs.values), dtype=torch.float64)
        for k in range(len(pairs.values)):
            gram[k] = torch.from_numpy(pairs.coefficients) @ self._basis.dots(pairs.vector(k), self._search.filled)
        return float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max())


def check_search(session: Session, attributes: dict[str, Any]) -> None:
    """Refuse to go on with another search than the run directory holds, or to show it as another. Collective: yes.

    Raises
    ------
    StoreError : it holds another search, or one that has gone further than is asked for.

    """
    config, folder, settings = session.config, session.out / FOLDER, Settings.of(session.config)
    remedy = "remove that directory to search anew, or choose another run.out"
    with attempt(session.world, folder / FILE, "look for a search for eigenpairs"):
        if session.world.rank == 0 and settings.wanted and (folder / FILE).exists():
            header = read_header(folder / FILE)
            must_match(header.attributes, _bound_to(config, attributes), f"{folder} holds a search", remedy)
            state = _state_of(newest(header.schema.slots, header.ledger, folder / FILE))
            products = _products(state)
            if products > settings.most_products:
                raise StoreError(
                    f"{folder} holds a search of {products} products, more than studies.eigenpairs.most_products = "
                    f"{settings.most_products}: raise that, or {remedy}"
                )
            if _finished(state) and settings.tolerance > (done := state["found"]["tolerance"]):
                raise StoreError(
                    f"{folder} holds a search with studies.eigenpairs.tolerance = {done}, finer than "
                    f"{settings.tolerance}: go back to that, or {remedy}"
                )


def _bound_to(config: Config, attributes: dict[str, Any]) -> dict[str, Any]:
    return attributes | {"analysis": json.dumps(Settings.of(config).defining(config))}


def _state_of(committed: Committed) -> dict[str, Any]:
    """Return what a search has kept: "search" to go on from, "found" at its end, both, or nothing yet."""
    return dict(json.loads(committed.extra)) if committed.extra else {}


def _products(state: dict[str, Any]) -> int:
    return int(state["search"]["num_products"] if "search" in state else state["found"]["products"] if state else 0)


def _finished(state: dict[str, Any]) -> bool:
    """Whether a search has found what it looked for, and was not ended by the limit of products."""
    return "found" in state and bool(state.get("finished", all(pair["converged"] for pair in state["found"]["pairs"])))


def _ended(state: dict[str, Any], settings: Settings) -> bool:
    """Whether a search has come to the end that is asked for, and not to another one."""
    if "found" not in state or state["found"]["tolerance"] != settings.tolerance:
        return False
    return _finished(state) or _products(state) >= settings.most_products


def open_eigen_store(session: Session, space: VectorSpace, attributes: dict[str, Any]) -> Store:
    """Open or create the store of a search, bound to ``attributes`` and to what is searched. Collective: yes.

    A search that ended otherwise than is asked for now, and has given its basis back, begins anew.

    Raises
    ------
    StoreError : it holds another search.

    """
    config, world, settings = session.config, session.world, Settings.of(session.config)
    folder = session.out / FOLDER
    check_search(session, attributes)
    bound_to, anew = _bound_to(config, attributes), False
    place: dict[str, Any] = {"layout": space.layout, "shard": space.shard, "world": world, "driver": config.store.driver}
    if store_exists(folder, world):
        store = Store.open(folder, **place)
        state = _state_of(store.state)
        anew = "found" in state and "search" not in state and not _ended(state, settings)
        if not anew:
            return store
        store.close()
    kept = ThickRestart.most_kept(settings.vectors, settings.count, settings.which)
    return Store.create(
        folder,
        **place,
        probes=1,
        steps=1,
        rows=settings.vectors + kept + 2,
        dtype=space.dtype,
        attributes=bound_to,
        keep_basis=True,
        extra_bytes=(1 << 16) + 40 * settings.vectors**2 + (settings.pairs << 14),
        save_space="lower studies.eigenpairs.count or studies.eigenpairs.basis_size, or put run.out on a larger disk",
        replace_existing=anew,
    )


def search_ended(session: Session, store: Store) -> bool:
    """Whether the search of a store has come to the end that is asked for. Collective: no."""
    return _ended(_state_of(store.state), Settings.of(session.config))


def pairs_found(store: Store) -> dict[str, Any]:
    """Return what a search that has ended found, for result.json. Collective: no."""
    return dict(json.loads(store.state.extra)["found"])


def read_eigenvectors(session: Session, space: VectorSpace, attributes: dict[str, Any]) -> list[tuple[float, Vector]]:
    """Return the pairs that the run's search found, ascending; none where it did not search. Collective: yes."""
    settings = Settings.of(session.config)
    if not settings.wanted or not store_exists(session.out / FOLDER, session.world):
        return []
    with open_eigen_store(session, space, attributes) as store:
        pairs = pairs_found(store)["pairs"] if search_ended(session, store) else []
        return [
            (pair["value"], space.wrap(torch.from_numpy(store.read_row(0, pair["row"])).to(space.device)))
            for pair in sorted(pairs, key=lambda p: p["value"])
        ]


def eigen_basis_device(session: Session, space: VectorSpace, exact_bytes: int) -> torch.device:
    """Return where the search's basis lies: the device if it fits there, else host memory. Collective: yes.

    Raises
    ------
    ConfigError : it fits nowhere; names how many vectors would.

    """
    rows = Settings.of(session.config).vectors + 1
    return room_for_rows(session.world, space, rows, exact_bytes, "studies.eigenpairs.basis_size")

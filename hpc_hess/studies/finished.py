"""A run that is finished already: its report is written again from its result, and no model is built or read."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from hpc_hess.config import Config
from hpc_hess.session.problem import Inputs, Problem
from hpc_hess.session.session import Session
from hpc_hess.storage.agree import attempt
from hpc_hess.storage.commit import newest
from hpc_hess.storage.identity import same
from hpc_hess.storage.schema import FILE, read_header
from hpc_hess.studies.quadrature.result import RESULT_NAME


def digest(config: Config, result: dict[str, Any]) -> str:
    """Return a checksum of a result and of all that was asked: where and how it was computed does not count."""
    asked = config.model_dump(exclude={"run", "store", "parallel"})
    rest = {key: value for key, value in result.items() if key != "digest"}
    return hashlib.blake2b(json.dumps([asked, rest], sort_keys=True).encode(), digest_size=16).hexdigest()


def finished_result(session: Session, inputs: Inputs | Problem) -> dict[str, Any] | None:
    """Return the result that is there, if it answers all that is asked and no basis is left to free; {} beside rank 0.

    Collective: yes.
    """
    world, out, config, found = session.world, session.out, session.config, None
    with attempt(world, out / RESULT_NAME, "look for a result"):
        if world.rank == 0 and (out / RESULT_NAME).exists():
            found = _whole(session, (out / RESULT_NAME).read_bytes())
            now = {"model": inputs.source.fingerprint, "data": inputs.samples.fingerprint}
            if found and not all(same(found[part]["fingerprint"], value) for part, value in now.items()):
                found = None
            if found:
                header = read_header(out / FILE)
                complete = newest(header.schema.slots, header.ledger, out / FILE).complete(config.lanczos.probes)
                nothing_to_free = not header.schema.rows or config.store.keep_basis
                found = found if complete and nothing_to_free else None
    there = world.broadcast(found is not None, "look for a result")  # it may be large, and rank 0 alone shows it
    return (found or {}) if there else None


def _whole(session: Session, text: bytes) -> dict[str, Any] | None:
    try:
        result = json.loads(text)
        return result if result["digest"] == digest(session.config, result) else None
    except (ValueError, TypeError, KeyError):
        return None  # of an earlier version, or damaged

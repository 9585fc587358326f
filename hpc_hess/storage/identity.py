"""What is on disk follows from some settings: other ones must not go on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hpc_hess.errors import StoreError


def same(found: Any, wanted: Any) -> bool:
    """Return whether a stored value is the wanted one; a fingerprint accepts the kinds that older versions wrote. Local."""
    accepts = getattr(wanted, "accepts", None)
    return bool(accepts(found)) if accepts else bool(found == wanted)


def must_match(found: Mapping[str, Any], wanted: Mapping[str, Any], holds: str, remedy: str) -> None:
    """Raise StoreError where a setting differs: "``holds`` with KEY = OLD, not NEW: ``remedy``". Local.

    ``found`` came through JSON, so ``wanted`` is compared as JSON would give it back.
    """
    for key, value in json.loads(json.dumps(dict(wanted))).items():
        if not same(found.get(key), wanted[key]) and found.get(key) != value:
            raise StoreError(f"{holds} with {key} = {found.get(key)!r}, not {value!r}: {remedy}")

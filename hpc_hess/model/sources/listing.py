"""transformers' list of which name lies in which of its files, made once.

To make it, transformers opens all of its 3,400 files: when it is imported, and again when a model is first asked for, with
other prefixes. On a parallel file system hundreds of ranks do so at the same moment.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any


@functools.cache
def list_once() -> None:
    """Import transformers, and have it take its second list from its first."""
    import transformers
    from transformers.utils import import_utils

    listed = getattr(import_utils, "define_import_structure", None)
    if listed is None or "transformers.models" in sys.modules:
        return
    folder = Path(transformers.__file__).parent / "models"

    def known(module_path: Any, prefix: str | None = None) -> Any:
        if prefix is not None or Path(module_path) != folder / "__init__.py":
            return listed(module_path, prefix=prefix)
        return {
            needs: {name.removeprefix("models."): what for name, what in names.items() if name.startswith("models.")}
            for needs, names in listed(folder, prefix="models").items()
        }

    import_utils.define_import_structure = known  # type: ignore[assignment]

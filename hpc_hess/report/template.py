"""The HTML templates of the pages; what goes into them is escaped."""

from __future__ import annotations

from typing import Any

import jinja2


def render_template(name: str, **values: Any) -> str:
    """Return a template of this folder with its values; a missing one is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hpc_hess.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)

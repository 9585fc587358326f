"""All studies, a line each, in the order in which a run makes them and a report shows them.

The quadrature comes before all of them: its settings are [lanczos].
"""

from __future__ import annotations

from dataclasses import dataclass

from hpc_hess.registry.table import Reference, Registry


@dataclass(frozen=True)
class StudySpec:
    """What is computed of a matrix, and shown.

    Attributes
    ----------
    name : of its table of the configuration, [studies.NAME], and of its part of the result.
    settings : the class of that table, a config.StudySettings.
    recipe : how it is computed, a studies.base.Recipe.
    view : how it is shown, with the functions of studies.views.View.

    """

    name: str
    settings: Reference
    recipe: Reference
    view: Reference

    @property
    def said(self) -> str:
        """The name."""
        return f"`{self.name}`"


def _in_folder(name: str) -> StudySpec:
    """Return a study of the package: a folder with the modules settings, compute and view."""
    folder = f"hpc_hess.studies.{name}"
    return StudySpec(name, f"{folder}.settings:Settings", f"{folder}.compute:RECIPE", f"{folder}.view")


STUDIES: Registry[StudySpec] = Registry(
    _in_folder("eigenpairs"),
    _in_folder("deflated"),
    _in_folder("trace"),
    _in_folder("diagonal"),
    _in_folder("inverse"),
    _in_folder("block_diagonal"),
    _in_folder("class_structure"),
    _in_folder("sub_block"),
)

"""The configuration: one TOML file, every key with a default that is right for the demo, all validation."""

from hpc_hess.config.loading import DEMO, PACKAGE, TOY, load_config, make_config, parse_time_limit, sections
from hpc_hess.config.sections import (
    IN_PROGRAM,
    LEFT_OUT_AT_DEFAULT,
    Config,
    DataSection,
    LanczosSection,
    ModelSection,
    OneOf,
    ParallelSection,
    ProblemSection,
    Section,
    SketchSection,
    StudySettings,
)

__all__ = [
    "DEMO",
    "IN_PROGRAM",
    "LEFT_OUT_AT_DEFAULT",
    "PACKAGE",
    "TOY",
    "Config",
    "DataSection",
    "LanczosSection",
    "ModelSection",
    "OneOf",
    "ParallelSection",
    "ProblemSection",
    "Section",
    "SketchSection",
    "StudySettings",
    "load_config",
    "make_config",
    "parse_time_limit",
    "sections",
]

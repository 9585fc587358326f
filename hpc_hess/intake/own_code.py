"""Python code that a model directory brings: whether it is needed, and which files belong to it. Nothing is run here."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpc_hess.errors import ModelError
from hpc_hess.intake.directory import inside
from hpc_hess.intake.findings import Finding, noted

_CONFIG, _MODEL = "AutoConfig", "AutoModelForCausalLM"


def decide(
    directory: Path, config: Mapping[str, Any], *, trusted: bool, known_config: bool, known_model: bool, auto: str = _MODEL
) -> tuple[bool, list[Finding]]:
    """Return whether the directory's own code is to be run, and what a user should know about it.

    Parameters
    ----------
    config : the contents of config.json.
    trusted : ``model.trust_remote_code``.
    known_config, known_model : whether transformers has a class of its own for the configuration, for the model.
    auto : the class of transformers that builds the model.

    Raises
    ------
    ModelError : the code is needed, and it is not trusted, or not there.

    """
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, Mapping):
        if auto_map is None:
            return False, []
        raise ModelError(f"auto_map of {directory / 'config.json'} should be a table of classes, not {auto_map!r}")
    needed = [name for name, known in ((_CONFIG, known_config), (auto, known_model)) if not known]
    lacking = _lacking(directory, auto_map, [name for name in (_CONFIG, auto) if name in auto_map])
    if needed:
        if missing := [name for name in needed if name not in auto_map]:
            raise ModelError(
                f"{directory / 'config.json'} names code for {', '.join(auto_map)}, but none for {missing[0]}, and "
                f"transformers has no such model of type {config.get('model_type')!r}: use a checkpoint with one"
            )
        if lacking:
            raise ModelError(f"{directory} needs its own Python code, but {lacking}")
        if not trusted:
            raise ModelError(
                f"{directory} brings its own Python code, which is not run unless you ask for it: read the code, then set "
                "model.trust_remote_code = true"
            )
        return True, []
    if not any(name in auto_map for name in (_CONFIG, auto)):
        return False, []
    kind = f"transformers' own class for model type '{config.get('model_type')}' is taken"
    if not trusted:
        return False, [noted("model.code", f"{kind}, not the code that config.json names (auto_map)")]
    if lacking:
        return False, [noted("model.code", f"{kind}: {lacking}")]
    instead = f"in place of transformers' class for model type '{config.get('model_type')}'"
    return True, [noted("model.code", f"the directory's own code is run, {instead}")]


def code_files(directory: Path, auto_maps: Iterable[Any]) -> dict[str, Path]:
    """Return by name the Python files that ``auto_map`` tables name, and those that they import relatively.

    Files that are not there, directories, other repositories' files and what is not Python are left out. Collective: no.
    """
    waiting = [file for auto_map in auto_maps for file in _files_of(auto_map) if file is not None]
    found: dict[str, Path] = {}
    while waiting:
        name = waiting.pop()
        path = directory / name
        if name in found or not inside(directory, name) or not path.is_file():
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        found[name] = path
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                modules = [node.module] if node.module else [alias.name for alias in node.names]
                waiting += [f"{module.replace('.', '/')}.py" for module in modules if module]
    return dict(sorted(found.items()))


def _files_of(auto_map: Any) -> list[str | None]:
    """Return the file of each class that a table names; None for one of another repository."""
    if not isinstance(auto_map, Mapping):
        return []
    files: list[str | None] = []
    for value in auto_map.values():
        for reference in value if isinstance(value, list | tuple) else [value]:
            if isinstance(reference, str):
                files.append(None if "--" in reference else f"{reference.rpartition('.')[0]}.py")
    return files


def _lacking(directory: Path, auto_map: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return what of the code for some classes is not in the directory, as half a sentence, else ""."""
    for name in names:
        reference = auto_map[name]
        if not isinstance(reference, str) or "." not in reference:
            return f"auto_map names {reference!r} for {name}, which should be FILE.CLASS"
        if "--" in reference:
            repository, _, local = reference.partition("--")
            return (
                f"the code for {name} lies in another repository, {repository}: download its files into this directory and "
                f"write '{local}' into auto_map of config.json"
            )
        file = f"{reference.rpartition('.')[0]}.py"
        if not inside(directory, file):
            return f"'{file}', which auto_map names for {name}, is not a file of this directory"
        if not (directory / file).is_file():
            return f"{file}, which auto_map names for {name}, is missing: download it"
    return ""

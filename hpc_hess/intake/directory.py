"""Which files of a model directory hold its weights: those that transformers' from_pretrained takes.

Pure functions of names and of small text files; no weight is read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_hess.errors import ModelError
from hpc_hess.intake.findings import Finding, noted

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DISTRIBUTED = ".metadata"  # what torch.distributed.checkpoint writes last
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".th")
_OTHER_FORMS = {
    ".gguf": "set model.source to that file",
    ".incomplete": "the download was not finished: start it again",
    ".part": "the download was not finished: start it again",
    ".crdownload": "the download was not finished: start it again",
    ".aria2": "the download was not finished: start it again",
    ".distcp": f"it is of a distributed checkpoint: set model.source to the directory that holds its {DISTRIBUTED}; where "
    "there is none, the checkpoint is not whole",
}
_FORMS = (
    ".safetensors",
    *PICKLES,
    *_OTHER_FORMS,
    ".h5",
    ".hdf5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".ggml",
    ".npz",
    ".ot",
    ".pdparams",
    ".params",
    ".mlmodel",
    ".mlpackage",
    ".tflite",
    ".nemo",
    ".keras",
    ".weights",
    ".zarr",
    ".llamafile",
    ".orbax",
    ".pb",
    ".mar",
    ".pte",
    ".engine",
    ".t7",
)
_INNER = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".distcp"}  # or .bin.gz
_ARCHIVE = re.compile(r".*(model|weights|checkpoint|ckpt).*\.(tar(\..*)?|tgz|zip|7z)")
_NUMBERED = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.safetensors")
_TENSORFLOW = re.compile(r".*\.(index|data-\d{5}-of-\d{5})$")
_SLICES = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # of a distributed save_pretrained: not whole tensors
_NOT_WEIGHTS = ("training_args.bin", "krylov.h5", "sketches.h5")  # trainers' settings; this program's own files
_BESIDE = ("adapter", "consolidated", "optimizer", "scheduler")  # safetensors files that are not the model's


@dataclass(frozen=True)
class WeightFiles:
    """Files of a directory, by names relative to it, in the order in which they are read.

    ``indexed`` maps tensors to files where an index says so.
    """

    directory: Path
    names: tuple[str, ...]
    indexed: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


def find_weight_files(directory: Path, config: Mapping[str, Any]) -> WeightFiles | None:
    """Return the safetensors files that from_pretrained takes, or None where there are none.

    In this order: what ``transformers_weights`` of config.json names, ``model.safetensors``, the files of
    ``model.safetensors.index.json``. Where there is none of these, every other safetensors file (a variant, shards
    without their index), which from_pretrained would not find.

    Raises
    ------
    ModelError : the index cannot be read, or names a file outside of the directory; a shard is missing.

    """
    present = sorted(p.name for p in directory.iterdir() if p.name.endswith(".safetensors"))
    slices = [name for name in present if _SLICES.fullmatch(name)]
    if slices:
        raise ModelError(
            f"{directory / slices[0]} holds a slice of each tensor, as a distributed save_pretrained writes it: load the "
            "directory with from_pretrained and save it whole"
        )
    explicit = config.get("transformers_weights")
    if explicit is not None:
        if not str(explicit).endswith((".safetensors", ".safetensors.index.json")):
            raise ModelError(f"{directory}/config.json has transformers_weights = '{explicit}', which is not safetensors")
        first = str(explicit)
    elif _lies(directory / SINGLE):
        first = SINGLE
    elif (directory / INDEX).is_file():
        first = INDEX
    else:
        names = _without_index(directory, present)
        if not names:
            return None
        note = noted("weights.files", f"{_some(names)} taken, although from_pretrained looks for {SINGLE} or {INDEX}")
        return _checked(WeightFiles(directory, tuple(names), {}, (note,)))
    table = {} if first.endswith(".safetensors") else _read_index(directory, first)
    names = sorted(set(table.values())) if table else [first]
    left = [name for name in [*present, *([INDEX] if (directory / INDEX).is_file() else [])] if name not in {first, *names}]
    left = [name for name in left if not name.startswith(_BESIDE)]
    notes = (noted("weights.files", f"{first} is taken, as from_pretrained does; {_some(left)} not read"),) if left else ()
    return _checked(WeightFiles(directory, tuple(names), table, notes))


def weight_like(directory: Path) -> list[str]:
    """Return what looks like weights in any form, in the directory or one below, by names relative to it, sorted."""
    here = _listed(directory)
    found = [p for p in here if _looks_like_weights(p)]
    for below in here:
        if below.is_dir() and not (below / "krylov.h5").exists():  # a run directory of this program
            found += [p for p in _listed(below) if _looks_like_weights(p)]
    names = [str(p.relative_to(directory)) for p in found]
    # where downloads that are not whole lie: of `hf download --local-dir`, and of the Hub's cache
    for folder, most in ((".cache/huggingface/download", "**/*.incomplete"), ("../../blobs", "*.incomplete")):
        if not folder.startswith("..") or directory.resolve().parent.name == "snapshots":
            names += [f"{folder}/{p.name}" for p in (directory.resolve() / folder).glob(most)]
    return sorted(names, key=lambda name: (name.count("/"), name))


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:  # not ours to read
        return []


def refuse_unread(directory: Path, names: list[str]) -> None:
    """Raise ModelError about weights in a form that is not read, with the remedy for it."""
    name = names[0]
    path, suffix = directory / name, Path(name).suffix
    below = len(Path(name).parts) > 1
    if suffix == ".safetensors" and below:
        remedy = f"set model.source to {path.parent} if these are the weights"
    elif suffix == ".safetensors":
        remedy = "it is not the model's: add model.safetensors"
    elif Path(name).name.endswith(".index.json"):
        remedy = "the files that it names are missing: the download is incomplete"
    elif suffix in PICKLES:
        refuse_pickle(path)
    else:
        remedy = _OTHER_FORMS.get(suffix, "convert the weights to safetensors first")
    raise ModelError(
        f"{path} looks like weights, but {directory} has no safetensors file of the model: {remedy} "
        "(for random weights, set model.source to a config.json that lies alone)"
    )


def refuse_pickle(path: Path) -> None:
    """Raise ModelError about pickled weights."""
    raise ModelError(
        f"{path} holds pickled weights, which can run code when opened and cannot be read slice by slice: convert "
        "them to safetensors first (if you trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW))"
    )


def inside(directory: Path, name: str) -> bool:
    """Return whether a name, as text, stays within the directory: relative, and never up."""
    return bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts and "\\" not in name


def leads_out(directory: Path, name: str) -> Path | None:
    """Return where a link leads, if that is neither in the directory nor in the blobs of its own Hub cache."""
    root, real = directory.resolve(), (directory / name).resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append((root.parents[1] / "blobs").resolve())
    return None if any(real.is_relative_to(home) for home in homes) else real


def weights_without_index(names: Iterable[str]) -> list[str]:
    """Return the safetensors files that are a model's, where neither the single file nor the index is among ``names``."""
    found = sorted(name for name in names if name.endswith(".safetensors"))
    return [name for name in found if not name.startswith(_BESIDE)] or [n for n in found if n.startswith("consolidated")]


def _without_index(directory: Path, present: list[str]) -> list[str]:
    """Return the safetensors files to read where neither the single file nor the index is there."""
    names = weights_without_index(present)
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            stem, width, count = match[1], len(match[2]), int(match[3])
            wanted = [f"{stem}-{k:0{width}d}-of-{match[3]}.safetensors" for k in range(1, count + 1)]
            if missing := [w for w in wanted if w not in names]:
                raise ModelError(
                    f"{directory / missing[0]} is missing, although {name} says that there is one: "
                    "the download is incomplete"
                )
    return names


def _read_index(directory: Path, name: str) -> dict[str, str]:
    """Return tensor -> file as an index says, all of them inside the directory."""
    path = directory / name
    if not inside(directory, name):
        raise ModelError(f"'{name}', which config.json names as transformers_weights, is not a file of {directory}")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not (isinstance(table, dict) and table and all(isinstance(file, str) for file in table.values())):
            raise ValueError("weight_map should name a file for each tensor")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"cannot read {path}: {type(error).__name__}: {error}") from None
    return table


def _checked(files: WeightFiles) -> WeightFiles:
    """Refuse names that leave the directory and files that are not there; note links that lead elsewhere."""
    directory, notes = files.directory, []
    says = "the index" if files.indexed else "config.json"
    for name in files.names:
        if not inside(directory, name):
            raise ModelError(f"'{name}', which {says} names, is not a file of {directory}: only files inside it are read")
    missing = [name for name in files.names if not (directory / name).is_file()]
    if missing:
        if len(missing) == len(files.names) and files.indexed:
            raise ModelError(f"{directory} has an index of safetensors files but none of the files: download is incomplete")
        why = f"although {says} names it" if not (directory / missing[0]).is_symlink() else "as the link there leads nowhere"
        raise ModelError(f"{directory / missing[0]} is missing, {why}: the download is incomplete")
    linked = [name for name in files.names if leads_out(directory, name)]
    if linked:
        where = leads_out(directory, linked[0])
        text = f"{linked[0]} is a link out of {directory}: {where} is read"
        notes.append(noted("weights.files", text + (f" ({len(linked)} such links)" if len(linked) > 1 else "")))
    return WeightFiles(directory, files.names, files.indexed, (*files.findings, *notes))


def _lies(path: Path) -> bool:
    """Return whether there is a file or a link, be it a broken one."""
    return path.is_file() or path.is_symlink()


def _looks_like_weights(path: Path) -> bool:
    name = path.name.lower()
    if name.removesuffix(".tmp") in _NOT_WEIGHTS or name.endswith((".metadata", ".lock", ".py", ".md", ".txt")):
        return False
    if path.is_dir() and not name.endswith((".zarr", ".orbax", ".mlpackage")):
        return False
    if name.endswith(_FORMS) or _TENSORFLOW.fullmatch(name) or _ARCHIVE.fullmatch(name):
        return True
    return not _INNER.isdisjoint(Path(name).suffixes) and not name.endswith("quantize_config.json")


def _some(names: list[str]) -> str:
    """Return "a is", "a and b are", "a and 3 others are"."""
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{names[0]} and {names[1]} are" if len(names) == 2 else f"{names[0]} and {len(names) - 1} others are"

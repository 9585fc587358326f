"""hpc-hess fetch: what names of the Hugging Face Hub stand for comes into the local cache, such as on a login node."""

from __future__ import annotations

from pathlib import Path

from hpc_hess.config import ModelSection, load_config
from hpc_hess.errors import ConfigError
from hpc_hess.model.data.data import load_samples
from hpc_hess.model.sources.adapted import of_adapter
from hpc_hess.model.sources.hub import named
from hpc_hess.model.sources.hub_models import download
from hpc_hess.model.sources.source import resolve_source


def fetch(what: str) -> int:
    """Download a model, or the model and the data of a configuration; print the model's directory. Returns 0. One process.

    Raises
    ------
    ConfigError : neither a name nor a configuration.
    ModelError, DataError : as for a run.

    """
    name = named(what, "", "model")
    if name is not None:
        path = download(name)
        of_adapter(str(path), ModelSection())  # brings its base, if it is one
        print(path)
        return 0
    if not what.endswith(".toml"):
        here = "is a path here" if Path(what).exists() else "is no name of the Hub"
        raise ConfigError(f"'{what}' {here}: give ORG/NAME, ORG/NAME@REV, or a configuration, CONFIG.toml")
    config = load_config(what)
    source = resolve_source(config.model)
    load_samples(config.data, config.model, source)
    print(source.adapter.path if source.adapter is not None else source.path)
    return 0

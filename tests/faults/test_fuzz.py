"""A few hundred mutated configurations and some damaged run directories; benchmarks/fuzz.py tries many more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpc_hess.parallel.world import World
from tests.support import fuzz_config, fuzz_store
from tests.support.toys import toy_directory

pytestmark = pytest.mark.slow


def test_mutated_configurations_are_read_or_refused(world: World, tmp_path: Path) -> None:
    """Whatever else is raised fails here. Some of those that are read are run."""
    toy_directory("llama", tmp_path / "model")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(3, 96, size=300))
    base = fuzz_config.toy_base(tmp_path)
    assert fuzz_config.read(tmp_path / "base.toml", fuzz_config.mutated_by(base)) is not None
    read = [fuzz_config.read(tmp_path / "case.toml", case) for case in fuzz_config.cases(base, 1, 400)]
    accepted = [config for config in read if config is not None]
    assert 20 < len(accepted) < 200
    for number, config in enumerate(accepted[:6]):
        ended = fuzz_config.try_run(config, tmp_path / f"run-{number}", world)
        assert ended.good, (config.to_toml(), ended.text)


def test_damaged_run_directories_are_sentences(world: World, tmp_path: Path) -> None:
    """Inspected, reported and gone on with: the right numbers or a sentence."""
    bases = fuzz_store.bases(tmp_path, world)
    for number, rng in enumerate(fuzz_store.damages(1, 12)):
        what, ends = fuzz_store.tried(bases[number % len(bases)], rng, tmp_path / "damaged", world)
        for command, ended in ends.items():
            assert ended.good, (what, command, ended.text)

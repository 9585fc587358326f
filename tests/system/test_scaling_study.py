"""A study run by a launcher, laws fitted to its runs, the machine measured: the commands as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_hess.cli import main
from hpc_hess.planning.machine import Machine

pytestmark = pytest.mark.slow


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "machine", str(tmp_path / "m.json")]) == 0
    assert Machine.read(str(tmp_path / "m.json")).flops_per_s["float32"] > 1e8
    assert main(["scaling", "fit", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    study = tmp_path / "study.toml"
    study.write_text(
        f'config = "launch/configs/toy.toml"\nout = "{tmp_path}/study"\n[set]\n"lanczos.probes" = 1\n"lanczos.steps" = 3\n'
        '"operator.check" = false\n[sweep]\nranks = [1, 2]\n'
    )
    assert main(["scaling", "run", str(study), "--point", "7"]) == 2
    assert "has points 0 to 1" in capsys.readouterr().err
    assert main(["scaling", "run", str(study)]) == 0
    assert main(["scaling", "run", str(study)]) == 0
    assert capsys.readouterr().out.count("done before") == 2
    folders = sorted(map(str, (tmp_path / "study").iterdir()))
    assert main(["scaling", "fit", *folders, "--out", str(tmp_path / "laws")]) == 0
    record = json.loads((tmp_path / "laws" / "scaling.json").read_text())
    (found,) = record["operators"].values()
    assert found["time"]["hold_out"]["runs"] == ["001_2-ranks"] * 2
    assert (tmp_path / "laws" / "scaling.html").read_text().count("<img") == 3

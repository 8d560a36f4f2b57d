"""The launchers for one machine: of two runs of a sweep one succeeds, one fails, and both are reported.

So it is with joblib in ``tests/integration/test_sweep.py``.
"""

import json
from pathlib import Path

import pytest

from tests.integration.commands import Command
from tests.integration.conftest import FEW, NARROW, SMALL


@pytest.mark.parametrize(("cluster", "plugin"), [("submitit_local", "submitit"), ("ray", "ray")], ids=lambda name: name)
def test_a_run_that_raises_does_not_stop_its_neighbour(tmp_path: Path, cluster: str, plugin: str) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher", reason=f"the extra for cluster={cluster} is missing")
    settings = [*SMALL, *FEW, *NARROW, "stages=[discover]"]
    sweep = [f"output_dir={tmp_path}/out", f"cluster={cluster}", "sae.learning_rate=0.003,1e30"]
    process = Command("salve.cli", ["-m", *settings, *sweep], tmp_path)
    out, errors = process.communicate()
    assert process.returncode == 1, out + errors
    assert errors.splitlines()[-1].startswith("salve: 1 of 2 runs did not finish")
    (bad,) = tmp_path.glob("out/sweeps/*/*/failure.json")
    assert "diverged" in json.loads(bad.read_text())["reason"]
    (good,) = tmp_path.glob("out/sweeps/*/*/manifest.json")
    assert good.parent != bad.parent
    made = [path.parent.parent.name for path in tmp_path.glob("out/artifacts/*/*/DONE.json")]
    assert sorted(made) == ["activations", "classifier", "features", "sae"]

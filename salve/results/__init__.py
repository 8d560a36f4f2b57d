# SPDX-License-Identifier: MIT
"""Read what runs and sweeps leave: settings, metrics, tables, tensors and SAEs.

:func:`open_run` and :func:`open_sweep` read a few small files. Everything else is read when it is first asked for, and
the artifact that holds it is checked first (:mod:`salve.integrity`). torch is imported with the first tensor or SAE.
"""

from salve.results.artifacts import Artifacts
from salve.results.run import Run, State, open_run
from salve.results.sweep import Sweep, open_sweep

__all__ = ["Artifacts", "Run", "State", "Sweep", "open_run", "open_sweep"]

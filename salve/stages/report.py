# SPDX-License-Identifier: MIT
"""Stage ``report``: write tables, figures, edit files and a page into the run's folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from salve.artifacts import Artifact
from salve.report import write_report


def report(
    out: Path,
    artifacts: Mapping[str, Artifact],
    *,
    title: str,
    facts: Mapping[str, str],
    config: str,
    commands: Sequence[str],
    remarks: Sequence[str],
) -> Path:
    """Write the report of a run.

    Args:
        out: the run's folder.
        artifacts: by kind.
        title, facts, config, commands, remarks: what the page says about the run.

    Returns:
        Path of ``index.html``.
    """
    paths = {kind: artifact.path for kind, artifact in artifacts.items()}
    return write_report(
        out, title=title, facts=facts, config=config, artifacts=paths, commands=commands, remarks=remarks
    )

# SPDX-License-Identifier: MIT
"""What an audit's suspects rest on, in words that all parts of a report share."""

from typing import Any

from salve.report.text import plural
from salve.results import Artifacts
from salve.sae.remarks import BETTER, explains_little


def ranked(record: dict[str, Any]) -> str:
    """How suspects were ranked, and what their score is.

    Args:
        record: the content of ``audit.json``.
    """
    if record.get("labels"):
        return (
            f"They are ranked by a score on {plural(record['labelled'], 'select image')} whose {record['attribute']} "
            f"is known, at most {record['labels']} of each group: how well the latent tells the {record['attribute']} "
            "within a class, times its effect."
        )
    return (
        "They are ranked without labels, by a score on select images: the effect, times the lift's logarithm to the "
        "base of 2."
    )


def poor_suspects(artifacts: Artifacts) -> str:
    """A caution about the suspects of an SAE that explains little, with what to change; empty if it explains enough."""
    if not (little := explains_little(artifacts.record("sae", "sae.json"))):
        return ""
    return f"{little}: most of what pushes images towards a class is not among these suspects. {BETTER}"

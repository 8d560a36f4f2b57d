"""What a run says at its end."""

from pathlib import Path

from rich.console import Console

from salve.artifacts import Artifact
from salve.run.execute import _list


def test_a_run_without_a_report_says_what_it_measured_and_where_things_are() -> None:
    classifier = Artifact("classifier", "0123", Path("outputs/artifacts/classifier/0123"), "digest", reused=False)
    metrics = {
        "test_accuracy": None,
        "select_accuracy": 0.25,
        "fve": 0.64123,
        "select_fve": 0.7,
        "alpha_flip_median": None,
    }
    console = Console(record=True, width=40)
    _list({"classifier": classifier}, metrics, console)
    assert console.export_text().splitlines() == [
        "select_accuracy: 0.25",
        "fve: 0.6412",
        "classifier: outputs/artifacts/classifier/0123",
    ]

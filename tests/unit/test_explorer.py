"""What the explorer holds: rounded no more than the logits allow, within its size, and safe inside of a page."""

import json
import zlib
from base64 import b85decode
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from salve.artifacts import write_record, write_table
from salve.features.shown import shown_latents
from salve.report.explorer.latents import latents_of
from salve.report.explorer.packing import COARSE, FINE, json_for_script, packed, rounded
from salve.report.explorer.page import data_of, write_explorer
from salve.report.first import first_lines
from salve.report.tables import class_summary, headline
from salve.results import Artifacts
from tests.explored import write_artifacts


@pytest.mark.parametrize(("error", "most"), [(FINE, 1e-6), (COARSE, 1e-4)])
def test_rounded_activations_give_the_same_logits_under_any_gate(error: float, most: float) -> None:
    random = np.random.default_rng(0)
    rows, weight = random.exponential(1.0, (400, 64)), random.normal(0, 0.2, (10, 64))
    weight[:, 3] = 0  # a channel that nothing reads
    found = rounded(rows, weight, error)
    values = found.values()
    for gate in (np.ones(64), random.uniform(0, 1, 64), random.integers(0, 2, 64)):
        assert np.abs((values - rows) @ (weight * gate).T).max() < most
    coarse = len(packed(found.planes))
    assert coarse < len(packed(rows.astype(np.float32))) or error == FINE


def test_text_is_read_back_and_means_nothing_in_html() -> None:
    array = np.random.default_rng(0).integers(0, 256, 10_001).astype(np.uint8)
    text = packed(array)
    assert not set(text) & set("<>&\"'\\\n") - {">"}
    assert np.array_equal(
        np.frombuffer(zlib.decompress(b85decode(text.replace(",", "<").replace(".", "&"))), np.uint8), array
    )


def test_json_ends_no_script_and_knows_no_infinity() -> None:
    text = json_for_script({"</script><!--": [float("nan"), np.float32(2), float("inf"), "é"]})
    assert "<" not in text
    assert json.loads(text) == {"</script><!--": [None, 2.0, None, "é"]}


def test_latents_are_thinned_to_those_that_matter() -> None:
    means = np.array([0.1, -5.0, np.nan, 3.0, 0.2])
    assert shown_latents(means, 512).tolist() == [0, 1, 2, 3, 4]
    assert shown_latents(means, 100_000, first=[4]).tolist() == [1, 3, 4]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return write_artifacts(tmp_path_factory.mktemp("run"), classes=4, images=150, latents=40, width=32)


def test_large_data_are_thinned_alike_and_the_page_says_so(artifacts: Artifacts, tmp_path: Path) -> None:
    whole = data_of(artifacts, latents_of(artifacts), [], 4_000_000)
    assert whole["notes"] == []
    assert whole["activations"]["images"] == list(range(600))
    page = write_explorer(tmp_path, artifacts, title="small", most_bytes=520_000)
    assert page is not None
    assert page.stat().st_size <= 520_000
    part = data_of(artifacts, latents_of(artifacts), [], 440_000)
    assert set(np.bincount(part["activations"]["labels"])) == {len(part["activations"]["labels"]) // 4}
    assert 40 < len(part["activations"]["labels"]) < 600
    assert " of 600 test images are here" in part["notes"][0]


def test_the_first_lines_say_what_there_is(tmp_path: Path) -> None:
    def said(**records: dict[str, object]) -> dict[str, str]:
        for kind, record in records.items():
            (tmp_path / kind).mkdir(exist_ok=True)
            write_record(tmp_path / kind / {"control": "verdict.json"}.get(kind, f"{kind}.json"), record)
        found = Artifacts({path.name: path for path in tmp_path.iterdir()})
        rows = class_summary(found)
        return dict(first_lines(found, headline(found, rows), rows))

    assert said() == {}
    limits = {"accuracy": 0.05, "others_mean_change": 0.03, "others_worst_loss": 0.1}
    counts = {"judged": 10, "separates": 7, "separates_low": 5, "separates_high": 9, "separates_published": 8}
    lines = said(
        classifier={"classes": ["a", "b"]},
        control={**counts, "confidence": 0.95, "limits": limits, "images_per_class": 50},
        sae={"fve": 0.8, "downstream_accuracy": 0.9, "original_accuracy": 0.95},
    )
    assert list(lines) == ["It depends on", "How sure", "Not seen here", "Next"]
    assert "7 of 10 classes" in lines["It depends on"]
    assert "5–9 of 10 classes" in lines["How sure"]
    assert "50 test images" in lines["How sure"]
    assert "stages=[audit,report]" in lines["Next"]
    assert (
        "for none of 10 classes"
        in said(control={**counts, "separates": 0, "separates_low": 0, "confidence": 0.95, "limits": limits})[
            "It depends on"
        ]
    )
    # An audit is more to the point than what edits do.
    (tmp_path / "audit").mkdir()
    suspects = pd.DataFrame({"class": ["b", "a"], "latent": [4, 9], "rank": 1, "score": [2.0, 3.0]})
    write_table(tmp_path / "audit" / "suspects.csv", suspects)
    lines = said(audit={"labels": 0})
    assert "latent 9 for a, latent 4 for b" in lines["It depends on"]
    assert "latent 9" in lines["Next"]
    assert "without labels" in lines["How sure"]
    ends = {"worst_group_after_low": 0.5, "worst_group_after_high": 0.7}
    ends |= {"worst_group_before_low": 0.1, "worst_group_before_high": 0.3}
    measures = {"worst_group_before": 0.2, "worst_group_recalibrated": 0.4}
    measures |= {"average_before": 0.9, "average_after": 0.8}
    repair = {"suspects": "tag present", "attribute": "tag", **measures, **ends}
    helped = said(repair={**repair, "worst_group_after": 0.6})
    assert "right on 20.0 %; after it, the worst is right on 60.0 %" in helped["It depends on"].replace("\u00a0", " ")
    assert "take repaired.safetensors: its worst group is 20.0 points above" in helped["Next"]
    assert "an average of 80.0 % instead of 90.0 %" in helped["Next"].replace("\u00a0", " ")
    # Better than before, and no better than new biases alone, or by less than a standard error.
    for after in (0.4, 0.45):
        failed = said(repair={**repair, "worst_group_after": after})
        assert "the repair did not help" in failed["It depends on"]
        assert "keep the network as it was" in failed["Next"]
    # Without groups on test images nobody can tell, and nothing is advised either way.
    unknown = said(repair={**repair, "attribute": "", "worst_group_after": 0.4})
    assert "test images cannot tell" in unknown["It depends on"]
    assert "worst class's accuracy" in unknown["How sure"]
    assert "changed.csv" in unknown["Next"]
    # Of a network that is no better than one class's name, only that is said.
    (tmp_path / "features").mkdir()
    table = pd.DataFrame({"class": ["a", "b"], "test_images": [50, 50], "test_accuracy": [1.0, 0.0]})
    write_table(tmp_path / "features" / "classes.csv", table)
    misused = said()
    assert list(misused) == ["It depends on", "Next"]
    assert "no better than one that always names the same class" in misused["It depends on"]
    assert "check backbone.preprocess" in misused["Next"]

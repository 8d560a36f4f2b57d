"""The explorer in a real browser: it computes what Python does, keeps its state, saves edit files, and harms nobody."""

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from salve.activations import load_captured
from salve.artifacts import Artifact, read_record, write_record
from salve.backbones import LinearTail
from salve.diagnosis.critical import critical_strength
from salve.editing import contribution, load_edit_file
from salve.editing.cli import main as salve_edit
from salve.editing.gating import gates
from salve.report.explorer.page import write_explorer
from salve.results import Artifacts
from salve.sae import load_sae
from tests.browser import CHROMIUM, Browser, Tab

Run = tuple[Path, dict[str, Artifact]]
HOSTILE = "<img src=x onerror=document.title='hit'>"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(browser: Browser, whole_run: Run) -> Tab:
    return browser.open(whole_run[0] / "run" / "explorer.html")


def numbers(tab: Tab, script: str) -> np.ndarray:
    """A Float64Array of the page."""
    text = tab(
        f"(() => {{ const found = {script}, raw = new Uint8Array(found.buffer, found.byteOffset, found.byteLength);"
        " let text = ''; for (const one of raw) text += String.fromCharCode(one); return btoa(text); })()"
    )
    return np.frombuffer(base64.b64decode(text), "<f8")


def python_logits(artifacts: dict[str, Artifact], edits: list[dict[str, Any]]) -> torch.Tensor:
    """Logits of the edited network, from the artifacts: ``[N, C]``."""
    sae = load_sae(artifacts["sae"].file("sae.safetensors"))
    state = load_file(artifacts["classifier"].file("model.safetensors"))
    rows = load_captured(artifacts["activations"].path, "test").activations
    gate = torch.ones(rows.shape[1])
    for edit in edits:
        row = contribution(sae.decoder, edit["latent"])
        gate = gate * gates(row, torch.tensor([edit["alpha"]]), edit["mode"])[0]
    return rows @ (state["fc.weight"] * gate).T + state["fc.bias"]


def drawn(count: int) -> list[list[dict[str, Any]]]:
    """Sets of one to four latents with strengths and modes."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        latents = random.choice(24, size=random.integers(1, 5), replace=False).tolist()
        modes = random.choice(["suppress", "enhance"], size=len(latents)).tolist()
        strengths = (10 ** random.uniform(-1, 1, size=len(latents))).round(3).tolist()
        found.append([{"latent": a, "mode": b, "alpha": c} for a, b, c in zip(latents, modes, strengths, strict=True)])
    return found


def test_logits_are_those_of_python(page: Tab, whole_run: Run) -> None:
    for edits in drawn(100):
        wanted = python_logits(whole_run[1], edits).T.double().numpy()
        found = numbers(page, f"explorer.tail.logits({json.dumps(edits)})").reshape(wanted.shape)
        # Enhancing makes logits large, which Python computes in float32.
        assert np.abs(found - wanted).max() <= 1e-4 * max(1, np.abs(wanted).max() / 100)
        # What a slider costs less to compute is the same, wherever it comes from.
        script = (
            f"(() => {{ const edits = {json.dumps(edits)}, moving = new explorer.Moving(explorer.tail, edits, 0);"
            " const over = edits[0].mode === 'suppress' ? Infinity : 60;"
            " for (const alpha of [0, 50, 0.3, over]) moving.logits(alpha);"
            " return moving.logits(edits[0].alpha); })()"
        )
        assert np.abs(numbers(page, script) - found.reshape(-1)).max() < 1e-9 * max(1, np.abs(found).max())


def test_critical_strengths_are_those_of_python(page: Tab, whole_run: Run) -> None:
    decoder = load_file(whole_run[1]["sae"].file("sae.safetensors"))["decoder"].double()
    state = load_file(whole_run[1]["classifier"].file("model.safetensors"))
    rows = load_captured(whole_run[1]["activations"].path, "test").activations.double()
    tail = LinearTail(state["fc.weight"].double(), state["fc.bias"].double())
    predicted = tail(rows).argmax(dim=1)
    for latent in range(0, 24, 4):
        wanted = critical_strength(tail, rows, decoder[:, latent], predicted, "flip", "exact")
        found = page(
            f"(() => {{ const edits = [{{latent: {latent}, mode: 'suppress', alpha: 0}}];"
            " const moving = new explorer.Moving(explorer.tail, edits, 0);"
            " return Array.from(explorer.tail.predicted, (own, n) => moving.critical(n, own)); })()"
        )
        found = [np.inf if one is None else one for one in found]
        np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_a_saved_edit_is_the_edit_of_python(browser: Browser, page: Tab, whole_run: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run[0] / "run" / "edits", run / "edits")
    weights = whole_run[1]["classifier"].file("model.safetensors")
    edits = [
        {"latent": 3, "mode": "suppress", "alpha": 1.7},
        {"latent": 11, "mode": "enhance", "alpha": 0.4},
        {"latent": 20, "mode": "suppress", "alpha": 0.1},
    ]
    page(f"explorer.state.edits = {json.dumps(edits)}; explorer.showState(); document.getElementById('save').click()")
    page.wait("document.getElementById('saved').textContent.includes('salve-edit apply')")
    name = page("document.querySelector('#saved code').textContent")
    saved = browser.downloads / name
    for _ in range(200):
        if saved.is_file() and saved.stat().st_size:
            break
        page("new Promise((done) => setTimeout(done, 20))")
    shutil.copy(saved, run / "edits" / name)
    assert salve_edit(["apply", str(run / "edits" / name), str(weights), str(tmp_path / "edited.safetensors")]) == 0
    edited, original = load_file(tmp_path / "edited.safetensors"), load_file(weights)
    sae = load_sae(whole_run[1]["sae"].file("sae.safetensors"))
    each = [gates(contribution(sae.decoder, e["latent"]), torch.tensor([e["alpha"]]), e["mode"])[0] for e in edits]  # type: ignore[arg-type]
    factor = torch.stack(each).sort(dim=0).values.prod(dim=0)
    assert torch.equal(edited["fc.weight"], original["fc.weight"] * factor)
    assert all(torch.equal(edited[key], original[key]) for key in original if key != "fc.weight")


def test_the_state_is_in_the_address(page: Tab) -> None:
    page("explorer.state.edits = []; explorer.state.latent = 5; explorer.showState()")
    page(
        "(() => { const slider = document.querySelector('#edits input[type=range]');"
        " slider.focus(); slider.value = 150;"
        " slider.dispatchEvent(new Event('input', {bubbles: true})); const find = document.getElementById('find');"
        " find.value = 'reef'; find.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    page.wait("location.hash.includes('edit=5s') && location.hash.includes('find=reef')")
    address, total = page("location.href"), page("document.getElementById('total').textContent")
    assert "right instead of" in total
    shown = page("document.querySelectorAll('#list li').length")
    page.send("Page.navigate", url="about:blank")  # else it would only move within the page
    page.go(address)
    assert page("document.getElementById('total').textContent") == total
    assert page("document.querySelectorAll('#list li').length") == shown < 24
    assert page("document.getElementById('find').value") == "reef"


def test_everything_can_be_reached_and_has_a_name(page: Tab) -> None:
    tree = page.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "slider", "combobox", "searchbox", "textbox"}
    controls = [node for node in tree if node.get("role", {}).get("value") in roles and not node.get("ignored")]
    assert len(controls) > 8
    assert [node for node in controls if not node["name"].get("value")] == []
    assert page("document.querySelectorAll('[tabindex=\"-1\"]').length") == 0


def renamed(artifacts: dict[str, Artifact], folder: Path, **changes: dict[str, Any]) -> Artifacts:
    """Copies of a run's artifacts with another name for its first class, and changes of records by kind."""
    for kind, artifact in artifacts.items():
        shutil.copytree(artifact.path, folder / kind)
        for path in (folder / kind).rglob("*"):
            if path.suffix in (".csv", ".json"):
                path.write_text(path.read_text().replace("harbour", HOSTILE))
    for kind, change in changes.items():
        name = {"control": "verdict.json", "classifier": "classifier.json"}[kind]
        write_record(folder / kind / name, read_record(folder / kind / name) | change)
    return Artifacts({kind: folder / kind for kind in artifacts})


def test_names_do_nothing_and_nothing_is_fetched(browser: Browser, whole_run: Run, tmp_path: Path) -> None:
    artifacts = renamed(whole_run[1], tmp_path / "artifacts")
    path = write_explorer(tmp_path, artifacts, title=f"salve: {HOSTILE}</script>", verdict=[HOSTILE])
    assert path is not None
    tab = browser.open(path, "#find=" + HOSTILE)
    tab("[...document.querySelectorAll('#list button')].forEach((one) => one.click())")
    assert tab("document.body.textContent").count("onerror") > 3
    assert tab("document.querySelectorAll('img[src=x]').length") == 0
    assert tab("document.title") != "hit"
    assert tab.complaints == []
    assert tab.requests == []
    # Were a name to become a tag, the policy would still stop its script, and what it loads.
    tab(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(HOSTILE)})")
    tab("new Promise((done) => setTimeout(done, 100))")
    assert tab("document.title") != "hit"
    assert any("Content Security Policy" in text for text in tab.complaints)


def test_outputs_in_another_order_belong_to_their_classes(browser: Browser, whole_run: Run, tmp_path: Path) -> None:
    backwards = list(range(9, -1, -1))
    artifacts = renamed(whole_run[1], tmp_path / "artifacts", classifier={"outputs": backwards})
    path = write_explorer(tmp_path, artifacts, title="backwards")
    assert path is not None
    tab, (edits,) = browser.open(path), drawn(1)
    wanted = python_logits(whole_run[1], edits).T.double().numpy()[backwards]
    found = numbers(tab, f"explorer.tail.logits({json.dumps(edits)})").reshape(wanted.shape)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    # The edit file is of the network, whose order stays: it says what the network is with the edit.
    said = tab(f"explorer.editFile({json.dumps(edits)})")
    saved = tmp_path / "artifacts" / "control" / "edits" / "saved.json"
    write_record(saved, said)
    assert load_edit_file(saved).after == said["after"] != said["before"]


def test_behind_other_tails_the_page_shows_what_was_measured(browser: Browser, whole_run: Run, tmp_path: Path) -> None:
    artifacts = renamed(whole_run[1], tmp_path / "artifacts", control={"images_sampled": 4})
    path = write_explorer(tmp_path, artifacts, title="inner")
    assert path is not None
    tab = browser.open(path)
    assert "not linear" in tab("document.getElementById('why').textContent")
    curves = whole_run[1]["control"].table("curves.csv")
    rows = curves[(curves["split"] == "test") & (curves["mode"] == "suppress") & (curves["target"] == "storm")]
    tab(
        "(() => { const choice = document.querySelector('#edits select'), { targets } = explorer.data.grid;"
        " choice.value = targets.findIndex((one) => one.target === 'storm' && one.mode === 'suppress');"
        " choice.dispatchEvent(new Event('change'));"
        " const slider = document.querySelector('#edits input');"
        " slider.value = 2; slider.dispatchEvent(new Event('input')); })()"
    )
    said = tab("document.getElementById('total').textContent")
    assert said.startswith(f"storm: {100 * rows['accuracy'].iloc[2]:.1f}")
    assert f"α = {rows['alpha'].iloc[2]:g}" in said
    assert tab("document.getElementById('save').hidden")
    assert tab.complaints == []


def test_behind_other_tails_the_confusion_matrix_is_that_of_the_strength_chosen(
    browser: Browser, whole_run: Run, tmp_path: Path
) -> None:
    artifacts = renamed(whole_run[1], tmp_path / "artifacts", control={"images_sampled": 4})
    path = write_explorer(tmp_path, artifacts, title="inner")
    assert path is not None
    tab, table = browser.open(path), whole_run[1]["control"].table("confusion.csv").fillna({"target": ""})
    classes = whole_run[1]["classifier"].record("classifier.json")["classes"]
    (name,) = set(table["target"]) - {""}
    tab(
        "(() => { const choice = document.querySelector('#edits select'), { targets } = explorer.data.grid;"
        f" choice.value = targets.findIndex((one) => one.target === {json.dumps(name)} && one.mode === 'suppress');"
        " choice.dispatchEvent(new Event('change')); })()"
    )
    shown = "[...document.querySelectorAll('#confusion td')].map((one) => parseInt(one.textContent) || 0)"
    for button, target in ((0, ""), (1, name)):
        tab(f"document.querySelectorAll('#matrix button')[{button}].click()")
        rows = table[table["target"] == target]
        wanted = {(row["true"], row["predicted"]): row["images"] for _, row in rows.iterrows()}
        assert tab(shown) == [wanted.get((true, predicted), 0) for true in classes for predicted in classes]
    used = whole_run[1]["control"].table("summary.csv").set_index("target").loc[name, "alpha_used"]
    assert f"α = {used:.3g}" in tab("document.getElementById('total').textContent")
    tab("(() => { const slider = document.querySelector('#edits input');"
        " slider.value = 1; slider.dispatchEvent(new Event('input')); })()")  # fmt: skip
    assert tab("document.getElementById('confusion').hidden")
    assert tab.complaints == []

# SPDX-License-Identifier: MIT
"""Write ``explorer.html``: one file that says what an edit would do, wherever it is opened."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from salve.artifacts import write_whole
from salve.report.explorer import NAME
from salve.report.explorer.latents import latents_of, pictures_of
from salve.report.explorer.packing import COARSE, FINE, json_for_script, packed, rounded
from salve.report.explorer.tail import MOST_LOGITS, LiveTail, linear_tail, measured_grid
from salve.report.tables import class_names
from salve.report.text import count_of, plural
from salve.results import Artifacts

#: Bytes of the page, at most, and those of them that are kept for pictures.
MOST_BYTES, FOR_PICTURES = 8_000_000, 400_000
HERE = Path(__file__).parent


def write_explorer(
    out: Path, artifacts: Artifacts, *, title: str, verdict: Sequence[str] = (), most_bytes: int = MOST_BYTES
) -> Path | None:
    """Write ``explorer.html`` of a run into a folder.

    Args:
        out: the folder. artifacts: of the run. title: of the page. verdict: its first sentences.
        most_bytes: of the page. Larger data are thinned, and the page says so.

    Returns:
        Its path; None, and no file, where there are no features to explore.
    """
    latents = latents_of(artifacts)
    if not latents:
        return None
    page = _rendered(title, data_of(artifacts, latents, verdict, most_bytes - _shell_size()))
    write_whole(out / NAME, page)
    return out / NAME


def data_of(artifacts: Artifacts, latents: Mapping[str, Any], verdict: Sequence[str], room: int) -> dict[str, Any]:
    """Everything that the page knows, within so many bytes of JSON, about."""
    record = artifacts.record("classifier", "classifier.json")
    data: dict[str, Any] = {
        "verdict": list(verdict),
        "classes": class_names(artifacts),
        "backbone": str(record.get("backbone", "")),
        "site": str(artifacts.record("activations", "activations.json").get("site", "")),
        "latents": latents,
        "map": artifacts.record("atlas", "atlas.json"),
        "notes": [],
    }
    if len(latents["latent"]) < latents["of"]:
        data["notes"].append(
            f"{count_of(len(latents['latent']))} of {plural(latents['of'], 'latent')} are here: those by which classes "
            "are edited, suspects, and those with the largest class means."
        )
    tail = linear_tail(artifacts)
    if isinstance(tail, str):
        data |= {"tail": None, "why": tail, "grid": measured_grid(artifacts)}
    else:
        left = room - FOR_PICTURES - len(json_for_script(data))
        data |= _live(artifacts, tail, latents, data["notes"], left)
    data["atlas"] = pictures_of(artifacts, room - len(json_for_script(data)))
    shown, there = len(data["atlas"].get("pictures", ())), data["atlas"].get("of", 0)
    if shown < there:
        data["notes"].append(f"{count_of(shown)} of {plural(there, 'picture')} are here.")
    return data


def _live(
    artifacts: Artifacts, tail: LiveTail, latents: Mapping[str, Any], notes: list[str], room: int
) -> dict[str, Any]:
    """What the page computes edited logits from: head, contributions and activations."""
    contributions = _contributions(artifacts, tail, latents)
    head = {
        "weight": packed(tail.weight),
        "bias": packed(tail.bias),
        "order": tail.order.tolist(),
        "contributions": packed(contributions),
        "file": tail.edit_file,
    }
    room -= len(json_for_script(head))
    most, error = MOST_LOGITS // len(tail.weight), FINE
    while True:
        chosen = tail.sample(most)
        part = rounded(tail.activations[chosen], tail.weight, error)
        planes = packed(part.planes)
        if len(planes) <= room or len(chosen) <= len(np.unique(tail.labels)):
            break
        if error == FINE:
            error = COARSE
        else:
            most = int(0.98 * len(chosen) * room / len(planes))
    if len(chosen) < len(tail.labels):
        notes.append(
            f"{count_of(len(chosen))} of {plural(len(tail.labels), 'test image')} are here, as large a share of each "
            "class; the report has the numbers of all."
        )
    strengths = artifacts.table("control", "curves.csv")["alpha"]
    return {
        "tail": head,
        "activations": {
            "planes": planes,
            "low": packed(part.low),
            "step": packed(part.step),
            "images": chosen.tolist(),
            "labels": tail.labels[chosen].tolist(),
        },
        "strongest": float(strengths[np.isfinite(strengths)].max()),
    }


def _contributions(artifacts: Artifacts, tail: LiveTail, latents: Mapping[str, Any]) -> np.ndarray:
    """Of each latent the vector ``[L, M]`` that its gate is made of, bit for bit as an edit file has it."""
    import torch

    from salve.editing.gating import contribution

    decoder = torch.from_numpy(artifacts.tensors("sae", "sae.safetensors")["decoder"]).float()
    scale, channels = tail.edit_file["scale"], tail.edit_file["channels"]
    pairs = zip(latents["latent"], latents["sign"], strict=True)
    return torch.stack([contribution(decoder, latent, scale, channels, sign) for latent, sign in pairs]).numpy()


def _shell_size() -> int:
    """Bytes of the page without its data, about."""
    files = ("explorer.html.j2", "explorer.css", "explorer.js")
    return sum((HERE / name).stat().st_size for name in files) + 4096


def _rendered(title: str, data: Mapping[str, Any]) -> str:
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("explorer.css", "explorer.js"))
    loader = jinja2.FileSystemLoader(HERE, encoding="utf-8")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # Only this style and this script, by their hashes; nothing is fetched from anywhere.
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    given = {"title": title, "policy": policy, "style": style, "script": script, "data": json_for_script(data)}
    return environment.get_template("explorer.html.j2").render(**given)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

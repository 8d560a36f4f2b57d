# SPDX-License-Identifier: MIT
"""What the explorer shows of each latent."""

import base64
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from salve.features.shown import shown_latents
from salve.report.explorer.packing import packed
from salve.report.tables import chosen_latents, class_names, column, records
from salve.report.text import is_missing
from salve.results import Artifacts

#: Latents with the most similar decoder columns that are listed for each.
NEAREST = 5
#: Columns of ``latents.csv`` that the explorer shows.
NUMBERS = ("share", "mean", "frequency", "purity", "entropy")
#: Columns of ``suspects.csv`` that the explorer shows.
OF_SUSPECTS = ("score", "effect", "lift", "separation", "off_object", "counterfactual")


def latents_of(artifacts: Artifacts) -> dict[str, Any]:
    """The latents that the page shows, and everything about each; empty where the features were not read."""
    table = artifacts.table("features", "latents.csv")
    decoder = artifacts.tensors("sae", "sae.safetensors").get("decoder")
    if not {"latent", "kind", "mean"} <= set(table.columns) or decoder is None:
        return {}
    owners = _owners(artifacts)
    suspects = artifacts.table("audit", "suspects.csv")
    first = [*owners, *(column(suspects, "latent").astype(int) if "latent" in suspects else ())]
    shown = shown_latents(column(table, "mean").to_numpy(), len(decoder), first)
    rows = table.set_index("latent").loc[shown]
    classes = class_names(artifacts)
    numbered = {name: k for k, name in enumerate(classes)}
    means = artifacts.tensors("features", "class_means.safetensors").get("class_means", np.zeros((0, 0), np.float32))
    histogram = artifacts.tensors("features", "histograms.safetensors")
    signs = [owners[latent][1] if latent in owners else int(sign) for latent, sign in rows["sign"].items()]
    return {
        "of": len(table),
        "latent": shown.tolist(),
        "kind": [str(kind) for kind in rows["kind"]],
        "dead": [not value > 0 for value in column(rows, "frequency")],
        "top": [numbered.get(str(name), -1) for name in rows["top_class"]],
        "classes": [
            [numbered[name] for name in str(names).split("; ") if name in numbered] for names in rows["classes"]
        ],
        "sign": signs,
        "owner": [owners[latent][0] if latent in owners else -1 for latent in shown.tolist()],
        **{name: [_rounded(value) for value in column(rows, name)] for name in NUMBERS},
        "nearest": _nearest(decoder, shown),
        "concepts": _concepts(artifacts),
        "suspects": _suspects(suspects, numbered),
        "means": packed(means[:, shown].T.astype(np.float16)) if len(means) == len(classes) else "",
        "counts": packed(histogram["counts"][shown].astype(np.uint32)) if "counts" in histogram else "",
        "edges": histogram["edges"].tolist() if "edges" in histogram else [],
    }


def _owners(artifacts: Artifacts) -> dict[int, tuple[int, int]]:
    """By latent, the class that is edited by it, the first one, and its sign there."""
    numbered = {name: k for k, name in enumerate(class_names(artifacts))}
    owners: dict[int, tuple[int, int]] = {}
    for name, row in chosen_latents(artifacts).items():
        if not is_missing(row.get("latent")) and name in numbered:
            owners.setdefault(int(row["latent"]), (numbered[name], int(row["sign"])))
    return owners


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _nearest(decoder: NDArray[np.float32], shown: NDArray[np.int64]) -> list[list[list[float]]]:
    """Of each latent, those with the largest cosine in absolute value: ``[[latent, cosine], …]``."""
    columns = decoder[:, shown].T
    units = columns / np.maximum(np.linalg.norm(columns, axis=1, keepdims=True), 1e-12)
    cosine = units @ units.T
    np.fill_diagonal(cosine, 0)
    order = np.argsort(-np.abs(cosine), axis=1, kind="stable")[:, : min(NEAREST, len(shown) - 1)]
    return [
        [[int(shown[other]), round(float(cosine[one, other]), 3)] for other in others]
        for one, others in enumerate(order)
    ]


def _concepts(artifacts: Artifacts) -> list[dict[str, Any]]:
    table = artifacts.table("features", "concepts.csv")
    if "auroc" not in table:
        return []
    return [
        {"concept": str(row["concept"]), "latent": int(row["latent"]), "auroc": _rounded(float(row["auroc"]))}
        for row in records(table)
        if not is_missing(row["latent"]) and not is_missing(row["auroc"])
    ]


def _suspects(table: pd.DataFrame, numbered: dict[str, int]) -> list[dict[str, Any]]:
    """The suspects of all classes, those with the highest scores first."""
    if not {"class", "latent", "score"} <= set(table.columns):
        return []
    found = []
    for row in records(table.sort_values("score", ascending=False, kind="stable")):
        if row["class"] in numbered and float(row["score"]) > 0:
            known = {name: _rounded(float(row[name])) for name in OF_SUSPECTS if not is_missing(row.get(name))}
            facts = {"latent": int(row["latent"]), "class": numbered[row["class"]], "rank": int(row["rank"])}
            found.append({**facts, **known, "value": str(row.get("value", ""))})
    return found


def pictures_of(artifacts: Artifacts, room: int) -> dict[str, Any]:
    """The images that excite the latents most, as many pictures as there is room for, and the latents' maps.

    Args:
        artifacts: of the run. room: bytes of the page that they may take.
    """
    table, kept = artifacts.table("atlas", "top.csv"), artifacts.tensors("atlas", "pictures.safetensors")
    if "image" not in table or "images" not in kept:
        return {}
    numbered = {name: k for k, name in enumerate(class_names(artifacts))}
    top = {
        int(latent): [
            [int(row["image"]), numbered.get(str(row["class"]), -1), _rounded(row["value"])] for row in records(rows)
        ]
        for latent, rows in table.groupby("latent", sort=False)
    }
    maps = {"mapped": kept["latents"].tolist(), "maps": packed(kept["maps"])} if "maps" in kept else {}
    room -= len(maps.get("maps", "")) + 100 * len(table)
    pictures, at = {}, 0
    for image, end in zip(kept["images"].tolist(), kept["ends"].tolist(), strict=True):
        text = base64.b64encode(kept["bytes"][at:end].tobytes()).decode()
        at, room = end, room - len(text) - 12
        if room < 0:
            break
        pictures[image] = text
    shape = list(kept["maps"].shape[1:]) if maps else []
    return {"top": top, "pictures": pictures, "of": len(kept["images"]), "shape": shape, **maps}

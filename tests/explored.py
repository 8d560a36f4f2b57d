"""Artifacts of a run that never was, of any size: what the explorer is made of, without a training."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from salve.artifacts import save_tensors, write_record, write_table
from salve.backbones.site import Reader, Site
from salve.editing import Edit, make_edit_files, save_edit_file
from salve.results import Artifacts
from salve.sae import make_sae
from salve.sae.io import save_sae


def write_artifacts(folder: Path, classes: int, images: int, latents: int, width: int) -> Artifacts:
    """Artifacts of a run of random data."""
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    names = [f"class {k}" for k in range(classes)]
    labels = np.repeat(np.arange(classes), images)
    centres = random.exponential(0.5, (classes, width))
    rows = (random.exponential(1.0, (len(labels), width)) * (0.4 + centres[labels])).astype(np.float32)
    head = nn.Linear(width, classes)
    model = nn.ModuleDict({"fc": head})
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy((centres - centres.mean(axis=0)) * 0.15))
    sae = make_sae("linear_l1", width, latents)
    means = np.stack([sae.encode(torch.from_numpy(rows[labels == k])).mean(dim=0).detach() for k in range(classes)])
    for kind in ("classifier", "activations", "sae", "features", "control", "atlas"):
        (folder / kind).mkdir(parents=True)
    write_record(folder / "classifier" / "classifier.json", {"classes": names, "backbone": "random"})
    save_tensors(folder / "classifier" / "model.safetensors", model.state_dict())
    write_record(folder / "activations" / "activations.json", {"site": "avgpool", "width": width})
    tensors = {"activations": torch.from_numpy(rows), "labels": torch.from_numpy(labels)}
    save_tensors(folder / "activations" / "test-00000.safetensors", tensors)
    save_sae(folder / "sae" / "sae.safetensors", sae)
    top = np.abs(means).argmax(axis=0)
    table: dict[str, Any] = {
        "latent": range(latents),
        "kind": "diffuse",
        "classes": "",
        "top_class": [names[k] for k in top],
    }
    table |= {"share": 0.3, "mean": means[top, range(latents)], "sign": 1, "frequency": 0.2, "purity": 0.9}
    write_table(folder / "features" / "latents.csv", pd.DataFrame({**table, "entropy": 1.0}))
    save_tensors(folder / "features" / "class_means.safetensors", {"class_means": torch.from_numpy(means)})
    counts = torch.from_numpy(random.integers(0, 900, (latents, 52)))
    edges = torch.logspace(-4, 1, 51, dtype=torch.float64)
    save_tensors(folder / "features" / "histograms.safetensors", {"counts": counts, "edges": edges})
    site = Site("avgpool", (Reader("fc.weight"),), width)
    (one,) = make_edit_files(model, site, sae, [("class 0", [Edit(0, 1.0)])], "random")
    (folder / "control" / "edits").mkdir()
    save_edit_file(one, folder / "control" / "edits" / "00-class-0.json")
    write_record(folder / "control" / "verdict.json", {"judged": 0})
    write_table(folder / "control" / "curves.csv", pd.DataFrame({"alpha": [0.0, 32.0]}))
    listed = [
        (latent, rank, int(image), names[labels[image]], 1.0)
        for latent in range(latents)
        for rank, image in enumerate(rows[:, latent % width].argsort()[-6:])
    ]
    write_table(
        folder / "atlas" / "top.csv", pd.DataFrame(listed, columns=["latent", "rank", "image", "class", "value"])
    )
    chosen = list(dict.fromkeys(image for _, _, image, *_ in listed))[:1200]
    smooth = random.integers(0, 255, (len(chosen), 9, 9, 3)).astype(np.uint8)
    written = []
    for pixels in smooth:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(file, "WEBP", quality=55)
        written.append(file.getvalue())
    pictures = {"bytes": torch.tensor(list(b"".join(written)), dtype=torch.uint8), "images": torch.tensor(chosen)}
    pictures |= {"ends": torch.tensor([len(one) for one in written]).cumsum(0), "latents": torch.arange(latents)}
    maps = torch.from_numpy(random.integers(0, 255, (latents, 3, 3, 3)).astype(np.float32))
    pictures["maps"] = nn.functional.interpolate(maps, size=12, mode="bilinear").to(torch.uint8)
    save_tensors(folder / "atlas" / "pictures.safetensors", pictures)
    write_record(folder / "atlas" / "atlas.json", {"kind": "grad_fam", "why_none": ""})
    return Artifacts({path.name: path for path in folder.iterdir()})

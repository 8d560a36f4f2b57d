"""How large the explorer is, how soon it paints, and how fast it follows a slider, in the installed Chromium.

    python -m benchmarks.explorer                      # 10 classes × 500 images × 256 latents of 512 channels
    python -m benchmarks.explorer --classes 100 --images 100

The data are random, of the shape and the sizes that a ResNet-18's are. Slider: from the event to the finished layout,
while one latent goes through all stops, forwards and in leaps.
"""

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from salve.artifacts import save_tensors, write_record, write_table
from salve.backbones.site import Reader, Site
from salve.editing import Edit, make_edit_files, save_edit_file
from salve.report.explorer.page import write_explorer
from salve.results import Artifacts
from salve.sae import make_sae
from salve.sae.io import save_sae
from tests.browser import Browser

#: Moves one latent's slider through all stops, and gives the milliseconds of each step.
MOVES = """
(async () => {
  const slider = document.querySelector('#edits input[type=range]'), took = [];
  const pressed = performance.now();
  slider.dispatchEvent(new Event('pointerdown'));
  const press = [performance.now() - pressed];
  const to = (stop) => {
    const start = performance.now();
    slider.value = stop;
    slider.dispatchEvent(new Event('input', { bubbles: true }));
    explorer.redraw();
    document.body.getBoundingClientRect();
    took.push(performance.now() - start);
    return new Promise(requestAnimationFrame);
  };
  for (let stop = 0; stop <= 400; stop += 4) await to(stop);
  const steps = took.splice(0);
  for (let i = 0; i < 40; i++) await to((i * 167) % 401);
  return { press, steps, leaps: took };
})()
"""


def write_artifacts(folder: Path, classes: int, images: int, latents: int, width: int) -> Artifacts:
    """Artifacts of a run of random data."""
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    names = [f"class {k}" for k in range(classes)]
    labels = np.repeat(np.arange(classes), images)
    centres = random.exponential(0.5, (classes, width))
    rows = (random.exponential(1.0, (len(labels), width)) * (0.4 + centres[labels])).astype(np.float32)
    model = nn.ModuleDict({"fc": nn.Linear(width, classes)})
    with torch.no_grad():
        model["fc"].weight.copy_(torch.from_numpy((centres - centres.mean(axis=0)) * 0.15))
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
    table = {"latent": range(latents), "kind": "diffuse", "classes": "", "top_class": [names[k] for k in top]}
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
        (a, r, int(i), names[labels[i]], 1.0) for a in range(latents) for r, i in enumerate(rows[:, a].argsort()[-6:])
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


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("classes", 10), ("images", 500), ("latents", 256), ("width", 512)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"how many; {default} if not given")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, Browser() as browser:
        artifacts = write_artifacts(
            Path(temporary) / "artifacts", given.classes, given.images, given.latents, given.width
        )
        start = time.perf_counter()
        path = write_explorer(Path(temporary), artifacts, title="benchmark")
        assert path is not None
        print(f"{given.classes} classes × {given.images} images × {given.latents} latents, {given.width} channels")
        print(f"written in {time.perf_counter() - start:.1f} s: {path.stat().st_size / 1e6:.2f} MB")
        tab = browser.open(path)
        print(f"browser: {browser.send('Browser.getVersion')['product']}")
        for note in tab("explorer.data.notes"):
            print(f"thinned: {note}")
        paint = tab("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        ready = tab("performance.getEntriesByName('ready')[0].startTime")
        print(f"first paint {paint:.0f} ms, ready {ready:.0f} ms")
        tab("document.querySelectorAll('#list button')[7].click()")  # another latent, for which nothing is prepared
        for name, found in tab(MOVES).items():
            print(
                f"slider, {name}: median {np.median(found):.1f} ms, 95 % {np.quantile(found, 0.95):.1f} ms, longest {max(found):.1f} ms"
            )
        print(json.dumps({"images": tab("explorer.tail.N"), "requests": tab.requests, "complaints": tab.complaints}))


if __name__ == "__main__":
    main()

# %% [markdown]
# # A tour of the Python API
#
# A run is made by the command `salve`. Python reads what it left, and works on its tensors. This notebook makes a run
# on drawn scenes, and then looks for one class in the network: which latent carries it, where that latent looks, and
# what is left when its direction is taken out of the weights.
#
# You will see that **the edit is a change of the weights**: the network that comes out is an ordinary one, and the
# edit can be taken back bit for bit.

# %%
import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

import salve
from salve.backbones import LinearTail, find_site, load_backbone, preset, site_activations
from salve.data import ConceptsData
from salve.results import Run

SMALLER = os.environ.get("SALVE_NOTEBOOK_SETTINGS", "").split()  # tests make everything smaller with it


def made(name: str, *settings: str) -> Run:
    """Make a run, or find it finished; its folder is read with `salve.open_run`."""
    always = [f"name={name}", "output_dir=outputs/notebooks", "trainer=cpu"]  # on the CPU, so that numbers are these
    command = [sys.executable, "-m", "salve", *always, *settings, *SMALLER]
    subprocess.run(command, check=True, capture_output=True)
    return salve.open_run(max(Path("outputs/notebooks/runs", name).iterdir()))


run = made("tour", "sae=topk", "stages=[discover,control,diagnose,report]")
print(run.state, "-", ", ".join(run.artifacts))

# %% [markdown]
# ## Numbers and tables
#
# `run.metrics` holds the numbers of a run, all of test images unless they begin with `select_`. Artifacts have
# tables, which are pandas'.

# %%
for name in ("test_accuracy", "fve", "l0", "separating"):
    print(f"{name}: {run.metrics[name]:.3g}")
summary = run.table("control", "summary.csv")
columns = ["target", "latents", "alpha_used", "accuracy_before", "accuracy_after", "others_mean_change", "separates"]
print(summary[columns].round(2).to_string(index=False))

# %% [markdown]
# Each row is one edit: the latent of a class is suppressed with the strength that select images favour, and test
# images say what the class and the others lose. Some classes go alone and some take others along (`separates`). We go
# on with the cleanest edit, by select images: what is chosen and what is reported must not be measured on the same
# images.

# %%
lost = summary["select_accuracy_before"] - summary["select_accuracy_after"] - summary["select_others_mean_change"]
row = summary.loc[lost.idxmax()]
target, latent = str(row["target"]), int(row["latents"])
print(f"{target}: latent {latent}")

# %% [markdown]
# ## The network, its images and its SAE as tensors
#
# The network is loaded from the run's own weights. A *site* is a place in it where activations are read; the SAE
# takes them apart into latents.

# %%
backbone = run.settings["backbone"]
weights = str(run.artifact("classifier").file("model.safetensors"))
given = (backbone["library"], backbone["name"])
model = load_backbone(*given, weights, len(run.classes), backbone["args"]).model.eval()
data = ConceptsData(**{name: value for name, value in run.settings["data"].items() if name != "_target_"})
prepared = preset(*given, "random", model, data.native_size, {}, backbone["args"]).preprocess
data.bind(prepared)
site = find_site(model, "last")

batches = list(data.loader("test", batch_size=64))
images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
with torch.no_grad():
    activations = torch.cat([site_activations(model, site, part) for part, _ in batches])  # [N, M]
    latents = run.sae.encode(activations)  # [N, d]
stored, _ = run.activations("test")
print(f"{site.name}: activations {list(activations.shape)}, latents {list(latents.shape)}")
print("the same as those of the run:", torch.allclose(activations, stored[:], atol=1e-4))

# %% [markdown]
# ## Where the latent looks
#
# Grad-FAM shows where in an image a latent comes from. These are the images in which it is largest: it looks at the
# object, and not everywhere.

# %%
sign = 1 if latents[:, latent].abs().max() == latents[:, latent].max() else -1
top = (sign * latents[:, latent]).argsort(descending=True)[:5]
signs = torch.tensor([sign])
maps = salve.saliency.grad_fam(model, "last", run.sae, images[top], [latent], signs=signs)  # [N, 1, H, W]
figure, axes = plt.subplots(2, 5, figsize=(10, 4.4))
for column, number in enumerate(top.tolist()):
    picture = prepared.denormalise(images[number : number + 1])[0].permute(1, 2, 0)
    for axis in axes[:, column]:
        axis.imshow(picture)
        axis.axis("off")
    axes[0, column].set_title(run.classes[int(labels[number])], fontsize=9)
    axes[1, column].imshow(maps[column, 0], alpha=0.6, cmap="inferno")
figure.suptitle(f"Latent {latent}, the one of {target}: the images in which it is largest, and where it comes from")
plt.show()

# %% [markdown]
# ## Suppress it
#
# A gate scales each channel down by how much the latent's decoder column uses it, with a strength α. Logits at all
# strengths share two matrix products, so a whole curve takes no longer than a few passes over the head.

# %%
head: Any = model.get_submodule(site.readers[0].path)
tail = LinearTail(head.weight.detach(), head.bias.detach())
direction = run.sae.decoder[:, latent].detach()  # [M]
alphas = torch.linspace(0, 20, 81)
logits = salve.editing.edited_logits(tail, activations, direction, alphas, "suppress")  # [K, N, C]
right = (logits.argmax(dim=2) == labels).float()
own = labels == run.classes.index(target)
figure, axis = plt.subplots(figsize=(6, 3.2))
axis.plot(alphas, 100 * right[:, own].mean(dim=1), color="tab:orange", label=target)
axis.plot(alphas, 100 * right[:, ~own].mean(dim=1), color="tab:blue", label="the other classes")
axis.axvline(row["alpha_used"], color="grey", linestyle=":", label="the strength that select images chose")
axis.set(xlabel="strength α", ylabel="accuracy on test images [%]", ylim=(-3, 103))
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## The edit is a change of the weights
#
# The run saved each edit as a file. Applied, it gives a plain `state_dict`: no SAE, no hook. Undone, it gives back
# the same bits.

# %%
path = next(path for path in run.edits if salve.editing.load_edit_file(path).edits[0].latent == latent)
edit = salve.editing.load_edit_file(path)
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
edited = salve.editing.apply_edit_file(edit, before)
changed = [name for name in before if not torch.equal(before[name], edited[name])]
network = copy.deepcopy(model)
network.load_state_dict(edited)
with torch.no_grad():
    predicted = torch.cat([network(part) for part, _ in batches]).argmax(dim=1)
after = float((predicted == labels)[own].float().mean())
undone = salve.editing.undo_edit_file(edit, edited)
print(f"changed: {changed}")
print(f"accuracy of {target} through the edited network: {after:.3f}; the run's table says {row['accuracy_after']:.3f}")
print("the same bits after undoing it:", all(torch.equal(before[name], undone[name]) for name in before))

# %% [markdown]
# ## How far is each image from losing its class?
#
# The critical strength of an image is the α at which its class gives way. Behind a linear head it is exact.

# %%
critical = salve.diagnosis.critical_strength(tail, activations[own], direction, labels[own], "flip", "exact")
finite = critical[critical.isfinite()]
print(f"{len(finite)} of {int(own.sum())} images give way; half of these at α = {float(finite.median()):.2f} or before")

# %% [markdown]
# **What to take away.** A run's tables, tensors and edits are plain pandas and torch. One direction carried this
# class, and the network without it is an ordinary `state_dict`. Next: [repair a shortcut](repair_a_shortcut.md),
# [compare two methods](compare_two_methods.md), [results in Python](../python.md).

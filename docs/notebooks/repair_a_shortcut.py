# %% [markdown]
# # Repair a shortcut
#
# Nearly all clinics in these scenes bear a tag in a corner, and three in ten train images lack the cross that makes a
# clinic. A network that is trained on them learns to read the tag. Its accuracy looks fine.
#
# You will see **that accuracy hides the shortcut, what shows it, and what a repair costs.**

# %%
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import salve
from salve.backbones import load_backbone, preset
from salve.data import ConceptsData
from salve.results import Run

SMALLER = os.environ.get("SALVE_NOTEBOOK_SETTINGS", "").split()  # tests make everything smaller with it


def made(name: str, *settings: str) -> Run:
    """Make a run, or find it finished; its folder is read with `salve.open_run`."""
    always = [f"name={name}", "output_dir=outputs/notebooks", "trainer=cpu"]  # on the CPU, so that numbers are these
    command = [sys.executable, "-m", "salve", *always, *settings, *SMALLER]
    subprocess.run(command, check=True, capture_output=True)
    return salve.open_run(max(Path("outputs/notebooks/runs", name).iterdir()))


run = made("repair", "experiment=repair/quickstart")
record = run.record("repair", "repair.json")
print(f"accuracy on test images: {100 * run.metrics['test_accuracy']:.1f} %")

# %% [markdown]
# ## The same scene, with and without the tag
#
# The drawn scenes can be drawn again with the tag added or left out, and with nothing else changed. If the prediction
# changes, the tag changed it. No label is needed for this, and no group.

# %%
backbone = run.settings["backbone"]
weights = str(run.artifact("classifier").file("model.safetensors"))
given = (backbone["library"], backbone["name"])
model = load_backbone(*given, weights, len(run.classes), backbone["args"]).model.eval()
data = ConceptsData(**{name: value for name, value in run.settings["data"].items() if name != "_target_"})
prepared = preset(*given, "random", model, data.native_size, {}, backbone["args"]).preprocess
data.bind(prepared)
pairs, transform = data.pairs("test"), prepared.eval_transform()


def predictions(network: torch.nn.Module) -> torch.Tensor:
    """Predicted classes `[2, N]` of the test scenes, without the tag and with it."""
    with torch.no_grad():
        sides = [
            torch.cat([network(transform(side[i][0])[None]).argmax(dim=1) for i in range(len(side))])
            for side in (pairs.without, pairs.with_mark)
        ]
    return torch.stack(sides)


without, with_tag = predictions(model)
turned = torch.nonzero(without != with_tag)[:4, 0].tolist()
print(f"the tag changes {100 * float((without != with_tag).float().mean()):.1f} % of the predictions")
figure, axes = plt.subplots(2, 4, figsize=(8, 4.4), squeeze=False)
for axis in axes.flat:
    axis.axis("off")
for column, number in enumerate(turned):
    for axis, side, found in zip(axes[:, column], (pairs.without, pairs.with_mark), (without, with_tag), strict=True):
        axis.imshow(prepared.denormalise(transform(side[number][0])[None])[0].permute(1, 2, 0))
        axis.set_title(f"taken for: {run.classes[int(found[number])]}", fontsize=8)
figure.suptitle("The same scenes without the tag (above) and with it (below)")
plt.show()

# %% [markdown]
# ## What the network relies on
#
# The audit lists for each class the latents that push images towards it which are not of it. With 25 labelled images
# of each group it knows which of them tell the tag. For clinics one latent leads by far:

# %%
suspects = run.table("audit", "suspects.csv")
print(suspects[suspects["class"] == "clinic"].iloc[:3, :6].round(3).to_string(index=False))

# %% [markdown]
# ## The repair, and what else would do
#
# The repair tries methods and strengths on select images, and keeps the one whose worst group is best. Test images,
# used for nothing before, say what it did. *Biases alone* needs no SAE and no edit: a repair is worth something only
# where it beats that.

# %%
states = {"before": "before", "recalibrated": "biases alone", "after": "repaired"}
measures = {"worst_group": "worst group", "average": "average"}
figure, axis = plt.subplots(figsize=(6.5, 3.2))
places = np.arange(len(measures))
for number, (state, name) in enumerate(states.items()):
    heights = [100 * record.get(f"{measure}_{state}", np.nan) for measure in measures]
    axis.bar(places + 0.27 * (number - 1), heights, 0.25, label=name)
axis.set_xticks(places, [*measures.values()])
axis.set(ylabel="accuracy on test images [%]", ylim=(0, 100))
axis.legend(fontsize=8)
plt.show()
method = record.get("method", "nothing")
print(f"chosen on select images: {method}")
print(f"changed by the tag: {100 * record['counterfactual_flips_before']:.1f} % before, ", end="")
print(f"{100 * record['counterfactual_flips_after']:.1f} % after")

# %% [markdown]
# ## Check it yourself
#
# The repaired weights are a plain `state_dict`. Loaded into the same network, they give the run's own number.

# %%
repaired = run.tensors("repair", "repaired.safetensors")
model.load_state_dict(repaired)
without, with_tag = predictions(model)
print(f"measured here: the tag changes {100 * float((without != with_tag).float().mean()):.1f} % of the predictions")

# %% [markdown]
# **What to take away.** Accuracy on images like the train images says nothing about a shortcut; images without and
# with the mark do. With a few labels, training the head anew on balanced groups (`dfr`) repaired best, and the
# average paid for it: what the tag gave away is lost. [Repair](../repair.md) goes on from here, and
# [Results](../results.md) has five seeds and the rivals.

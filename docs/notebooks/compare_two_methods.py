# %% [markdown]
# # Compare two methods
#
# Does an edit through an SAE take a class away more cleanly than a weaker row of the head? Both have a strength α,
# but α = 1 means another thing for each. So they are compared **where they have the same effect**: at the strength at
# which the class is at 5 % of select images. What counts is then what the other classes lose on test images.
#
# You will see **that strengths cannot be compared, and why a control belongs into every comparison.**

# %%
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import salve
from salve.results import Run

SMALLER = os.environ.get("SALVE_NOTEBOOK_SETTINGS", "").split()  # tests make everything smaller with it


def made(name: str, *settings: str) -> Run:
    """Make a run, or find it finished; its folder is read with `salve.open_run`."""
    always = [f"name={name}", "output_dir=outputs/notebooks", "trainer=cpu"]  # on the CPU, so that numbers are these
    command = [sys.executable, "-m", "salve", *always, *settings, *SMALLER]
    subprocess.run(command, check=True, capture_output=True)
    return salve.open_run(max(Path("outputs/notebooks/runs", name).iterdir()))


# %% [markdown]
# The gate suppresses the latent of a class, `head_row` weakens the row of the head that the class has anyway, and
# `random_gate` is a control: the same gate along a direction that means nothing.

# %%
METHODS = {"gate": "tab:orange", "head_row": "tab:blue", "random_gate": "tab:grey"}
run = made("compare", "sae=topk", "stages=[compare]", f"compare.methods=[{','.join(METHODS)}]")
edits = run.table("compare", "edits.csv")
columns = ["method", "class", "alpha", "reached", "before", "after", "drift", "worst_loss"]
print(edits[edits["class"].isin(run.classes[:3])][columns].round(3).to_string(index=False))

# %% [markdown]
# ## Strengths
#
# The strength at which a class is down to 5 % differs by method and by class. A table of "accuracy at α = 1" would
# compare nothing.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for number, (method, colour) in enumerate(METHODS.items()):
    rows = edits[edits["method"] == method].set_index("class").reindex(run.classes)
    places = np.arange(len(rows)) + 0.2 * (number - 1)
    reached = rows["reached"].astype(bool).to_numpy()
    left.plot(rows["alpha"].where(reached), places, "o", color=colour, label=method, markersize=5)
    right.plot(100 * rows["drift"].where(reached), places, "o", color=colour, markersize=5)
left.set(xscale="log", xlabel="strength at which the class is at 5 %")
left.set_yticks(range(len(run.classes)), run.classes, fontsize=8)
left.legend(fontsize=8)
right.set(xlabel="then: mean change of the other classes [points]", xlim=(0, None))
plt.show()

# %% [markdown]
# ## What the others lose
#
# On the right is what is left to compare. In numbers, over the classes that both methods take away, and what the
# control does:

# %%
wide = edits.pivot_table(index="class", columns="method", values="reached", aggfunc="min").astype(bool)
common = wide.index[wide["gate"] & wide["head_row"]]
print(f"taken away by both: {len(common)} of {len(wide)} classes")
for method in ("gate", "head_row"):
    drift = edits.loc[(edits["method"] == method) & edits["class"].isin(common), "drift"]
    shown = f"{100 * drift.mean():.1f} points" if len(drift) else "-"
    print(f"{method}: the accuracy of another class changes by {shown}, in the mean")
control = edits[(edits["method"] == "random_gate") & edits["reached"]]
print(f"random_gate takes {len(control)} of {len(wide)} classes away,", end=" ")
print("the others change by " + ", ".join(f"{100 * drift:.0f}" for drift in control["drift"]) + " points")

# %% [markdown]
# **What to take away.** Compare edits at a matched effect, on images that chose nothing, and beside a control. The
# control says that the latent's direction matters: a random one takes hardly any class away, and not cleanly. The
# rival says that the gate is not the cleanest edit at the last site: each class has a row of the head to itself
# there, and weakening it leaves the others alone. [Compare methods](../compare.md) has twenty of them, and [Which
# edit, and when](../which_edit.md) says what we found on photographs.

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
    command = [sys.executable, "-m", "salve", f"name={name}", "output_dir=outputs/notebooks", *settings, *SMALLER]
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
# On the right is what is left to compare. In numbers, over the classes that every method takes away:

# %%
reached = edits.pivot_table(index="class", columns="method", values="reached", aggfunc="min").astype(bool)
common = reached.index[reached.all(axis=1)]
print(f"taken away by all three: {len(common)} of {len(run.classes)} classes")
for method in METHODS:
    mine = edits[(edits["method"] == method) & edits["class"].isin(common)]
    taken = int(edits.loc[edits["method"] == method, "reached"].sum())
    drift = f"{100 * mine['drift'].mean():.1f} points" if len(mine) else "-"
    print(f"{method}: takes {taken} classes away; the others change by {drift} on these")

# %% [markdown]
# **What to take away.** Compare edits at a matched effect, on images that chose nothing, and beside a control. At the
# last layer a weaker row of the head is a strong rival, since the class has a row of its own there. [Compare
# methods](../compare.md) has twenty of them, and [Which edit, and when](../which_edit.md) what we found on
# photographs.

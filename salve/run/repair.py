# SPDX-License-Identifier: MIT
"""``salve repair …``: audit a network, take out what it should not rely on, and report what it relies on then."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from salve.run.folder import RunFolder
from salve.run.rerun import callers_own, run_again
from salve.types import UserError

#: Stages whose runs are called after them where nothing else names them, the last one of a run first.
NAMING = ("repair", "audit")
#: Names of runs that nobody named. A repair that goes on from one is called a repair.
UNNAMED = ("quickstart", "audit")
#: What the command runs. What these stages need is made first, or found.
STAGES = "stages=[audit,repair,report]"

HELP = """\
usage: salve repair [FOLDER] [key=value ...]

Find what a network relies on and should not, such as a tag or the background; take it out of the weights; measure, on
test images that were used for nothing else, what the network relies on then. It is salve stages=[audit,repair,report].

What it needs
  A network and images, as salve itself does (salve --help), or the FOLDER of a run, whose settings and finished work it
  takes over. What is missing is made first: a classifier, its activations, an SAE.
  A few labels. Where the data know an attribute beside the class, the repair chooses by itself what to take out:
    data.groups=FILE    a CSV file with the columns file, class and one attribute, such as place
    mark=text           a mark that salve puts on the images, to try it out
    data=waterbirds, data=celeba, data=table, and the drawn scenes know one
  audit.labels=25 images of each class and value are looked at, drawn from the select images.
  Without labels, look first and then name what the network should not rely on:
    salve stages=[audit,report] audit.labels=0 ...
    salve repair audit.labels=0 'repair.suspects={church: [37, 45]}' ...

What it may cost
  repair.max_accuracy_loss=0.005   how much of the accuracy on select images may be lost; and with labels,
                                   of the average that weighs groups as the train images have them,
                                   as far as the labelled images can tell: less a standard error
  A repair is kept only if the worst group of the labelled images gains, and their mean over groups more than twice
  the standard error of that gain; without labels, if the images nearest to the classes are taken for them less, by more
  than twice the error of that. If none is, the network stays as it was, and the command says so.

What it writes
  A run like any other (outputs/runs/<name>/<time>: the page, tables, metrics.json), and in the artifact `repair`
    repaired.safetensors   a plain state_dict, which needs neither salve nor an SAE
    edits/                 edit files, which `salve-edit undo` takes out again, bit for bit
    changed.csv            the test images whose prediction changes, to look at
  It ends with four rows: the network before, with new biases alone, with the edit alone, and repaired.

Examples
  salve repair experiment=repair/quickstart
  salve repair outputs/runs/quickstart/<time>
  salve repair data=folder data.root=my/images data.groups=my/places.csv backbone=resnet18 backbone.weights=mine.pt
  salve repair experiment=repair/quickstart repair.max_accuracy_loss=0.01 repair.methods=[leace,gate]
  salve repair -m experiment=repair/quickstart seed=0,1,2

conf/config.yaml explains every setting of `audit` and `repair`, and docs/repair.md tells the whole story.
"""


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether the arguments behind ``repair`` ask what the command does."""
    return bool({"-h", "--help", "help"} & set(arguments))


def run_folder(arguments: Sequence[str]) -> Path | None:
    """The run that the command goes on from, which stands before all settings; None if there is none.

    Raises:
        UserError: the first argument is neither a setting, an option nor a folder.
    """
    first = arguments[0] if arguments else ""
    if not first or "=" in first or first.startswith(("-", "+", "~")):
        return None
    if not Path(first).is_dir():
        raise UserError(
            f"salve repair {first}: there is no folder {first}; give the folder of a run, or settings as key=value "
            "(salve repair --help)."
        )
    return Path(first)


def overrides(arguments: Sequence[str]) -> list[str]:
    """What Hydra is given: the arguments behind ``repair``, with the stages, and a name where nothing gives one."""
    staged = any(argument.startswith("stages=") for argument in arguments)
    return [*([] if staged else [STAGES]), *name_of(arguments if staged else [STAGES, *arguments]), *arguments]


def name_of(arguments: Sequence[str]) -> list[str]:
    """The name of a run whose stages are given, and include an audit or a repair: as a setting, or none where the
    arguments name it, a recipe or a configuration of one's own. Else it would be called as the default run is."""
    keys = [argument.partition("=")[0].lstrip("+") for argument in arguments]
    own = any(
        key in ("name", "experiment", "rerun") or key.startswith(("--config", "-cn", "-cp", "-cd")) for key in keys
    )
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith("stages=")]
    stages = given[-1].strip("[]").replace(" ", "").split(",") if given else []
    return [] if own else [f"name={stage}" for stage in NAMING if stage in stages][:1]


def repair_run(folder: Path, arguments: Sequence[str], console: Console) -> Path:
    """Go on from a run: its network, data and SAE, and the settings that the command changes.

    Results go to the folder of results that the run lies in, so that its work is found, unless the command says
    otherwise. What else the folder of somebody else may decide, see :func:`salve.run.rerun.rerun`.

    Args:
        folder: of the run. arguments: ``key=value``, behind the folder. console: where progress and results are shown.

    Returns:
        The folder of the new run.

    Raises:
        UserError: there is no such run, or see :func:`salve.run.stored.stored_settings`.
    """
    instead = callers_own()
    instead["output_dir"] = str(home_of(folder) or instead["output_dir"])
    staged = any(argument.startswith("stages=") for argument in arguments)
    changes = [*([] if staged else [STAGES]), *arguments]
    command = "salve repair " + shlex.join([str(folder), *arguments])
    config = RunFolder(folder).settings(changes, instead=instead)
    if config.name in UNNAMED and not any(argument.startswith("name=") for argument in arguments):
        config = replace(config, name=NAMING[0])
    return run_again(config, command, console)


def home_of(folder: Path) -> Path | None:
    """The folder of results that a run lies in, above its ``runs`` or ``sweeps``; None if it lies elsewhere."""
    for above in folder.resolve().parents:
        if above.name in ("runs", "sweeps") and (above.parent / "artifacts").is_dir():
            return above.parent
    return None

"""Which folder serves which split, and one held-out set divided in two: images that choose, and images that report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from salve.data.naming import listing
from salve.data.walk import subfolders
from salve.types import Split, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HELD_OUT = ("select", "val", "test")
LAYOUTS: dict[tuple[str, ...], dict[str, str]] = {
    ("select", "test"): {"select": "select", "test": "test"},
    ("val", "test"): {"select": "val", "test": "test"},
    ("val",): {"select": "val", "test": "val"},
    ("test",): {"select": "test", "test": "test"},
}
"""Which of `HELD_OUT` lie beside `train` → the folder of each held-out split; one for both is divided."""


def check_share(select_share: float, split_seed: int) -> None:
    """Raises UserError for a share that leaves one part empty, or a seed below 0."""
    if not 0 < select_share < 1:
        raise UserError(
            f"data.select_share must lie between 0 and 1, both excluded, not {select_share}: it is the share of the "
            "held-out images that selects, and the rest tests"
        )
    if split_seed < 0:
        raise UserError(f"data.split_seed must be 0 or more, not {split_seed}")


def divide(
    labels: "NDArray[np.int64]", classes: Sequence[str], select_share: float, split_seed: int
) -> "tuple[NDArray[np.int64], NDArray[np.int64]]":
    """Which of the held-out images select, and which test: the same share of every class, drawn at random.

    What becomes of a class depends on its number of images, its label and the seed alone.

    Args:
        labels: `[N]`, of the held-out images. classes: a name for each label. select_share: of each class, in (0, 1),
            rounded to whole images; at least one image selects and at least one tests.
        split_seed: another one draws another division.

    Returns:
        Indices into the N images of those that select, and of those that test, each in ascending order.

    Raises:
        UserError: a class with fewer than two images; or see `check_share`.
    """
    import numpy as np

    check_share(select_share, split_seed)
    scarce = [name for label, name in enumerate(classes) if np.count_nonzero(labels == label) < 2]
    if scarce:
        raise UserError(
            f"too few held-out images of {listing(scarce)}: every class needs at least two, "
            "one to select and one to test"
        )
    select = []
    for label in range(len(classes)):
        own = np.flatnonzero(labels == label)
        count = min(max(round(len(own) * select_share), 1), len(own) - 1)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((split_seed, label))))
        select.append(own[np.argsort(rng.random(len(own)), kind="stable")[:count]])
    chosen = np.sort(np.concatenate(select))
    return chosen, np.setdiff1d(np.arange(len(labels)), chosen)


def named_splits(splits: Mapping[str, str]) -> dict[str, str]:
    """The folder of each of the three splits, from a setting that may name one held-out folder only.

    Raises:
        UserError: they are not named well.
    """
    named = dict(splits) if isinstance(splits, Mapping) else {}
    held_out = [str(named[name]) for name in ("select", "test") if named.get(name)]
    if not named.get("train") or not held_out or not named.keys() <= set(get_args(Split)):
        raise UserError(
            f"data.splits={splits} must name a folder for train and for select, test or both, "
            "such as {train: training, test: validation}"
        )
    return {"train": str(named["train"]), "select": held_out[0], "test": held_out[-1]}


def split_folders(root: Path, named: Mapping[str, str] | None) -> dict[str, str]:
    """The name of each split's folder in `root`: as named, or else as found.

    Raises:
        UserError: a folder that is not there, a layout that is none of `LAYOUTS`, or train is a held-out folder.
    """
    there = subfolders(root)
    choice = f"the folders there are {listing(there, 10)}" if there else "it holds no folders"
    if named is None:
        held_out = tuple(name for name in HELD_OUT if name in there)
        if "train" not in there or held_out not in LAYOUTS:
            beside = listing(held_out) or "no val"
            wrong = f"{beside} beside train" if "train" in there else "no folder 'train'"
            raise UserError(
                f"{root} has {wrong}: it must hold train/<class>/ with val/ or test/, val/ and test/, or select/ and "
                f"test/ beside it, or data.splits={{train: …, test: …}} must name the folders; {choice}"
            )
        named = {"train": "train"} | LAYOUTS[held_out]
    for folder in named.values():
        if not (root / folder).is_dir():
            raise UserError(f"data.splits names {folder!r}, which is no folder of {root}: {choice}")
    train, select, test = (root / named[split] for split in get_args(Split))
    for held_out_folder in (select, test):  # compared on the disk: a link is the same folder by another name
        if train.samefile(held_out_folder):
            raise UserError(f"{train} and {held_out_folder} are one folder: what fits must not select or test")
    return {**named, "select": named["test"]} if select.samefile(test) else dict(named)

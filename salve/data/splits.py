# SPDX-License-Identifier: MIT
"""Which folder holds which split, and how one held-out set is divided into *select* and *test*."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from salve.data.naming import listing
from salve.data.walk import subfolders
from salve.types import Split, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Usual names of held-out folders.
HELD_OUT = ("select", "val", "test")
#: Which of :data:`HELD_OUT` lie beside ``train`` → the folder of each held-out split; one for both is divided.
LAYOUTS: dict[tuple[str, ...], dict[str, str]] = {
    ("select", "test"): {"select": "select", "test": "test"},
    ("val", "test"): {"select": "val", "test": "test"},
    ("val",): {"select": "val", "test": "val"},
    ("test",): {"select": "test", "test": "test"},
}


def check_share(select_share: float, split_seed: int) -> None:
    """Check the settings of the division.

    Raises:
        UserError: the share would leave one part empty, or the seed is negative.
    """
    if not 0 < select_share < 1:
        raise UserError(
            f"data.select_share={select_share} must lie between 0 and 1, both excluded; it is the share of the "
            "held-out images that goes to select, and the rest goes to test."
        )
    if split_seed < 0:
        raise UserError(f"data.split_seed={split_seed} must be at least 0.")


def divide(
    labels: "NDArray[np.int64]", classes: Sequence[str], select_share: float, split_seed: int
) -> "tuple[NDArray[np.int64], NDArray[np.int64]]":
    """Divide held-out images at random into *select* and *test*, with the same share of every class.

    How a class is divided depends only on its number of images, its label and the seed.

    Args:
        labels: ``[N]``, of the held-out images. classes: a name for each label.
        select_share: share of each class that goes to *select*, in (0, 1), rounded to whole images; both parts get at
            least one image.
        split_seed: seed of the division.

    Returns:
        Indices of the images in *select*, and of those in *test*, each in ascending order.

    Raises:
        UserError: a class has fewer than two images, or as :func:`check_share`.
    """
    import numpy as np

    check_share(select_share, split_seed)
    scarce = [name for label, name in enumerate(classes) if np.count_nonzero(labels == label) < 2]
    if scarce:
        raise UserError(
            f"There are too few held-out images of {listing(scarce)}; every class needs at least two, one for select "
            "and one for test."
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
    """Read the setting ``data.splits``, which may name one held-out folder only.

    Returns:
        The folder of each of the three splits.

    Raises:
        UserError: it names no folder for *train*, none that is held out, or an unknown split.
    """
    named = dict(splits) if isinstance(splits, Mapping) else {}
    held_out = [str(named[name]) for name in ("select", "test") if named.get(name)]
    if not named.get("train") or not held_out or not named.keys() <= set(get_args(Split)):
        raise UserError(
            f"data.splits={splits} must name a folder for train, and one for select, test or both, such as "
            "{train: training, test: validation}."
        )
    return {"train": str(named["train"]), "select": held_out[0], "test": held_out[-1]}


def split_folders(root: Path, named: Mapping[str, str] | None) -> dict[str, str]:
    """The name of each split's folder in ``root``.

    Args:
        root: the folder that holds the folders of the splits.
        named: the folder of each split; None finds them by their usual names.

    Raises:
        UserError: a folder is missing, the folders are none of :data:`LAYOUTS`, or *train* is also a held-out folder.
    """
    there = subfolders(root)
    choice = f"its folders are {listing(there, 10)}" if there else "it holds no folders"
    if named is None:
        held_out = tuple(name for name in HELD_OUT if name in there)
        if "train" not in there or held_out not in LAYOUTS:
            beside = listing(held_out) or "no val"
            wrong = f"{beside} beside train" if "train" in there else "no folder 'train'"
            raise UserError(
                f"{root} has {wrong}; {choice}. It must hold train/<class>/ and, beside train/, either val/, or test/, "
                "or val/ and test/, or select/ and test/; data.splits={train: …, test: …} names other folders."
            )
        named = {"train": "train"} | LAYOUTS[held_out]
    for folder in named.values():
        if not (root / folder).is_dir():
            raise UserError(f"data.splits names {folder!r}, which is no folder in {root}; {choice}.")
    train, select, test = (root / named[split] for split in get_args(Split))
    for held_out_folder in (select, test):  # compared on the disk, because one may be a link to the other
        if train.samefile(held_out_folder):
            raise UserError(
                f"{train} and {held_out_folder} are one folder; images for training must not be used for selecting or "
                "testing."
            )
    return {**named, "select": named["test"]} if select.samefile(test) else dict(named)

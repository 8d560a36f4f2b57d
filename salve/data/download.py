# SPDX-License-Identifier: MIT
"""Download public data sets once, even if several processes ask."""

from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

from filelock import FileLock

from salve.types import UserError


def fetch(name: str, root: Path, is_there: Callable[[], bool], download: Callable[[], object]) -> None:
    """Download a data set under a lock, unless another process has done so.

    Args:
        name: of the data set, for the lock and for messages.
        root: the folder to download into.
        is_there: whether the data are there.
        download: what downloads them.

    Raises:
        UserError: there is no network, the archive is damaged, or ``root`` cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            if not is_there():
                download()
    except (URLError, OSError, RuntimeError) as error:  # torchvision reports a wrong checksum as RuntimeError
        reason = " ".join(str(error).split())
        raise UserError(
            f"The download of {name} into data.root={root} failed ({reason}); put the data there yourself, or set "
            "data.root to a folder that holds them."
        ) from error

"""Fetching public data sets once, however many processes ask."""

from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

from filelock import FileLock

from salve.types import UserError


def fetch(name: str, root: Path, is_there: Callable[[], bool], download: Callable[[], object]) -> None:
    """Run `download` under a lock in `root`, unless `is_there` by then.

    Raises:
        UserError: no network, a damaged archive, or a `root` that cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            if not is_there():
                download()
    except (URLError, OSError, RuntimeError) as error:  # torchvision reports a wrong checksum as RuntimeError
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} could not be downloaded into data.root={root} ({reason}): put it there yourself, "
            "or pass the folder that has it as data.root"
        ) from error

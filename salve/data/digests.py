# SPDX-License-Identifier: MIT
"""Digests of image files, which are read again only if they may have changed."""

import logging
from collections.abc import Sequence
from pathlib import Path

from salve import files
from salve.types import UserError

log = logging.getLogger(__name__)


def file_digests(root: Path, paths: Sequence[str]) -> list[str]:
    """Hex SHA-256 of the bytes of every image ``root / path``; see :func:`salve.files.file_digests`.

    Raises:
        UserError: a file cannot be read.
    """

    def announce(count: int, size: int) -> None:
        log.info("Reading %d images (%.1f GB) once, to find results that were made from them.", count, size / 10**9)

    try:
        return files.file_digests(root, paths, announce=announce)
    except OSError as error:  # such as a link to nowhere
        raise UserError(f"The image {error.filename} cannot be read ({error.strerror}).") from error

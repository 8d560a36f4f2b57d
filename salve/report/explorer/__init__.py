# SPDX-License-Identifier: MIT
"""The explorer of a run: one file that answers what an edit would do (docs/explorer.md)."""

#: The file's name in the folder of a run.
NAME = "explorer.html"

# SPDX-License-Identifier: MIT
"""``python -m salve``: the command ``salve``."""

from salve.cli import main

if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""Figures, one module per verb: arrays and tables in, a matplotlib ``Figure`` out; nothing is read or written here."""

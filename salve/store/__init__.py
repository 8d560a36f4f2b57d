# SPDX-License-Identifier: MIT
"""``salve-store``: list, verify and clean the artifacts of an output folder."""

# SPDX-License-Identifier: MIT
"""The page's sections, one module per verb: tables and figures with what they show and how to read them."""

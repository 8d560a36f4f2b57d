"""The settings of these parts: `salve hydra.searchpath=[pkg://salve_extra.conf]`."""

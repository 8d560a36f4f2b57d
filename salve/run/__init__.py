# SPDX-License-Identifier: MIT
"""From a Hydra configuration to a finished run; nothing below this package has heard of a config."""

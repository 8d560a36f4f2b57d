# SPDX-License-Identifier: MIT
"""How robust each image's class is under an edit."""

from salve.diagnosis.critical import critical_strength
from salve.diagnosis.crossing import Crossing, attributions, first_crossing, linear_crossing

__all__ = ["Crossing", "attributions", "critical_strength", "first_crossing", "linear_crossing"]

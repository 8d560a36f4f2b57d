"""How robust each image's class is under an edit."""

from salve.diagnosis.critical import critical_strength

__all__ = ["critical_strength"]

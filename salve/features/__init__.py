"""What the latents say about the classes."""

from salve.features.classes import Kind, Selection, class_means, kinds, margins, select_latents, shares

__all__ = ["Kind", "Selection", "class_means", "kinds", "margins", "select_latents", "shares"]

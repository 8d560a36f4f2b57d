"""Parts that `salve` finds by their paths; see docs/extend.md."""

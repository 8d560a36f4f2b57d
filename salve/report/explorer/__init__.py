"""The explorer of a run: one file that answers what an edit would do (docs/explorer.md)."""

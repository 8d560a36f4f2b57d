"""What lies under an output folder: artifacts, who uses them, and what nobody needs any more."""

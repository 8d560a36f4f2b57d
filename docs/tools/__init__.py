"""What makes the site of the pages, and the pages that are made by commands."""

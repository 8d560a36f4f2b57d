"""One module for each published figure or table."""

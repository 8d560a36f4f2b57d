"""The pages, and in tools/ what makes the site of them."""

"""What the paper does not have."""

"""SALVE: understand an image classifier with a sparse autoencoder, then change it for good."""

__version__ = "0.1.0"

"""growkit: train a language model by growing it."""

__version__ = "0.1.0"

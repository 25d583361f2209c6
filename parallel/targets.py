"""What a target says besides the token to predict. Torch-free, as data are prepared without torch."""

IGNORED = -100
"""Target of a position that carries no loss."""

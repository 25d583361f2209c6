"""Special value of targets. Torch-free, because data are prepared without torch."""

IGNORED = -100
"""Target of a position that carries no loss."""

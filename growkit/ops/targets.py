"""Targets of a loss that are not token ids. Data write them, the loss reads them."""

UNSCORED = -100  # not predicted: padding, the question of a task; what torch's cross_entropy leaves out by default

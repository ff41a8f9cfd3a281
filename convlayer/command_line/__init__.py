"""`convlayer compare`, `explain` and `doctor`."""

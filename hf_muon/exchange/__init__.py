"""Between storage (slices of parameters) and compute (whole matrices). README.md states the boundary."""

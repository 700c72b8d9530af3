"""Weights at the moment they are needed: mapped, streamed from disk or host memory, swapped."""

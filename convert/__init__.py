"""Checkpoints to model folders."""

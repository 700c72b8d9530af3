"""The plugins MOSS was trained to call."""

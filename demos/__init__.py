"""Thin programs that present what moss_jt yields."""

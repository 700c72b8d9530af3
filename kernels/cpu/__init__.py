"""Operators for the CPU, through jt.code."""

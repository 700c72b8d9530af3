"""Operators: portable, cpu, cuda."""

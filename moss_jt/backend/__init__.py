"""Jittor and what decides how it starts: device, build, CUDA probes; the one import of Jittor is jittor.py."""

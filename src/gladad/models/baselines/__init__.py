"""Detectors without diffusion, to compare with."""

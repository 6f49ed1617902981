"""Metrics, and measuring a detector on labelled images."""

"""Frozen feature extractors, and the whitened space that their features are projected into."""

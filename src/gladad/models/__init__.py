"""The models, by name."""

"""The published program: its checkpoints and its numbers. Nothing depends on this."""

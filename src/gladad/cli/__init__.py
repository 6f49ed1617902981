"""The ``gladad`` command."""

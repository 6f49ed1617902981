"""Models as static graphs, for inspection without PyTorch."""

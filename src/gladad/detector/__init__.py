"""What a fit is, and `Glad`."""

"""Many detectors on many data sets, side by side."""

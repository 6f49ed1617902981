"""Data sets and their layouts, checks, synthetic anomalies, copies and corruptions."""

"""Metrics of scores, maps and decisions: functions on NumPy arrays that know nothing else of the program."""

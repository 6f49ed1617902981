"""Errors, records, settings, threads, atomic files and images: what everything else stands on."""

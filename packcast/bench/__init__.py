"""Measuring: baselines to compare with. Knows the library, not the command line."""

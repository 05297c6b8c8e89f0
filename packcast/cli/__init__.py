"""The command line: options -> settings -> one call -> report.

Nothing is imported here; `--help`, `--version`, `inspect` and `--dry-run` never import torch.
"""

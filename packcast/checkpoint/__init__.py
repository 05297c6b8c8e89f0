"""What is on disk: safetensors headers, checkpoints, and what is sent of them.

Imports neither torch nor numpy.
"""

"""The ends of a transfer inside a process: where bytes come from, and where they go.

Knows files, threads and memory; not who takes part, nor the command line.
"""

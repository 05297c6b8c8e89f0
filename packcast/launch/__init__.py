"""The ranks of a transfer: launch environments, devices, rendezvous, the torch process group.

Nothing is imported here, so that the parts without torch can be used without it.
"""

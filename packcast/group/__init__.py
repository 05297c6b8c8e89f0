"""Who takes part: launch environments, the control channel, heartbeats, the torch process group.

Nothing is imported here, so that the parts without torch can be used without it.
"""

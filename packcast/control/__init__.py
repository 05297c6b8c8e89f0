"""The control channel: one TCP connection from every worker to the sender, beside the data.

How ranks join, their messages, and the detection of lost ranks. Knows no torch. `server.py` is the
sender's end, `client.py` a worker's; both are a `channel.py` with connections.
"""

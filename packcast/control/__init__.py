"""The control channel: one TCP connection from every worker to the sender, beside the data.

Who joins, what the ranks tell each other, who is lost. Knows no torch. `server.py` is the sender's
end, `client.py` a worker's; both are a `channel.py` with connections.
"""

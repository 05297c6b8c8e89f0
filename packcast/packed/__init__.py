"""The packed broadcast: plan, slots, streams, the one loop. Knows torch; no files."""

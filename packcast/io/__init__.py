"""Files on one side, staging memory on the other: schedule, I/O threads, sources and sinks."""

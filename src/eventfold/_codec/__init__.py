"""A line of the log: one event as compact JSON and a newline. Encoding and checking, decoding and selection."""

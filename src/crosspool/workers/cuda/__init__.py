"""Runs grants on devices with streams: lanes in fixed memory, graphs recorded over them, tokens in a ring."""

"""Figures for Prometheus: the engine's counters and the latencies that the front sees."""

"""A load generator for any OpenAI-compatible server, over real HTTP.

``run.measure`` gives a Load to a server and returns a Measurement; ``report`` and ``plot`` show it.
"""

"""Decides who may start, what travels together, and by when: requests become micro-batches.

sequence: one request on its way. admission: who may start. running: who holds pages. batching: rows of a
micro-batch. pipeline: due times. scheduler: composes them.
"""

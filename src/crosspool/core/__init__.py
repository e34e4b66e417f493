"""The words of the system: requests, micro-batches, model geometry, configs, errors and protocols.

Standard library only. Everything above speaks in these types.
"""

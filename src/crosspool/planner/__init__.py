"""Says how many bytes the KV pool needs for a stated risk. NumPy and SciPy, no torch."""

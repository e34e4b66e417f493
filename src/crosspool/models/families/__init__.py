"""One small file per family: a public config to a ModelSpec, and the names of its weights. No torch."""

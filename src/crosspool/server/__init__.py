"""The OpenAI-compatible HTTP server (the API process) and the engine's child process (the cell)."""

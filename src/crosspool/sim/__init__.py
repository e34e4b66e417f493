"""The simulator: the real scheduler and engine over a virtual clock and an executor that only predicts."""

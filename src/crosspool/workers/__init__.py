"""Who runs layer tasks: the attention side, the FFN side, the channel between them, and the executor."""

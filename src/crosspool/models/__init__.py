"""Model families: public checkpoints in, an attention side and FFN halves out."""

"""The two pools: pages of KV for whoever is active, and the FFN weights of all models."""

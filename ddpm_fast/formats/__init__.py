"""Other people's checkpoints: the way of their weights into our networks, and back."""

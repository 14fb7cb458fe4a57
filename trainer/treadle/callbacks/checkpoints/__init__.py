"""What callbacks that write checkpoints are made of."""

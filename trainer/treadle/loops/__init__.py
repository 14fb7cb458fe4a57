"""The loops: fit, its epochs and steps, evaluation and prediction."""

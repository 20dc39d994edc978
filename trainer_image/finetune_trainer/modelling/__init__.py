"""The model and the mathematics of a step: families, attention, masters, losses, evaluation."""

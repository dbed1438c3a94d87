"""Training: engine, EMA, checkpoints, the loop, and `train` that wires them together."""

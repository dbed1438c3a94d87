"""The networks that predict residual and noise, and the weight files they are saved in."""

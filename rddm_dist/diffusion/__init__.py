"""The mathematics of residual denoising diffusion: schedule, forward process, objectives, samplers."""

"""What the benchmarks share. They run as scripts, so that it is imported as `support`."""

"""The `rddm` command: the composition root, and the only place that may import all three packages."""

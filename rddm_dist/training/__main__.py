"""Training without Ray: `torchrun --nproc-per-node 2 -m rddm_dist.training CONFIG [key.sub=value ...]`."""

from rddm_dist.cli.torchrun import main

main()

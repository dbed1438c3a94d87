"""The process that torchrun starts: the same training as `rddm train`, without Ray."""

from __future__ import annotations

import argparse
import sys

from data_pipeline.errors import RddmError
from rddm_dist.log import quiet_frameworks


def main() -> None:
    """Train on this process's share. Rank 0 reports; errors are one line on rank 0 and an exit code on all."""
    quiet_frameworks()
    parser = argparse.ArgumentParser(prog="python -m rddm_dist.training", description=__doc__)
    parser.add_argument("config", help="a YAML file, for example configs/train/demo.yaml")
    parser.add_argument("--storage", default="", help="folder that holds run folders")
    parser.add_argument("--run", default="", help="name of the run folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()

    from rddm_dist.cli.train import TrainConsole, run_overrides
    from rddm_dist.comm import leave, topology_from_env
    from rddm_dist.config import load_config
    from rddm_dist.training.folder import run_folder
    from rddm_dist.training.run import Hooks, train
    from rddm_dist.training.stopping import exit_code_of, stopped_for_good

    topology = topology_from_env()
    is_alone = True  # what goes wrong before the workers meet goes wrong on all of them
    try:
        overrides = [*arguments.overrides, *run_overrides(arguments.storage, arguments.run)]
        config = load_config(arguments.config, overrides)
        is_alone = False
        folder = run_folder(config)
        if topology.rank == 0:
            with TrainConsole(config) as console:
                result = train(config, topology, Hooks(on_event=console.on_event), forgets_request=True)
        else:
            result = train(config, topology)
        if topology.rank == 0 and result.status == "stopped" and stopped_for_good(folder):
            print(f"{folder.home}: this launch was stopped by rddm stop; launch again to go on")
        code = exit_code_of(result.exit_code, folder)
    except RddmError as error:
        if topology.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        elif not is_alone and not error.is_shared:
            print(f"error: worker {topology.rank}: {error}", file=sys.stderr)
        code = error.exit_code
    leave(code)

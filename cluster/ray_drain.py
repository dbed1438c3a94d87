"""Where the workers of a run are, and which of Ray's nodes are about to go away: what its driver looks at.

`ray.train.get_preemption_info` says the same to the workers, but as a barrier among all of them in every step that
asks. Our step has its one collective already, which carries any wish to stop; so the driver looks into the same table
of Ray's and asks the run to stop, which costs the workers nothing.
"""

from __future__ import annotations

import uuid

import ray
import ray._private.state
from ray.experimental import internal_kv


class Roll:
    """A list that workers enter themselves into: it tells when all are there, and on which nodes.

    Lies in Ray's own key-value table, so that no process has to hold it. `name` is what workers need of it.
    """

    def __init__(self) -> None:
        self.name = f"rddm/roll/{uuid.uuid4().hex}/"

    def count(self) -> int:
        """How many workers have come."""
        return len(internal_kv._internal_kv_list(self.name))

    def nodes(self) -> set[str]:
        """The ids of the nodes they are on."""
        values = [internal_kv._internal_kv_get(key) for key in internal_kv._internal_kv_list(self.name)]
        return {value.decode() for value in values if value is not None}

    def close(self) -> None:
        internal_kv._internal_kv_del(self.name, del_by_prefix=True)


def enter_roll(name: str, *, rank: int) -> None:
    """Called by each worker."""
    internal_kv._internal_kv_put(f"{name}{rank}", ray.get_runtime_context().get_node_id())


def draining_nodes() -> dict[str, str]:
    """Node id -> address of the nodes that Ray has been told to empty: a spot instance that is taken back, a pod that
    is evicted, `ray drain-node`. Ray puts no new workers on them.
    """
    # There is no public call; Ray's own Train, Data and Serve use this one.
    ids = ray._private.state.state.get_draining_nodes()
    if not ids:
        return {}
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] in ids}


def dead_nodes() -> dict[str, str]:
    """Node id -> address of the nodes that Ray has found to be gone."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if not node["Alive"]}


def this_node() -> str:
    """The id of the node that this process is on."""
    return ray.get_runtime_context().get_node_id()

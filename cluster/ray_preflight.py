"""The look at the nodes of a Ray cluster before a job: one actor on each node that is to have workers."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.node_report import Needs, NodeReport, node_name
from cluster.preflight import GROUP_LIMIT_S, GroupReport, examine
from cluster.ray_session import actors_that_fit, ray_session, require_workers
from data_pipeline.errors import EnvironmentFault, RddmError
from data_pipeline.retry import one_line
from rddm_dist import comm
from rddm_dist.comm import Topology

PLACES_LIMIT_S = 600.0  # for nodes that the cluster adds, or other jobs give back
START_LIMIT_S = 120.0  # of an actor, which imports torch from a disk that may be slow
MEET_LIMIT_S = 60.0
TOLD_EVERY_S = 15.0
GRACE_S = 10.0


@dataclass(frozen=True)
class _Place:
    """A node that is to have workers."""

    node_id: str
    name: str
    workers: int


@ray.remote(num_cpus=0, max_restarts=0)
class _Member:
    """The process that looks at one node."""

    def address(self) -> tuple[str, int]:
        """Where the others can meet this one."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def examine(self, needs: Needs, place: tuple[int, int], *, env: Mapping[str, str], gpus: int, workers: int) -> Any:
        """`cluster.preflight.examine` in a group of one process per node.   place: (rank, number of nodes)"""
        os.environ.update(env)
        topology = Topology(rank=place[0], world_size=place[1])
        comm.assemble(topology, name=node_name(), wait_s=MEET_LIMIT_S, timeout_s=GROUP_LIMIT_S)
        return examine(needs, topology, gpus=gpus, workers=workers)


def look_with_ray(
    needs: Needs,
    *,
    workers: int,
    gpus_per_worker: int,
    cpus_per_worker: int = 1,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[list[NodeReport], GroupReport]:
    """Look at the nodes of the cluster of RAY_ADDRESS, else at this machine. workers: 0: one on each node with room.

    Raises EnvironmentFault where the job finds no place, an actor cannot start on a node, or the nodes do not meet.
    """
    with ray_session(cpus=max(1, workers) * cpus_per_worker):
        size = {"CPU": cpus_per_worker, **({"GPU": gpus_per_worker} if gpus_per_worker else {})}
        places = _find_places(workers, size, tell)
        tell(f"starting on {len(places)} node(s): {', '.join(place.name for place in places[:8])}")
        with _members(places, gpus_per_worker) as members:
            addresses = _collect([member.address.remote() for member in members], places, limit_s=START_LIMIT_S)
            host, port = addresses[0]
            tell(f"the nodes meet at {host}:{port}, and look at versions, devices, disks, data, storage and each other")
            env = {"MASTER_ADDR": host, "MASTER_PORT": str(port), "WORLD_SIZE": str(len(places))}
            results = [
                member.examine.remote(
                    needs, (rank, len(places)), env={**env, "RANK": str(rank)}, gpus=place.workers * gpus_per_worker,
                    workers=place.workers,
                )
                for rank, (member, place) in enumerate(zip(members, places, strict=True))
            ]  # fmt: skip
            reports, group = _collect(results, places, limit_s=MEET_LIMIT_S + GROUP_LIMIT_S)[0]
    return reports, group


def _find_places(workers: int, size: Mapping[str, float], tell: Callable[[str], None]) -> list[_Place]:
    """Where Ray puts the workers of a job of this size, the first node first."""
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    gpus = size.get("GPU", 0)
    if workers:
        require_workers(workers, cpus=size["CPU"], gpus=gpus)
        bundles, strategy = [dict(size)] * workers, "PACK"  # as Ray Train does
    else:
        room = sum(actors_that_fit([node["Resources"]], cpus=size["CPU"], gpus=gpus) > 0 for node in nodes.values())
        require_workers(1, cpus=size["CPU"], gpus=gpus)
        bundles, strategy = [dict(size)] * max(1, room), "STRICT_SPREAD"
    group = placement_group(bundles, strategy=strategy)
    try:
        _wait_for(group, f"{len(bundles)} worker(s) of {size['CPU']:g} CPU(s) and {gpus:g} GPU(s)", tell)
        chosen = placement_group_table(group)["bundles_to_node_id"]
    finally:
        remove_placement_group(group)
    counts = Counter(chosen[index] for index in range(len(bundles)))
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # some may have come meanwhile
    return [_Place(node_id, _name(nodes[node_id]), count) for node_id, count in counts.items()]


def _wait_for(group: Any, what: str, tell: Callable[[str], None]) -> None:
    deadline = time.monotonic() + PLACES_LIMIT_S
    while not group.wait(TOLD_EVERY_S):
        if time.monotonic() > deadline:
            raise EnvironmentFault(
                f"the Ray cluster has had no place for {what} for {PLACES_LIMIT_S:.0f} s; free are "
                f"{_free()}; wait for other jobs to end, add nodes, or lower --workers"
            )
        tell(f"waiting for places of {what}; free are {_free()}")


def _free() -> str:
    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPU(s) and {free.get('GPU', 0):g} GPU(s)"


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


@contextlib.contextmanager
def _members(places: list[_Place], gpus_per_worker: int) -> Iterator[list[Any]]:
    """An actor on each node, with the GPUs that the workers of the node will have; all are killed at the end."""
    # A worker without GPUs must not see any: Ray alone would leave them visible.
    env = {} if gpus_per_worker else {"CUDA_VISIBLE_DEVICES": ""}
    members = [
        _Member.options(  # type: ignore[attr-defined]
            num_gpus=place.workers * gpus_per_worker,
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node_id, soft=False),
            runtime_env={"env_vars": {**env, "TORCH_CPP_LOG_LEVEL": "ERROR"}},
        ).remote()
        for place in places
    ]
    try:
        yield members
    finally:
        for member in members:
            ray.kill(member)


def _await(results: list[Any], *, limit_s: float) -> None:
    """Wait for all; when one has failed, for the others only as long as they may need to notice."""
    deadline, pending = time.monotonic() + limit_s, results
    while pending and time.monotonic() < deadline:
        done, pending = ray.wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        for result in done:
            try:
                ray.get(result)
            except RayError:
                deadline = min(deadline, time.monotonic() + GRACE_S)


def _collect(results: list[Any], places: list[_Place], *, limit_s: float) -> list[Any]:
    """What the actors return, in order. EnvironmentFault that names the nodes where one failed or does not answer."""
    _await(results, limit_s=limit_s)
    values: list[Any] = []
    faults: list[str] = []
    for result, place in zip(results, places, strict=True):
        ready, _ = ray.wait([result], timeout=0)
        if not ready:
            faults.append(f"{place.name}: no answer within {limit_s:.0f} s; are its GPUs in use, is the node there?")
            continue
        try:
            values.append(ray.get(result))
        except RayTaskError as error:
            if not isinstance(error.cause, RddmError):
                raise
            faults += [] if error.cause.is_shared and faults else [str(error.cause)]
        except RayError as error:
            faults.append(
                f"{place.name}: {one_line(error)[-400:]}; the same environment with rddm-dist must be on every node"
            )
    if faults:
        raise EnvironmentFault(
            "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more nodes" if len(faults) > 4 else "")
        )
    return values

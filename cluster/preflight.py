"""The look at all nodes before a job: one process of each node takes part in `examine`, `judge` says what it means.

As a program it is what every worker runs under torchrun: `python -m cluster.preflight CONFIG [section.key=value ...]`.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from cluster.findings import Finding
from cluster.node_report import Needs, NodeReport, node_name, probe, told
from cluster.shared_folder import SharedFolder
from data_pipeline import storage
from data_pipeline.errors import RddmError
from rddm_dist import comm
from rddm_dist.comm import LINK_ADVICE, Topology
from rddm_dist.limits import within
from rddm_dist.tracking.store import SQLITE, open_client, sqlite_path

GROUP_LIMIT_S = 100.0  # of one exchange: a node whose folders do not answer comes late
ALL_REDUCE_BYTES = 64_000_000
ALL_REDUCE_ROUNDS = 3
ROUND_LIMIT_S, ALL_REDUCE_LIMIT_S = 30.0, 90.0
MEETINGS = 8
MAX_SKEW_S = 2.0
TRACKING_LIMIT_S = 45.0
SHOWN_NODES = 4  # that one line names
DATA_ADVICE = "point data.uri to one place that all nodes share, or copy the dataset to all of them again"
DRIVER_ADVICE = "install the same NVIDIA driver on every node, or leave out the odd ones"
CODE_ADVICE = "give every node the same checkout or package of rddm-dist"
VERSION_ADVICE = "use one environment for all nodes: a shared folder, or the same image everywhere"
CLOCK_ADVICE = "start a time service on every node, e.g. chrony; until then times in logs and credentials may be off"
TRACKING_ADVICE = "start the server, change tracking.uri, or train with tracking.backend=none"


@dataclass(frozen=True)
class GroupReport:
    """What the workers found together.

    processes: that met; backend: of the all-reduce; all_reduce_s: seconds of one of ALL_REDUCE_BYTES, 0: not measured;
    fault: why it failed; tracking: the MLflow store as the first node sees it, None: the job has none.
    """

    processes: int
    backend: str = ""
    all_reduce_s: float = 0.0
    fault: str = ""
    tracking: Finding | None = None


def examine(
    needs: Needs, topology: Topology, *, gpus: int, workers: int, tell: Callable[[str], None] = lambda text: None
) -> tuple[list[NodeReport], GroupReport]:
    """Look at this node, and together with the others at what is between them. Every process of the group calls it.

    The first process of each node reports. gpus: that it should see, below 0: one for every worker of the node, if it
    sees any; workers: of this node; tell: hears what is being done.
    ->  the reports of all nodes, by rank, and of the group; no reports but on the first rank
    """
    is_first = topology.rank == 0
    pool = ThreadPoolExecutor(1)
    try:
        tracking = pool.submit(look_at_tracking, needs.tracking) if is_first and needs.tracking else None
        with comm.naming_losses(node_name()):
            tell("looking at each node: versions, devices, disks, data")
            report = None
            if topology.local_rank == 0:
                report = probe(needs, rank=topology.rank, workers=workers, gpus=gpus)
            names = node_labels([(each.rank, each.node) for each in comm.exchange_object(report) if each])
            if report:
                report = replace(report, node=names[report.rank])
            tell("comparing the storage as the nodes see it")
            report = _look_at_storage(report, names, is_first=is_first)
            tell("comparing clocks, measuring an all-reduce")
            times = comm.exchange_object(comm.meeting_times(MEETINGS))
            has_gpus = report is None or len(report.gpus) >= max(1, report.gpus_needed)
            group = _measure(topology, on_gpu=all(comm.exchange_object(has_gpus)))
            gathered = comm.gather_object(report)
        if tracking:
            tell("waiting for MLflow")
            group = replace(group, tracking=tracking.result())
    finally:
        pool.shutdown(wait=False)
    offsets = clock_offsets(times)
    reports = [
        replace(each, clock_s=offsets[each.rank][0], clock_bound_s=offsets[each.rank][1])
        for each in gathered or []
        if each
    ]
    return reports, group


def node_labels(nodes: Sequence[tuple[int, str]]) -> dict[int, str]:
    """Names of nodes by rank, told apart where several have the same.   nodes: (rank, name)"""
    counts = Counter(name for _, name in nodes)
    return {rank: name if counts[name] == 1 else f"{name} (worker {rank})" for rank, name in nodes}


def clock_offsets(times: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """How far clocks are ahead of the first one, and how wrong that may be, from times before and after meetings.

    times: by rank, by meeting. Nobody leaves a meeting before all have come, which bounds each difference from both
    sides.
    """
    offsets = [(0.0, 0.0)]
    for mine in times[1:]:
        both = list(zip(mine, times[0], strict=True))
        low = max(before - first_after for (before, _), (_, first_after) in both)
        high = min(after - first_before for (_, after), (first_before, _) in both)
        offsets.append(((low + high) / 2, (high - low) / 2))
    return offsets


def _look_at_storage(report: NodeReport | None, names: dict[int, str], *, is_first: bool) -> NodeReport | None:
    """Write a token and read those of the other nodes; nothing of it stays behind."""
    ident, problems = uuid.uuid4().hex[:12], list[Finding | None]()
    folder: SharedFolder | None = None

    def write() -> bool:
        nonlocal folder
        if report is None or not report.storage:
            return False
        folder = SharedFolder(report.storage, ident, report.rank)
        problems.append(folder.write())
        return problems[-1] is None

    try:
        has_written = is_first and write()  # it makes the folder, so that one node alone removes it again
        ident = comm.broadcast_object(ident)
        has_written = has_written or (not is_first and write())
        wrote = comm.exchange_object(has_written)
        if folder and report and has_written:
            others = [(rank, name) for rank, name in names.items() if wrote[rank] and rank != report.rank]
            problems.append(folder.look_for(others))
        comm.meet()
        if folder and not is_first:
            folder.clean()
        comm.meet()
    finally:
        if folder:
            folder.clean()
    found = tuple(problem for problem in problems if problem)
    return replace(report, problems=(*report.problems, *found)) if report else None


def _measure(topology: Topology, *, on_gpu: bool) -> GroupReport:
    report = GroupReport(topology.world_size, backend="nccl" if on_gpu else "gloo")
    if topology.world_size == 1:
        return report
    seconds, fault = 0.0, ""
    try:
        seconds = within(
            ALL_REDUCE_LIMIT_S,
            lambda: comm.measure_all_reduce(
                num_bytes=ALL_REDUCE_BYTES, rounds=ALL_REDUCE_ROUNDS, on_gpu=on_gpu, device=topology.device,
                wait_s=ROUND_LIMIT_S,
            ),
        )  # fmt: skip
    except TimeoutError:
        fault = f"no end within {ALL_REDUCE_LIMIT_S:.0f} s"
    except RddmError as error:
        fault = told(error)
    faults = comm.exchange_object(fault and f"worker {topology.rank} on {node_name()}: {fault}")
    return replace(report, all_reduce_s=seconds, fault=next(filter(None, faults), ""))


def look_at_tracking(uri: str) -> Finding:
    """Whether MLflow's store answers; the file of an SQLite store that is not there yet is made by the first run."""
    if uri.startswith(SQLITE) and not sqlite_path(uri).exists():
        return Finding("MLflow", f"{sqlite_path(uri)}, made by the first run")
    try:
        within(TRACKING_LIMIT_S, lambda: open_client(uri).search_experiments(max_results=1))
    except TimeoutError:
        return Finding("MLflow", f"{uri} does not answer within {TRACKING_LIMIT_S:.0f} s", TRACKING_ADVICE)
    except Exception as error:  # whatever the client makes of it, the store cannot be used
        return Finding("MLflow", f"{uri} cannot be used ({told(_root(error))})", TRACKING_ADVICE)
    return Finding("MLflow", f"{uri} answers")


def _root(error: BaseException) -> BaseException:
    """What happened on the way to a server, where an error tells; clients wrap it several times."""
    found, link = error, error.__cause__ or error.__context__
    while link is not None:
        found = link if isinstance(link, OSError) else found
        link = link.__cause__ or link.__context__
    return found


def judge(reports: Sequence[NodeReport]) -> list[Finding]:
    """What the reports of nodes mean: one line for each node that is fit, then what is wrong, then what all share."""
    findings = [
        Finding(each.node, _describe(each)) for each in reports if not any(found.is_problem for found in each.problems)
    ]
    findings += _problems(reports)
    findings += _same_storage(reports)
    findings += _same_data(reports)
    findings += _same_versions(reports)
    findings += _same_devices(reports)
    findings += _same_time(reports)
    return findings


def judge_group(group: GroupReport) -> list[Finding]:
    """What the workers found together, in lines."""
    findings = []
    if group.fault:
        findings.append(
            Finding(
                "all-reduce",
                f"{group.backend} failed: {group.fault}",
                f"{LINK_ADVICE}; on GPUs look at what NCCL_DEBUG=INFO prints",
            )
        )
    elif group.all_reduce_s:
        megabytes, count = ALL_REDUCE_BYTES / 1e6, group.processes
        # Bytes that each link carries: what a ring all-reduce sends and receives, the figure to compare with its speed.
        speed = 2 * (count - 1) / count * ALL_REDUCE_BYTES / group.all_reduce_s / 1e9
        findings.append(
            Finding(
                "all-reduce",
                f"{megabytes:.0f} MB over {count} processes in {group.all_reduce_s * 1e3:.1f} ms by {group.backend}: "
                f"{speed:.2f} GB/s on each link",
            )
        )
    else:
        findings.append(Finding("all-reduce", "a single process, nothing to measure"))
    return findings + ([group.tracking] if group.tracking else [])


def _describe(report: NodeReport) -> str:
    gpus = Counter(report.gpus)
    parts = [
        f"{report.workers} worker(s)",
        ", ".join(f"{count} x {name}" for name, count in gpus.items()) or "no GPU",
        *([f"driver {report.driver}"] if report.gpus and report.driver else []),
        *(f"{free:.0f} GB free for {what}" for what, free in report.free_gb.items()),
        f"/dev/shm {report.shared_gib:.1f} GiB",
        *([f"clock {report.clock_s:+.3f} s"] if report.clock_bound_s else []),
    ]
    return ", ".join(parts)


def _problems(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    """What nodes found on themselves; what is the same on several is one line."""
    nodes: dict[Finding, list[str]] = {}
    for report in reports:
        for problem in report.problems:
            nodes.setdefault(problem, []).append(report.node)
    for problem, where in nodes.items():
        yield replace(problem, name=_some(where, len(reports)), value=f"{problem.name}: {problem.value}")


def _some(nodes: Sequence[str], count: int) -> str:
    if len(nodes) == count > 1:
        return f"all {count} nodes"
    return ", ".join(nodes[:SHOWN_NODES]) + (
        f" and {len(nodes) - SHOWN_NODES} more" if len(nodes) > SHOWN_NODES else ""
    )


def _differing(name: str, values: Sequence[tuple[str, str]], remedy: str) -> Finding | None:
    """A problem where nodes have different values.   values: (node, value)"""
    nodes: dict[str, list[str]] = {}
    for node, value in values:
        nodes.setdefault(value, []).append(node)
    if len(nodes) < 2:
        return None
    usual_first = sorted(nodes.items(), key=lambda item: -len(item[1]))
    return Finding(name, "; ".join(f"{value} on {_some(where, 0)}" for value, where in usual_first), remedy)


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _same_storage(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    places = {storage.shown(report.storage) for report in reports if report.storage}
    if places and not any(problem.name == "storage" for report in reports for problem in report.problems):
        told_places = ", ".join(sorted(places))
        alone = len(reports) == 1
        yield Finding(
            "storage",
            f"{told_places}: " + ("writable" if alone else f"{len(reports)} nodes read what each of them wrote"),
        )


def _same_data(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    for uri in dict.fromkeys(uri for report in reports for uri in report.fingerprints):
        found = [(each.node, each.fingerprints[uri][:12]) for each in reports if uri in each.fingerprints]
        differing = _differing("data", found, DATA_ADVICE)
        if differing:
            yield replace(differing, value=f"{storage.shown(uri)} has fingerprint {differing.value}")
        elif len(found) == len(reports):
            yield Finding(
                "data", f"{storage.shown(uri)}: fingerprint {found[0][1]}, readable from {_nodes(len(found))}"
            )


def _same_versions(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    names = dict.fromkeys(name for report in reports for name in report.versions)
    equal = []
    for name in names:
        found = [(report.node, report.versions.get(name, "unknown")) for report in reports]
        differing = _differing(f"version of {name}", found, CODE_ADVICE if name == "code" else VERSION_ADVICE)
        if differing:
            yield differing
        else:
            equal.append(f"{name} {found[0][1]}")
    if equal:
        yield Finding("versions", ", ".join(equal))


def _same_devices(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    with_gpus = [report for report in reports if report.gpus]
    without = [report.node for report in reports if not report.gpus and not report.gpus_needed]
    if with_gpus and without:
        yield Finding(
            "GPUs",
            f"none on {_some(without, 0)}, some on {_some([report.node for report in with_gpus], 0)}",
            "take nodes of one kind, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on CPUs everywhere",
        )
    differing = _differing("driver", [(report.node, report.driver) for report in with_gpus], DRIVER_ADVICE)
    if differing:
        yield differing


def _same_time(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    if len(reports) < 2:
        return
    off = [report for report in reports if abs(report.clock_s) - report.clock_bound_s > MAX_SKEW_S]
    if off:
        told_off = ", ".join(f"{each.clock_s:+.1f} s on {each.node}" for each in off[:SHOWN_NODES])
        more = f" and {len(off) - SHOWN_NODES} more nodes" if len(off) > SHOWN_NODES else ""
        yield Finding("clocks", f"{told_off}{more}, against {reports[0].node}", CLOCK_ADVICE, is_warning=True)
        return
    worst = max(abs(report.clock_s) + report.clock_bound_s for report in reports)
    yield Finding("clocks", f"within {worst:.3f} s of each other")


if __name__ == "__main__":
    from rddm_dist.cli.doctor_cluster import main_of_workers

    main_of_workers()

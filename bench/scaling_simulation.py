"""A step of `fastmkd.bench.scaling`, played event by event: every GPU, every bucket, every slice on every link.

It shares the inputs with the formula but none of its sums: rings are stepped hop by hop with the delay of each hop,
trees pass slices over ports that are busy or free, GPUs are fast and slow at random, buckets queue behind each other.
"""

from __future__ import annotations

import heapq
from functools import cache

import numpy as np

from .scaling import Cluster, Work, ring, tree

__all__ = ["simulate", "simulate_ring", "simulate_tree"]

SLICE = 2**19  # bytes of a tree's message
DRAWS = 20  # steps


@cache
def simulate_ring(size: float, gpus: int, cluster: Cluster, gather: bool = False) -> float:
    """Seconds of a ring's reduce-scatter and all-gather, hop by hop; `gather` plays the second half with whole parts.

    Args:
        size: bytes, in all for a sum, of each GPU for a gathering.
        gpus: p.
        cluster: hops and links.
        gather: see above.

    Example:
        >>> from .scaling import H100
        >>> abs(simulate_ring(1e8, 64, H100) / ring(1e8, 64, H100) - 1) < 0.1
        True
    """
    many = cluster.nodes(gpus) > 1
    leaves = np.arange(gpus) % cluster.node == cluster.node - 1  # the last GPU of a node sends to the next node
    hops = np.where(leaves & many, cluster.hop_outside, cluster.hop_inside)
    chunk = (size if gather else size / gpus) / cluster.bandwidth(gpus)
    ready, free = np.zeros(gpus), np.zeros(gpus)  # when a GPU has what it sends next; when its link is idle
    for _ in range((gpus - 1) if gather else 2 * (gpus - 1)):
        free = np.maximum(ready, free) + chunk
        ready = np.roll(free + hops, 1)
    return cluster.launch + float(ready.max())


@cache
def simulate_tree(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds of a double binary tree over the nodes: half of the bytes up and down each of two mirrored trees.

    A node has one port in and one out, which both trees share; inside a node GPUs form a chain, through which each
    slice comes on its way up and again on its way down.

    Args:
        size: bytes.
        gpus: p, several nodes.
        cluster: hops and links.

    Example:
        >>> from .scaling import H100
        >>> abs(simulate_tree(1e8, 64, H100) / tree(1e8, 64, H100) - 1) < 0.15
        True
    """
    nodes = cluster.nodes(gpus)
    slices = max(1, round(size / 2 / SLICE))
    busy = size / 2 / slices / (cluster.trees * cluster.bandwidth(gpus))
    chain = cluster.hop_inside * (cluster.node - 1)
    parents = [[(v - 1) // 2 for v in range(nodes)] for _ in range(2)]
    place = [list(range(nodes)), list(range(nodes))[::-1]]  # the second tree's inner nodes are the first one's leaves
    waiting = [[[1 + sum(p == v for p in parents[t][1:]) for v in range(nodes)] for _ in range(slices)] for t in (0, 1)]
    within = size / 2 / slices / (cluster.trees * cluster.bandwidth(1))
    out, into, inner = np.zeros(nodes), np.zeros(nodes), np.full(nodes, 2 * slices * within)
    done = 0.0
    events: list[tuple[float, int, int, int, int, bool]] = []  # when, order, tree, slice, place in the tree, downwards
    for t in (0, 1):
        for s in range(slices):
            for v in range(nodes):
                heapq.heappush(events, (chain + (2 * s + t + 1) * within, s, t, s, v, False))
    while events:
        now, _, t, s, v, down = heapq.heappop(events)
        if not down:
            waiting[t][s][v] -= 1
            if waiting[t][s][v]:
                continue
        targets = [v] if v == 0 and not down else []  # the root has the sum and turns round
        if targets or down:
            inner[place[t][v]] = max(now, inner[place[t][v]]) + within
            done = max(done, inner[place[t][v]] + chain)
            ends = [(w, True) for w in (2 * v + 1, 2 * v + 2) if w < nodes]
        else:
            ends = [(parents[t][v], False)]
        for w, downwards in ends:
            sender, receiver = place[t][v], place[t][w]
            start = max(now, out[sender])
            out[sender] = start + busy
            landed = max(start, into[receiver]) + busy
            into[receiver] = landed
            heapq.heappush(events, (landed + cluster.hop_outside, s, t, s, w, downwards))
    return cluster.launch + done


def simulate_all_reduce(size: float, gpus: int, cluster: Cluster) -> float:
    """The way that the formula would take, played."""
    if cluster.nodes(gpus) == 1 or ring(size, gpus, cluster) <= tree(size, gpus, cluster):
        return simulate_ring(size, gpus, cluster)
    return simulate_tree(size, gpus, cluster)


def simulate(work: Work, gpus: int, cluster: Cluster, seed: int = 0) -> float:
    """Mean seconds of a step over `DRAWS` of them.

    Args:
        work: of one method.
        gpus: p.
        cluster: what they are.
        seed: of the GPUs' speeds.
    """
    rate = cluster.peak * cluster.reached
    buckets = max(1, -(-int(work.gradients) // int(cluster.bucket)))
    one = simulate_all_reduce(work.gradients / buckets, gpus, cluster)
    random = np.random.default_rng(seed)
    steps = []
    for _ in range(DRAWS):
        speed = 1 + cluster.spread * random.standard_normal(gpus)
        now = speed * work.batch * (work.student + work.teacher) / rate  # (p,) when each GPU's forward pass ends
        forward_waits, backward_waits = _waits(work, gpus, cluster)
        if forward_waits or backward_waits:
            now = np.full(gpus, now.max() + forward_waits)
        link = 0.0
        for bucket in range(1, buckets + 1):  # a bucket is summed once the slowest GPU has it
            ready = (now + speed * 2 * work.batch * work.student / rate * bucket / buckets).max()
            link = max(link, ready + backward_waits * bucket / buckets) + one
        steps.append(link)
    return float(np.mean(steps))


def _waits(work: Work, gpus: int, cluster: Cluster) -> tuple[float, float]:
    """What hides behind nothing, forward and backward."""
    small = simulate_all_reduce(4096, gpus, cluster)
    forward = (2 * work.norms + work.summed) * small
    if work.gathered:
        forward += simulate_ring(4 * work.gathered * work.batch, gpus, cluster, gather=True)
        forward += (work.batch * gpus) ** 2 * work.gathered / (cluster.peak * cluster.reached)
    if work.blocks:
        near = min(gpus, cluster.node)
        part = work.teacher_weights / work.blocks / near
        forward += work.blocks * simulate_ring(part, near, cluster, gather=True)
    return forward, 2 * work.norms * small

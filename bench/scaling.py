r"""A training step on paper, for 8 to 1,024 GPUs: ``python -m fastmkd.bench.scaling`` prints and draws it.

With p GPUs in m nodes, the teacher's forward, the student's forward and backward take :math:`t_T, t_F, t_B` on an
average GPU; the slowest of p takes :math:`s = 1 + \sigma \sqrt{2 \ln p}` times as long. DDP sends gradients in K
buckets while the backward pass runs, each by an all-reduce of time :math:`A`, so a step takes

.. math:: s (t_T + t_F) + C + \max(s t_B + A, \; s t_B / K + K A)

where C is what the method must wait for in its forward and backward pass: batch norms that count over ranks, the
gathering of maps for CKA, blocks of a teacher that is split. An all-reduce of n bytes is the faster one of ring and
double binary tree,

.. math:: A_{ring} = l + 2 (p - 1) \Big( h + \frac{n}{p B} \Big),

.. math::
    A_{tree} = l + \max\Big( 2 \big( h_{out} \lceil \log_2 m \rceil + h_{in} (g - 1) \big)
        + 2 \frac{m - 1}{m} \frac{n}{\theta B}, \; h_{in} (g - 1) + \frac{2 n}{\theta B_{in}} \Big)

with g GPUs a node, h the mean delay of a hop, B the bytes a second that leave a GPU (:math:`B_{in}` within a node), of
which trees reach a share :math:`\theta`. All numbers are predictions
from published figures and stated assumptions; nothing here is measured. `fastmkd.bench.scaling_simulation` plays the
same step event by event.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["GPUS", "H100", "Cluster", "Prediction", "Work", "all_reduce", "gather", "predict"]

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Cluster:
    """GPUs and what connects them. "Published" is what a vendor or NCCL's source says; "assumed" is this page's guess.

    Args:
        name: of the cluster.
        peak: floating-point operations a second in bf16, dense (published).
        reached: share of `peak` that training reaches (assumed).
        memory: bytes of a GPU (published).
        node: GPUs in a node, g.
        inside: bytes a second that leave a GPU within a node (published).
        outside: bytes a second that leave a node for each of its GPUs (published).
        wire: share of those that collectives reach (assumed).
        trees: share of that which trees reach, NCCL's own model (published).
        hop_inside: seconds from GPU to GPU, NCCL's own model (published).
        hop_outside: likewise between nodes (published).
        launch: seconds to start a collective, likewise (published).
        bucket: bytes of a DDP bucket (PyTorch's default).
        spread: standard deviation of a GPU's compute time over steps, as a share of it (assumed).
    """

    name: str
    peak: float
    reached: float
    memory: float
    node: int
    inside: float
    outside: float
    wire: float
    trees: float
    hop_inside: float
    hop_outside: float
    launch: float
    bucket: float
    spread: float

    def nodes(self, gpus: int) -> int:
        """How many nodes some GPUs fill."""
        return max(1, gpus // self.node)

    def bandwidth(self, gpus: int) -> float:
        """B: bytes a second. As many rings as a node has GPUs share its links, so all of them leave it at once."""
        one_node = self.nodes(gpus) == 1
        return self.wire * (self.inside if one_node else min(self.inside, self.node * self.outside))

    def hop(self, gpus: int) -> float:
        """h: mean delay of a hop of a ring that leaves each node once."""
        m = self.nodes(gpus)
        return self.hop_inside if m == 1 else ((gpus - m) * self.hop_inside + m * self.hop_outside) / gpus


H100 = Cluster(
    "H100 SXM, 8 a node, NVLink 4, 400 Gbit/s InfiniBand a GPU",
    peak=989e12, reached=0.35, memory=80e9, node=8, inside=450e9, outside=50e9, wire=0.8, trees=0.92,
    hop_inside=3.4e-6, hop_outside=14e-6, launch=8.4e-6, bucket=25 * 2**20, spread=0.02,
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a method does for an image, and sends.

    Args:
        name: of the method and its networks.
        batch: images of a GPU in a step.
        student: operations of the student's and the heads' forward pass; backward counts twice that.
        teacher: operations of the teacher's forward pass.
        gradients: bytes that DDP reduces.
        teacher_weights: bytes of the teacher.
        norms: batch norms that count over ranks: four small all-reduces each, two forward and two backward.
        gathered: numbers of an image's maps that every GPU gets from all others to measure CKA.
        summed: all-reduces of a few numbers that the step waits for.
        blocks: of a teacher that the GPUs of a node share, gathered one by one.
    """

    name: str
    batch: int
    student: float
    teacher: float
    gradients: float
    teacher_weights: float = 0.0
    norms: int = 0
    gathered: float = 0.0
    summed: int = 0
    blocks: int = 0


@dataclass(frozen=True)
class Prediction:
    """What a step comes to.

    Args:
        step: seconds.
        compute: seconds of it for teacher and student on an average GPU.
        waits: C, seconds.
        reduce: seconds that all gradient all-reduces take, hidden or not.
        buckets: K.
        memory: bytes that measuring CKA needs on each GPU.
    """

    step: float
    compute: float
    waits: float
    reduce: float
    buckets: int
    memory: float

    @property
    def efficiency(self) -> float:
        """Share of the step that is an average GPU's compute."""
        return self.compute / self.step


def ring(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds of a ring all-reduce; see the module."""
    if gpus == 1:
        return 0.0
    return cluster.launch + 2 * (gpus - 1) * (cluster.hop(gpus) + size / (gpus * cluster.bandwidth(gpus)))


def tree(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds of a double binary tree's all-reduce; see the module."""
    m = cluster.nodes(gpus)
    chain = cluster.hop_inside * (cluster.node - 1)
    delay = 2 * (cluster.hop_outside * math.ceil(math.log2(m)) + chain)
    between = delay + 2 * (m - 1) / m * size / (cluster.trees * cluster.bandwidth(gpus))
    within = chain + 2 * size / (cluster.trees * cluster.bandwidth(1))  # delays between nodes hide behind that
    return cluster.launch + max(between, within)


def all_reduce(size: float, gpus: int, cluster: Cluster) -> float:
    """A: seconds to sum `size` bytes over the GPUs, the faster way.

    Example:
        >>> all_reduce(4, 1024, H100) < 1e-3 < all_reduce(1e9, 1024, H100)
        True
    """
    found = ring(size, gpus, cluster)
    return found if cluster.nodes(gpus) == 1 else min(found, tree(size, gpus, cluster))


def gather(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds until every GPU has the `size` bytes of each."""
    return cluster.launch + (gpus - 1) * (cluster.hop(gpus) + size / cluster.bandwidth(gpus))


def waits(work: Work, gpus: int, cluster: Cluster) -> float:
    """C: seconds of what hides behind nothing."""
    small = all_reduce(4096, gpus, cluster)
    total = (4 * work.norms + work.summed) * small
    if work.gathered:
        images = work.batch * gpus
        total += gather(4 * work.gathered * work.batch, gpus, cluster)
        total += images**2 * work.gathered / (cluster.peak * cluster.reached)  # one triangle of each Gram matrix
    if work.blocks:
        near = min(gpus, cluster.node)
        total += work.blocks * gather(work.teacher_weights / work.blocks / near, near, cluster)
    return total


def cka_memory(work: Work, gpus: int) -> float:
    """Bytes of the gathered maps and of two Gram matrices."""
    images = work.batch * gpus
    return 4 * images * work.gathered + 2 * 4 * images**2 if work.gathered else 0.0


def predict(work: Work, gpus: int, cluster: Cluster = H100) -> Prediction:
    """The formula of the module.

    Args:
        work: of one method.
        gpus: p.
        cluster: what they are.

    Example:
        >>> work = Work("a ViT", batch=64, student=9e9, teacher=0.0, gradients=88e6)
        >>> predict(work, 8).efficiency > predict(work, 1024).efficiency > 0.5
        True
    """
    rate = cluster.peak * cluster.reached
    forward, backward = (work.batch * n / rate for n in (work.student + work.teacher, 2 * work.student))
    slowest = 1 + cluster.spread * math.sqrt(2 * math.log(gpus))
    buckets = max(1, math.ceil(work.gradients / cluster.bucket))
    one = all_reduce(work.gradients / buckets, gpus, cluster)
    waited = waits(work, gpus, cluster)
    last = max(slowest * backward + one, slowest * backward / buckets + buckets * one)
    step = slowest * forward + waited + last
    return Prediction(step, forward + backward, waited, buckets * one, buckets, cka_memory(work, gpus))


def described(cluster: Cluster) -> dict[str, Any]:
    """A cluster's inputs by name."""
    return asdict(cluster)


if __name__ == "__main__":
    import sys

    from fastmkd.bench.scaling_page import main

    sys.exit(main())

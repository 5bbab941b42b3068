"""Contrastive representation distillation, one of the losses that DPK is compared with: with its bank, and in-batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.autocast import autocast_dtype, no_autocast
from ..ops.registry import require
from .baselines import Answers, Baseline, Step
from .ranks import gather

__all__ = ["CRD", "BatchCRD"]


class Contrast(Baseline):
    """Base of both forms: each network's map is averaged over positions, taken to `width` dimensions, normalised.

    The usual weight, width and temperature are those of CRD's benchmark, whose numbers Table 1 of DPK repeats.

    Args:
        width: of the embeddings.
        temperature: tau of the contrast, which is not that of softened predictions.

    Raises:
        ValueError: a width below 1 or a temperature that is not positive.
    """

    weight = 0.8

    def __init__(self, width: int = 128, temperature: float = 0.07) -> None:
        if width < 1:
            raise ValueError(f"width is {width}; expected at least 1.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}; expected a finite positive number.")
        self.width, self.temperature = width, float(temperature)

    def heads(self, student: Answers, teacher: Answers) -> dict[str, nn.Module]:
        """Two linear layers for each stage.

        Args:
            student: for one image.
            teacher: for one image.
        """
        made: dict[str, nn.Module] = {}
        for i, (s, t) in enumerate(zip(student.maps, teacher.maps, strict=True)):
            made[f"student{i}"] = nn.Linear(s.shape[1], self.width)
            made[f"teacher{i}"] = nn.Linear(t.shape[1], self.width)
        return made

    def embedded(self, heads: nn.ModuleDict, student: Answers, teacher: Answers) -> list[tuple[Tensor, Tensor]]:
        """Returns ``(B, width)`` of the student and of the teacher for each stage.

        Args:
            heads: the linear layers.
            student: its maps count.
            teacher: its maps count.
        """
        pairs = enumerate(zip(student.maps, teacher.maps, strict=True))
        return [(embed(heads[f"student{i}"], s), embed(heads[f"teacher{i}"], t)) for i, (s, t) in pairs]


class CRD(Contrast):
    r"""CRD (Tian et al., 2020) with its memory bank: an embedding of every training image by each network.

    The student's embedding :math:`s_i` of an image must tell the stored :math:`\bar t_i` of the same image from
    :math:`\bar t_j` of K images drawn from the N of the training set, and the teacher's :math:`t_i` likewise
    :math:`\bar s_i` from :math:`\bar s_j`, by noise-contrastive estimation (Eq. 18):

    .. math:: -\frac{1}{B} \sum_i \Big[ \log h(s_i, \bar t_i) + \sum_{j=1}^{K} \log (1 - h(s_i, \bar t_j)) \Big]
        + (s \leftrightarrow t), \qquad h(a, b) = \frac{e^{a b / \tau} / Z}{e^{a b / \tau} / Z + K / N}

    Z is N times the mean of :math:`e^{ab / \tau}` in the first step, one for each bank, and stays. After each step the
    embeddings of its images (of all ranks) move into the banks: :math:`\bar s_i \leftarrow m \bar s_i + (1 - m) s_i`,
    normalised. The layer to name is the last stage.

    The bank must be told which images it sees: `FeatureKD` needs ``train_labels``, and its calls the images'
    ``numbers``. It takes 8 * width bytes for each training image, in checkpoints too.

    Args:
        negatives: K, drawn with replacement, anew for each image and step.
        momentum: m.
        other_classes: draw the negatives from other classes; False draws them from all other images.
        width: see `Contrast`.
        temperature: see `Contrast`.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> base = CRD(negatives=4)
        >>> {name: memory.rows.shape for name, memory in base.memories(1, torch.tensor([0, 0, 1])).items()}
        {'memory0': torch.Size([2, 3, 128])}
    """

    needs_image_numbers = True

    def __init__(
        self,
        negatives: int = 16384,
        momentum: float = 0.5,
        other_classes: bool = True,
        width: int = 128,
        temperature: float = 0.07,
    ) -> None:
        super().__init__(width, temperature)
        if negatives < 1:
            raise ValueError(f"negatives is {negatives}; expected at least 1.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; expected at least 0 and less than 1.")
        self.negatives, self.momentum, self.other_classes = negatives, float(momentum), other_classes

    def memories(self, stages: int, train_labels: Tensor) -> dict[str, nn.Module]:
        """A pair of banks for each stage.

        Args:
            stages: number of layers.
            train_labels: ``(N,)`` int64, the classes of the training images.
        """
        # Without classes each image is one of its own.
        labels = train_labels if self.other_classes else torch.arange(len(train_labels))
        options = (self.width, self.negatives, self.momentum, self.temperature)
        return {f"memory{i}": Memory(labels, *options) for i in range(stages)}

    def loss(self, heads: nn.ModuleDict, student: Answers, teacher: Answers, step: Step) -> Tensor:
        """Returns the sum over stages; in training mode the banks take the embeddings in.

        Args:
            heads: the linear layers and banks.
            student: its maps count.
            teacher: its maps count.
            step: its numbers count.
        """
        assert step.numbers is not None  # FeatureKD has checked them
        embedded = self.embedded(heads, student, teacher)
        return torch.stack([heads[f"memory{i}"](s, t, step.numbers) for i, (s, t) in enumerate(embedded)]).sum()


class Memory(nn.Module):
    """What both networks made of every training image, and the contrast of a batch with it, see `CRD`.

    All ranks of a distributed run hold the same banks: they start from the same rows, and each step writes the
    embeddings of all ranks into every bank.

    Args:
        labels: ``(N,)`` int64, the classes of the training images; images of one class are no negatives of each other.
        width: of the embeddings.
        negatives: K.
        momentum: share of the old row in the new one.
        temperature: tau.

    Raises:
        ValueError: there is nothing to contrast with.

    Example:
        >>> memory = Memory(torch.tensor([0, 0, 1, 1]), 8, negatives=5, momentum=0.5, temperature=0.07)
        >>> memory.draw(torch.tensor([0, 3])) // 2  # images 2 and 3, then images 0 and 1
        tensor([[1, 1, 1, 1, 1],
                [0, 0, 0, 0, 0]])
    """

    rows: Tensor
    log_z: Tensor
    by_class: Tensor
    first: Tensor
    of_class: Tensor

    def __init__(self, labels: Tensor, width: int, negatives: int, momentum: float, temperature: float) -> None:
        super().__init__()
        _, kind, sizes = labels.unique(return_inverse=True, return_counts=True)
        if len(sizes) < 2:
            raise ValueError("train_labels has images of one class only; CRD contrasts with images of other classes.")
        self.negatives, self.momentum, self.temperature = negatives, momentum, temperature
        rows = torch.randn(2, len(labels), width, generator=torch.Generator().manual_seed(0))  # alike on all ranks
        self.register_buffer("rows", F.normalize(rows, dim=2))  # the student's, the teacher's
        self.register_buffer("log_z", torch.full((2,), float("nan")))  # likewise; NaN before the first step
        # The images of class c are by_class[first : first + of_class]; the others are a range with a gap.
        self.register_buffer("by_class", kind.argsort(stable=True), persistent=False)
        self.register_buffer("first", (sizes.cumsum(0) - sizes)[kind], persistent=False)
        self.register_buffer("of_class", sizes[kind], persistent=False)

    def draw(self, numbers: Tensor) -> Tensor:
        """Draws for each image K others that are not of its class.

        Args:
            numbers: ``(B,)`` int64.

        Returns:
            ``(B, K)`` int64.
        """
        of_class, first = self.of_class[numbers][:, None], self.first[numbers][:, None]
        others = len(self.by_class) - of_class  # (B, 1)
        place = torch.randint(1 << 62, (len(numbers), self.negatives), device=numbers.device) % others
        return self.by_class[torch.where(place < first, place, place + of_class)]

    def forward(self, student: Tensor, teacher: Tensor, numbers: Tensor) -> Tensor:
        """Returns the loss; in training mode the embeddings move into the banks.

        Args:
            student: ``(B, width)`` of norm 1; gradients flow here.
            teacher: ``(B, width)`` of norm 1; gradients flow here, to its linear layer.
            numbers: ``(B,)`` int64, where in the training set each image stands.
        """
        count = len(self.by_class)
        require(((numbers >= 0) & (numbers < count)).all(), f"numbers holds an image outside 0 to {count - 1}.")
        drawn = torch.cat((numbers[:, None], self.draw(numbers)), dim=1).expand(2, -1, -1)  # itself, then its negatives
        with no_autocast(student.device):
            # The whole bank in one product, then a look-up: K rows copied for each image would be more to move.
            products = torch.stack((teacher, student)) @ self.rows.mT.to(student.dtype)  # (2, B, N)
            scores = products.gather(2, drawn) / self.temperature  # (2, B, 1 + K)
            log_z = self._normaliser(scores.detach())
            odds = scores - (log_z + math.log(self.negatives / count))[:, None, None]  # h is their sigmoid
            errors = F.softplus(-odds[:, :, 0]) + F.softplus(odds[:, :, 1:]).sum(2)  # (2, B)
        if self.training:
            self._remember(student, teacher, numbers)
        return errors.mean(1).sum()

    def _normaliser(self, scores: Tensor) -> Tensor:
        """``(2,)`` log Z: that of the first step in training, which nobody waits to know."""
        mean = gather(scores.exp().mean((1, 2))[None]).mean(0)
        log_z = torch.where(self.log_z.isnan(), (len(self.by_class) * mean).log(), self.log_z)
        if self.training:
            self.log_z.copy_(log_z)
        return log_z

    @torch.no_grad()
    def _remember(self, student: Tensor, teacher: Tensor, numbers: Tensor) -> None:
        numbers, new = gather(numbers), gather(torch.stack((student, teacher), dim=1))  # (G,), (G, 2, width)
        # An image that is there twice has its first embedding written twice, so that no rank sees another one win.
        new = new[(numbers[:, None] == numbers).int().argmax(1)].transpose(0, 1)
        moved = F.normalize(self.momentum * self.rows[:, numbers] + (1 - self.momentum) * new, dim=2)
        # Not in place: the backward pass of this step still needs the old rows.
        self.rows = self.rows.index_copy(1, numbers, moved.to(self.rows.dtype))


class BatchCRD(Contrast):
    r"""CRD with the other images of the batch as negatives, in place of its memory bank.

    A student's embedding :math:`s_i` must tell the teacher's :math:`t_i` of the same image from those of the batch's
    images of other classes, and the other way round:

    .. math:: -\frac{1}{B} \sum_i \log \frac{e^{s_i t_i / \tau}}{e^{s_i t_i / \tau} + \sum_{j: y_j \neq y_i}
        e^{s_i t_j / \tau}} \; + \; (s \leftrightarrow t)

    For loops that do not know their images' numbers, and for training sets too large for `CRD`'s bank. There are at
    most B - 1 negatives, those of this rank: take large batches, and do not quote the result as the paper's CRD.

    Args:
        width: see `Contrast`.
        temperature: see `Contrast`.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> base = BatchCRD()
        >>> image = Answers(torch.zeros(1, 10), [torch.zeros(1, 64, 8, 8)])
        >>> {name: head.in_features for name, head in base.heads(image, image).items()}
        {'student0': 64, 'teacher0': 64}
    """

    def loss(self, heads: nn.ModuleDict, student: Answers, teacher: Answers, step: Step) -> Tensor:
        """Returns the sum over stages.

        Args:
            heads: the linear layers.
            student: its maps count.
            teacher: its maps count.
            step: class indices, whose equals are no negatives; of soft labels only an image itself is none.
        """
        targets = step.targets
        every = torch.arange(len(targets), device=targets.device)
        itself = every[:, None] == every  # (B, B)
        left_out = (targets[:, None] == targets) & ~itself if targets.dim() == 1 else torch.zeros_like(itself)
        errors = []
        for own, other in self.embedded(heads, student, teacher):
            scores = (own @ other.mT / self.temperature).masked_fill(left_out, float("-inf"))
            errors += [F.cross_entropy(scores, every), F.cross_entropy(scores.mT, every)]
        return torch.stack(errors).sum()


def embed(head: nn.Module, features: Tensor) -> Tensor:
    """``(B, C, h, w)`` -> ``(B, width)`` of norm 1, in at least float32.

    The network may run in another precision than the head, as a teacher with a `teacher_dtype` does.

    Args:
        head: ``(B, C)`` -> ``(B, width)``.
        features: a map.

    Example:
        >>> embed(nn.Identity(), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 5, 5))
        tensor([[0.6000, 0.8000]])
    """
    pooled = features.mean((2, 3))
    if autocast_dtype(pooled.device) is None:
        pooled = pooled.to(next(head.parameters(), pooled).dtype)
    embedded: Tensor = head(pooled)
    return F.normalize(embedded if embedded.dtype == torch.float64 else embedded.float())

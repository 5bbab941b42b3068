"""The recipe's keys: everything that decides a run, as typed dataclasses; each key is also a command-line option.

A recipe is plain data. It names its networks (timm), its data set and its method (any `fastmkd.methods.DistillMethod`
by ``class_path``), so a new method or data set needs no new key here. `fastmkd.train.recipe` reads it from YAML.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "AugmentRecipe",
    "DataRecipe",
    "EmaRecipe",
    "MethodRecipe",
    "ModelRecipe",
    "OptimRecipe",
    "Recipe",
    "RunRecipe",
    "ScheduleRecipe",
    "StoredRecipe",
    "TeacherRecipe",
]


@dataclass
class DataRecipe:
    """Which pictures, and how they come in batches.

    Attributes:
        name: digits, fashion-mnist, cifar10, cifar100, imagefolder, shards (tar files), coco, segfolder, cityscapes or
            scenes.
        task: what the pictures are for, where a set serves several tasks; null takes its only one.
        root: folder of the data; null looks in the usual places.
        download: let torchvision download the set into root if it is not there.
        image_size: side in pixels that the networks get; null keeps the set's own. For detection the shorter side, the
            longer one being at most 1333/800 of it; student.kwargs.image_size says both. For segmentation the side of
            training crops.
        batch_size: training images in one forward pass of one process.
        eval_batch_size: test images in one forward pass.
        workers: processes that read and transform picture files.
        test_fraction: share of the pictures to test on, for sets that come without a test part.
        validation_fraction: holds out this share of the training pictures and tests on them instead of the test
            pictures, to choose settings without looking at those; null for the final runs.
        limit: train on this many pictures only, the first of a fixed shuffle; null takes all.
        label_fraction: train on this share of what is left of them, as many pictures of each class (at least one), as
            if no other had a label; null takes all. A smaller share is a part of a larger one.
        subset_seed: chooses those; not the run's seed, so that all runs of a comparison see the same pictures.
        mean: per channel, to normalise with; null takes the set's own.
        std: per channel, to normalise with; null takes the set's own.
    """

    name: str = "digits"
    task: Literal["classification", "detection", "segmentation"] | None = None
    root: str | None = None
    download: bool = False
    image_size: int | None = None
    batch_size: int = 128
    eval_batch_size: int = 256
    workers: int = 2
    test_fraction: float = 0.2
    validation_fraction: float | None = None
    limit: int | None = None
    label_fraction: float | None = None
    subset_seed: int = 0
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass
class ModelRecipe:
    """A network from timm or `fastmkd.nn.cifar`.

    Attributes:
        name: timm's name of the network, or a name such as cifar.wrn_16_2.
        kwargs: for timm.create_model, for example patch_size or depth; what the data decides (num_classes, in_chans and
            img_size) is filled in unless given.
        weights: .safetensors or .pth file to start from.
        backbone: the same without its classifier, which is made anew for the classes of the data.
        pretrained: let timm download its pretrained weights.
    """

    name: str = "vit_tiny_patch16_224"
    kwargs: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    backbone: str | None = None
    pretrained: bool = False


@dataclass
class TeacherRecipe:
    """The network to learn from: a model with weights, or the recipe that trains it.

    Attributes:
        recipe: YAML file, relative to this one, whose finished run gives the teacher; it is trained first if needed.
        options: changes to that recipe, by dotted key, for example {schedule.epochs: 1}.
        name: as the student's; not needed with recipe.
        kwargs: as for the student.
        weights: .safetensors or .pth file of the trained teacher.
        pretrained: let timm download its pretrained weights.
    """

    recipe: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    pretrained: bool = False


@dataclass
class MethodRecipe:
    """A method: import path of a DistillMethod and its arguments besides student and teacher.

    Attributes:
        class_path: full import path.
        init_args: arguments by name.
    """

    class_path: str = "fastmkd.methods.supervised.Supervised"
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimRecipe:
    """How the weights move.

    Attributes:
        name: timm's name of the optimizer; one whose state no checkpoint can hold, such as kron, is refused.
        lr: learning rate, for lr_images images per update.
        lr_images: null uses lr as it is; a number scales it by images per update / lr_images.
        weight_decay: not applied to biases and norms.
        layer_decay: factor on the learning rate per layer counted from the head; null for none.
        clip_grad: largest norm of the gradient; null for no limit.
        accumulate: batches whose gradients make one update.
        skip_nonfinite: how many updates whose loss or gradient is NaN or infinite to leave out before the run stops;
            they are counted, and the batch of the first is kept. 0 stops at the first; with more, every update waits
            for the device.
        kwargs: further arguments of the optimizer, for example {betas: [0.9, 0.95]}; what would have no effect is
            refused.
    """

    name: str = "adamw"
    lr: float = 1e-3
    lr_images: int | None = None
    weight_decay: float = 0.05
    layer_decay: float | None = None
    clip_grad: float | None = None
    accumulate: int = 1
    skip_nonfinite: int = 0
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScheduleRecipe:
    """Linear warm-up, then half a cosine or steps; set anew at each update.

    Attributes:
        epochs: passes over the training pictures.
        warmup_epochs: how long the learning rate rises; parts of an epoch count.
        warmup_lr: where it starts; optim.lr if that is lower.
        min_lr: where the cosine ends; optim.lr if that is lower, which then stays as it is.
        milestones: epochs done after which the rate is multiplied by gamma, in place of the cosine, for example [16,
            21]; null has the cosine.
        gamma: of the milestones.
        last_lr: a rate of its own for the last epochs, whatever came before; the cosine ends where they begin. Null has
            none.
        last_epochs: how many these are; parts of an epoch count.
    """

    epochs: int = 20
    warmup_epochs: float = 1.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    milestones: list[float] | None = None
    gamma: float = 0.1
    last_lr: float | None = None
    last_epochs: float = 2.0


@dataclass
class AugmentRecipe:
    """What is done to training pictures.

    Attributes:
        crop: pad shifts by up to pad pixels, resized cuts a random part (scale) and resizes it, none does neither.
        pad: pixels.
        scale: smallest and largest share of the area that a resized crop takes.
        flip: probability of a left-right flip.
        rand_augment: timm's RandAugment string, for example rand-m9-mstd0.5-inc1.
        random_erasing: probability that a rectangle is filled with noise.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none.
        mix_prob: probability that a batch is mixed at all.
        switch_prob: probability of cutmix when both are on.
        label_smoothing: share of the label that is spread over all classes.
    """

    crop: Literal["none", "pad", "resized"] = "none"
    pad: int = 4
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.0
    rand_augment: str | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    label_smoothing: float = 0.0


@dataclass
class EmaRecipe:
    """Moving average of the student's weights; it is what gets evaluated and exported.

    Attributes:
        decay: share of the old average that an update keeps.
        warmup: start with a smaller decay and let it grow.
    """

    decay: float = 0.999
    warmup: bool = True


@dataclass
class RunRecipe:
    """Where and how to run; nothing here but precision changes the result.

    Attributes:
        root: folder of all runs.
        dir: folder of this run; null is root/name.
        precision: no (float32), bf16 or fp16 mixed precision; fp16 needs a GPU.
        device: cpu forces the CPU; null, the default, takes the GPU if there is one.
        log_every: updates between two log lines.
        eval_every: epochs between two evaluations; the last epoch is always evaluated.
        save_every: updates between two checkpoints, besides the one after each epoch; 0 for none.
        keep: how many checkpoints to keep.
        resume: auto goes on from the newest complete checkpoint, never refuses a folder that has one, anything else is
            a checkpoint's folder, to go on from until this run has checkpoints that came from it.
        tensorboard: write TensorBoard files beside the CSV.
        panels: at how many moments of training, spread evenly, to keep what the method sees in eight test pictures
            (saliency, kept patches) for fastmkd show --over-training; 0 for none.
        shard_teacher: split the blocks of a frozen ViT teacher over the processes of a node, each of which gathers a
            block while it runs; for teachers that do not fit beside the student.
    """

    root: str = "runs"
    dir: str | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["cpu"] | None = None
    log_every: int = 50
    eval_every: int = 1
    save_every: int = 0
    keep: int = 2
    resume: str = "auto"
    tensorboard: bool = True
    panels: int = 6
    shard_teacher: bool = False


@dataclass
class Recipe:
    """Everything that decides a run.

    Attributes:
        name: of the run and of its folder.
        seed: all randomness is a function of it and of the position in training.
        data: which pictures.
        student: the network to train.
        teacher: the network to learn from, or null.
        method: what is trained how; not a dataclass of jsonargparse but any DistillMethod.
        optim: how the weights move.
        schedule: for how long.
        augment: what is done to training pictures.
        ema: moving average of the weights, or null.
        run: where and how to run.

    Example:
        >>> Recipe().data.name
        'digits'
    """

    name: str = "run"
    seed: int = 0
    data: DataRecipe = field(default_factory=DataRecipe)
    student: ModelRecipe = field(default_factory=ModelRecipe)
    teacher: TeacherRecipe | None = None
    method: MethodRecipe = field(default_factory=MethodRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    ema: EmaRecipe | None = None
    run: RunRecipe = field(default_factory=RunRecipe)

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.run.dir) if self.run.dir else Path(self.run.root) / self.name


class StoredRecipe(Recipe):
    """A recipe out of the folder of a run: data, which may name no code but fastmkd's, see `fastmkd.train.trust`.

    Example:
        >>> StoredRecipe().data.name
        'digits'
    """

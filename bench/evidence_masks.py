"""What a teacher makes of parts of a picture, chosen in several ways: at random, by brightness, by saliency.

    python -m fastmkd.bench.evidence_masks RUN [RUN ...] > bench/results/evidence/teacher_under_masks.txt

Each RUN is the folder of a finished run; the first one's network is the teacher, the saliency of all is looked at. Of
the patches that one way ranks, the best k are shown, then the worst k. Test pictures, the first thousand.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from fastmkd import MaskedViT, select_tokens
from fastmkd.train.augment import Finisher
from fastmkd.train.build import trained_student
from fastmkd.train.data import load_data
from fastmkd.train.recipe import recipe_from_dict
from fastmkd.train.rundir import RunDir

IMAGES = 1000


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table.

    Args:
        argv: folders of finished runs, the teacher's first; arguments of the process by default.
    """
    folders = [Path(name) for name in (sys.argv[1:] if argv is None else argv)]
    model, description = trained_student(RunDir(folders[0]))
    teacher = MaskedViT(model)
    source = load_data(recipe_from_dict(description["recipe"]).data)
    finish = Finisher(source.mean, source.std, source.num_classes)
    raw = source.test.images[:IMAGES]
    images, targets = finish(raw, source.test.labels[:IMAGES])
    grid = teacher.patch_grid()
    brightness = F.adaptive_avg_pool2d(raw.float().mean(1, keepdim=True), grid).flatten(1)  # (B, N)
    torch.manual_seed(0)
    ways = {"random": torch.rand_like(brightness), "brightness": brightness}
    for folder in folders:
        network = MaskedViT(trained_student(RunDir(folder))[0])
        ways[folder.name] = network(images, return_saliency=True)[1]

    def top1(keep: torch.Tensor | None) -> float:
        return 100 * (teacher(images, keep=keep).argmax(1) == targets).float().mean().item()

    patches = brightness.shape[1]
    print(f"Top-1 of {folders[0].name} on {len(images)} test pictures, all {patches} patches: {top1(None):.1f} %")
    print(f"{'patches ranked by':48} {'k':>2}  best k  worst k   brightness in the best k")
    for name, scores in ways.items():
        for k in (round(0.75 * patches), round(0.5 * patches), round(0.25 * patches)):
            best = select_tokens(scores, k)
            share = (brightness.gather(1, best).sum(1) / brightness.sum(1)).mean().item()
            worst = top1(select_tokens(-scores, k))
            print(f"{name:48} {k:2}  {top1(best):4.1f} %   {worst:4.1f} %   {100 * share:3.0f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())

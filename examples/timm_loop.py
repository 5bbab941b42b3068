"""MaskedKD with timm's own parts: named models, mixup with soft labels, its optimizer, schedule and weight averages.

Random pictures stand in for a data set, so this runs anywhere; the models are real but shallow. Swap in
``timm.data.create_loader`` and ``pretrained=True`` for the real thing.

    python examples/timm_loop.py --steps 4
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import fastmkd


def main() -> None:
    """Distils a distilled-token DeiT-Ti student from a DeiT III teacher that takes larger pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)

    student = timm.create_model("deit_tiny_distilled_patch16_224", img_size=112, depth=3, drop_path_rate=0.1)
    student.set_distilled_training()  # labels teach the class head, the teacher teaches the distillation head
    teacher = timm.create_model("deit3_small_patch16_224", img_size=160, depth=3)
    method = fastmkd.MaskedKD(student, teacher, keep_ratio=0.5).to(args.device).train()

    optimizer = create_optimizer_v2(method, opt="adamw", lr=5e-4, weight_decay=0.05)
    schedule = CosineLRScheduler(optimizer, t_initial=args.steps, warmup_t=1, warmup_lr_init=1e-6)
    average = ModelEmaV3(student, decay=0.99)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=1000)
    for step in range(args.steps):
        images = torch.randn(args.batch, 3, 112, 112, device=args.device)
        labels = torch.randint(1000, (args.batch,), device=args.device)
        images, soft_labels = mixup(images, labels)  # the teacher sees the mixed pictures too
        with torch.autocast(args.device, torch.bfloat16):
            out = method(images, soft_labels)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
        schedule.step(step + 1)
        average.update(student)
        print(f"step {step}", *(f"{name} {value.item():.3f}" for name, value in out.terms.items()))


if __name__ == "__main__":
    main()

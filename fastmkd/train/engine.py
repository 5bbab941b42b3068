"""The training loop, on Hugging Face Accelerate.

The device is not waited for inside a step; numbers are read every ``run.log_every`` updates. Everything random is a
function of (seed, position), so a run that was interrupted anywhere ends with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..ops.choice import prepare
from .accelerator import make_accelerator, refuse_precision
from .bad_batch import Skips, Tried, keep_bad_batch
from .build import Setup, assemble
from .checkpoint import save_tensors
from .errors import UserError, shorten
from .evaluate import evaluate_loss, summary
from .interrupt import Interrupts, RunInterrupted
from .loading import Batch, Loader, epoch_plan
from .logs import RunLog, headline
from .meter import Meter
from .method_keys import settle_updates
from .optim import Schedule, build_optimizer
from .over_training import Snapshots
from .resuming import bad_pictures, left_out_batches, resume, save
from .rundir import RunDir
from .schema import Recipe
from .seeds import seed_all
from .sharding import WholeCopy, name_units, shard_like, shard_teacher
from .tasks import task_of
from .together import by_all, from_main

__all__ = ["Trainer", "train"]


def train(recipe: Recipe) -> dict[str, Any]:
    """Trains a recipe, or goes on with its run, or returns the result of the finished one.

    Args:
        recipe: what to train. A teacher that comes from a recipe is trained first.

    Returns:
        What ``result.json`` holds: ``top1``, ``top5`` and ``loss`` on the test pictures (of a detector ``map`` and its
        like, of a method that pre-trains its loss and terms there), ``epochs``, ``updates``, ``seconds``,
        ``images_per_second``, ``milliseconds_per_update``, ``skipped_updates``, ``skipped_batches``,
        ``bad_pictures``, ``weights``.

    Raises:
        UserError: the recipe, the device or the data do not fit, the folder belongs to another run, or the loss is not
            finite.
        RunInterrupted: Ctrl-C or SIGTERM came; a checkpoint has been written.
    """
    run = RunDir(recipe.run_dir)
    if run.result() is None:
        refuse_precision(recipe)
    setup = assemble(recipe, train)
    accelerator = make_accelerator(recipe)
    with contextlib.ExitStack() as held:

        def take() -> str:
            held.enter_context(run.lock())
            run.claim(setup.identity, setup.description)
            return run.content()

        content = from_main(accelerator, take)
        done = by_all(accelerator, lambda: run.result_as_seen(content))
        if done is not None:
            accelerator.print(f"{recipe.name}: finished before, in {run.path} ({summary(done)}).")
            return done
        with Interrupts(enabled=accelerator.num_processes == 1) as interrupts:
            trainer = Trainer(setup, accelerator, run)
            held.callback(trainer.loader.close)
            held.callback(trainer.test_loader.close)
            result = trainer.run_all(interrupts)
        accelerator.free_memory()
        return result


class Trainer:
    """One run: networks, optimizer and position; `fastmkd.train.resuming` saves it and goes on with it.

    Args:
        setup: the objects of the run.
        accelerator: of Hugging Face Accelerate.
        run: folder of the run, the same on all processes.
    """

    def __init__(self, setup: Setup, accelerator: Any, run: RunDir) -> None:
        recipe, source = setup.recipe, setup.source
        self.setup, self.recipe, self.accelerator, self.run = setup, recipe, accelerator, run
        self.student = setup.student
        world, accumulate = accelerator.num_processes, recipe.optim.accumulate
        self.images_per_update = recipe.data.batch_size * world * accumulate
        self.updates_per_epoch = len(self.plan(0)) // accumulate
        self.total = recipe.schedule.epochs * self.updates_per_epoch
        settle_updates(setup.method, recipe, self.total)
        self.step = 0  # updates done
        self.bad: dict[str, str] = {}  # pictures that could not be read before it was resumed
        self.left_out = 0  # batches that the method left out before it was resumed
        self.origin: dict[str, str] | None = None  # which checkpoint `run.resume` made it go on from

        device, augment = accelerator.device, recipe.augment
        prepare(device)  # before any op runs there
        size, seed = source.image_size, recipe.seed
        self.task = task_of(source)
        self.loader = Loader(source.train, recipe.data, augment, size, device, seed, self.task)
        self.test_loader = Loader(source.test, recipe.data, None, size, device, seed, self.task)
        self.finish, self.finish_test = self.task.finisher(source, augment), self.task.finisher(source)

        sharded = accelerator.is_fsdp2
        setup.method.to(device)  # with the teacher, which FSDP does not see
        if recipe.run.shard_teacher and world > 1:
            shard_teacher(setup.teacher, device)
        self.whole: Any = WholeCopy(self.student, device) if sharded else contextlib.nullcontext
        self.ema: Any = None
        if recipe.ema is not None:
            from timm.utils import ModelEmaV3

            decay, warmup = recipe.ema.decay, recipe.ema.warmup
            mixed = sharded and any(True for _ in self.student.buffers())  # split and whole tensors in one fused update
            self.ema = ModelEmaV3(self.student, decay=decay, use_warmup=warmup, foreach=not mixed)
        optimizer = build_optimizer(recipe.optim, self.student, setup.method.heads, self.images_per_update)
        self.schedule = Schedule(recipe.schedule, optimizer, self.updates_per_epoch)
        if sharded:
            name_units(setup.method)
        self.method, self.optimizer = accelerator.prepare(setup.method, optimizer)
        if sharded and self.ema is not None:
            shard_like(self.ema.module, self.student)
        if sharded:
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(self.method, "pictures")  # gathers weights for it as for `forward`
        self.snapshots = Snapshots(setup, run, self.test_loader, self.finish_test, accelerator)
        self.parameters = [p for p in self.method.parameters() if p.requires_grad]
        self.skips = Skips(self)

    def plan(self, epoch: int) -> Tensor:
        """Returns which pictures each batch of an epoch takes on this process; see `epoch_plan`.

        Args:
            epoch: from 0.
        """
        accelerator, recipe = self.accelerator, self.recipe
        return epoch_plan(
            len(self.setup.source.train),
            recipe.data.batch_size,
            recipe.seed,
            epoch,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            group=recipe.optim.accumulate,
        )

    def run_all(self, interrupts: Interrupts) -> dict[str, Any]:
        """Goes on from the newest checkpoint, trains to the end, writes weights and result.

        Args:
            interrupts: asked once per update.

        Returns:
            See `train`.
        """
        recipe, accelerator = self.recipe, self.accelerator
        problems = resume(self)
        began, start = time.perf_counter(), self.step
        meter = Meter(accelerator)
        log = RunLog(self.run, self.total, self.step, accelerator.is_main_process, recipe.run.tensorboard)
        with log:
            warnings = [f"warning: {problem}" for problem in [*self.setup.source.notes, *problems]]
            for line in (headline(self), *self.task.notes(self.student), *warnings):
                log.say(line)
            begun, inside = divmod(self.step, self.updates_per_epoch)
            scores: dict[str, float] = {}
            if not inside and not from_main(accelerator, lambda: log.tested):  # it died between checkpoint and test
                scores = self._test_if_due(begun, log)
            for epoch in range(begun, recipe.schedule.epochs):
                if self.step % self.updates_per_epoch == 0:
                    self.snapshots.take(epoch)
                self._train_epoch(epoch, meter, log, interrupts)
                scores = self._test_if_due(epoch + 1, log)
            self.snapshots.take(recipe.schedule.epochs)
            scores = scores or self.test()  # resumed after the last test
            bad = sorted(bad_pictures(self))
            if bad:
                log.say(f"{len(bad)} pictures could not be read and were skipped: {shorten(bad)}")
            left_out = left_out_batches(self)
            if left_out:
                log.say(f"{left_out} batches were left out, whose images or teacher's answers were not finite.")
        updates = max(1, self.step - start)
        result = {
            "name": recipe.name,
            **scores,
            "epochs": recipe.schedule.epochs,
            "updates": self.total,
            "seconds": time.perf_counter() - began,
            "images_per_second": meter.images / max(meter.seconds, 1e-9),
            "milliseconds_per_update": 1e3 * meter.seconds / updates,
            "skipped_updates": self.skips.count,
            "skipped_batches": left_out,
            "bad_pictures": bad,
            "weights": str(self.run.weights),
        }
        self._save_student()
        if accelerator.is_main_process:
            self.run.finish(result)
        accelerator.wait_for_everyone()
        return result

    def _test_if_due(self, done: int, log: RunLog) -> dict[str, float]:
        """Tests and records it if it is time to after so many epochs; no scores if it is not."""
        epochs = self.recipe.schedule.epochs
        if done == 0 or (done < epochs and done % self.recipe.run.eval_every):
            return {}
        scores = self.test()
        log.numbers(self.step, done - 1, {f"test.{name}": value for name, value in scores.items()})
        log.say(f"epoch {done}/{epochs}  test {summary(scores)}")
        return scores

    def _train_epoch(self, epoch: int, meter: Meter, log: RunLog, interrupts: Interrupts) -> None:
        recipe, accumulate = self.recipe, self.recipe.optim.accumulate
        done = self.step - epoch * self.updates_per_epoch
        batches = self.loader.batches(self.plan(epoch), epoch, start=done * accumulate)
        self.method.train()
        meter.resume()
        with contextlib.closing(batches):  # type: ignore[type-var]
            for _ in range(done, self.updates_per_epoch):
                self._update(batches, meter)
                at_end = self.step % self.updates_per_epoch == 0
                if self.step % recipe.run.log_every == 0 or at_end:
                    self._log(meter, log, epoch)
                stop = interrupts.requested
                if stop or at_end or (recipe.run.save_every and self.step % recipe.run.save_every == 0):
                    self._log(meter, log, epoch)  # looks at the loss, so that no broken state is saved
                    meter.pause()
                    save(self)
                    meter.resume()
                log.advance(self.step)
                if stop:
                    raise RunInterrupted(
                        f"stopped at update {self.step} of {self.total}; the same command goes on from there."
                    )
        meter.pause()

    def _update(self, batches: Iterator[Batch], meter: Meter) -> None:
        """One step of the optimizer, on `accumulate` batches."""
        accelerator, accumulate = self.accelerator, self.recipe.optim.accumulate
        self.schedule.step_update(self.step)
        self.setup.method.set_epoch(self.step / self.updates_per_epoch)
        self.skips.begin()
        tried: list[Tried] = []
        for micro in range(accumulate):
            batch = next(batches)
            images, targets = self.finished(batch, self.step, micro)
            told = {"numbers": batch.numbers} if self.setup.method.needs_image_numbers else {}
            last = micro + 1 == accumulate
            with contextlib.nullcontext() if last else accelerator.no_sync(self.method):
                with accelerator.autocast():
                    out = self.method(images, targets, **told)
                accelerator.backward(out.loss / accumulate)
            tried.append(self.skips.tried(out, images, targets))
        self.step += 1
        scaled = accelerator.scaler is not None  # a gradient that has been unscaled must not be left out by others
        if self.skips.leaves_out(tried, None if scaled else self._clip()):
            return
        for one in tried:
            meter.add(one.loss, one.terms, one.size * accelerator.num_processes)
        if scaled:
            self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.student, step=self.step)

    def _clip(self) -> Tensor | None:
        """Limits the gradient as the recipe says; returns what its norm was, if anyone needs it."""
        limit = self.recipe.optim.clip_grad or math.inf
        needed = limit < math.inf or self.skips.allowed
        return self.accelerator.clip_grad_norm_(self.parameters, limit) if needed else None

    def finished(self, batch: Batch, step: int, micro: int) -> tuple[Any, Any]:
        """Returns images and targets as the method gets them; seeds what it draws, too.

        Args:
            batch: as read.
            step: updates done before.
            micro: which batch of the update.
        """
        seed_all(self.recipe.seed, "step", step, micro, self.accelerator.process_index)
        return self.finish(batch.images, batch.targets)

    def _log(self, meter: Meter, log: RunLog, epoch: int) -> None:
        values, speed = meter.flush()
        if not values:
            return
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise UserError(
                f"{shorten(broken)} is not finite (seen at update {self.step} of {self.total}): training has diverged. "
                "Lower optim.lr, lengthen schedule.warmup_epochs or set optim.clip_grad; the last checkpoint is intact."
                + keep_bad_batch(self, meter.losses, epoch)
            )
        rate = self.optimizer.param_groups[0]["lr"]
        log.numbers(self.step, epoch, {**{f"train.{k}": v for k, v in values.items()}, "lr": rate}, speed)

    def test(self) -> dict[str, float]:
        """Returns the test scores of the moving average if there is one, else of the student; see `Task.evaluate`.

        A method that pre-trains has its loss there instead, see `evaluate_loss`.
        """
        model = self.student if self.ema is None else self.ema.module
        if self.accelerator.num_processes > 1 and not self.accelerator.is_fsdp2:
            for buffer in model.buffers():  # running statistics, which DDP lets differ until the next step
                dist.broadcast(buffer, src=0)  # those that are saved
        count, size = len(self.setup.source.test), self.recipe.data.eval_batch_size
        how = (self.test_loader, self.finish_test, count, size, self.accelerator)
        if self.setup.method.pretrains:
            scores = evaluate_loss(self.method, *how, self.recipe.seed)
        else:
            with self.whole(model) as whole:
                scores = self.task.evaluate(whole, *how)
        if not scores["images"]:
            raise UserError(f"none of the {count} test pictures can be read.")
        return scores

    def _save_student(self) -> None:
        """Writes the bare student (its moving average if there is one) with timm's keys.

        Also the heads of a method that pre-trains, whose loss needs them, or of one whose pictures do.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole: Any = get_model_state_dict(self.method, options=options)
        heads = {key.removeprefix("heads."): v for key, v in whole.items() if key.startswith("heads.")}
        weights: Any = {key.removeprefix("student."): v for key, v in whole.items() if key.startswith("student.")}
        if self.ema is not None:
            weights = get_model_state_dict(self.ema.module, options=options)
        method = self.setup.method
        if self.accelerator.is_main_process:
            if method.pretrains or (heads and method.has_pictures):
                save_tensors(self.run.heads, heads)
            weights = method.bare_weights(weights)
            save_tensors(self.run.weights, weights, {"format": "pt", "model": self.recipe.student.name})
        self.accelerator.wait_for_everyone()

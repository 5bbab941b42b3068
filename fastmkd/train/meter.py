"""Running means of a step's terms, kept on the device, and the speed."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

__all__ = ["Meter"]


class Meter:
    """Sums terms without waiting for the device; `flush` reads the means.

    Args:
        accelerator: of Hugging Face Accelerate; averages over processes.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.images = 0  # of the whole run, over all processes
        self.seconds = 0.0  # spent in training, without tests and checkpoints
        self.losses: list[Tensor] = []  # of this process, of each batch that the last flush took in
        self._sums: dict[str, Tensor] = {}
        self._losses: list[Tensor] = []
        self._window_images = 0
        self._window_seconds = 0.0
        self._since: float | None = None

    def add(self, loss: Tensor, terms: dict[str, Tensor], images: int) -> None:
        """Adds a batch.

        Args:
            loss: scalar.
            terms: scalars by name.
            images: of all processes.
        """
        for name, value in {"loss": loss, **terms}.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._losses.append(loss.detach())
        self._window_images += images

    def resume(self) -> None:
        """Starts the clock."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stops the clock, so that tests and checkpoints do not count."""
        if self._since is not None:
            self._window_seconds += time.perf_counter() - self._since
            self._since = None

    def flush(self) -> tuple[dict[str, float], float]:
        """Waits for the device and returns the means since the last call, and images per second.

        Returns:
            Nothing and 0 if no batch was added since.
        """
        if not self._losses:
            return {}, 0.0
        means = torch.stack(list(self._sums.values())) / len(self._losses)
        values = self.accelerator.reduce(means, reduction="mean").tolist()
        result = dict(zip(self._sums, values, strict=True))
        running = self._since is not None
        self.pause()
        speed = self._window_images / max(self._window_seconds, 1e-9)
        self.images += self._window_images
        self.seconds += self._window_seconds
        self.losses = self._losses
        self._sums, self._losses, self._window_images, self._window_seconds = {}, [], 0, 0.0
        if running:
            self.resume()
        return result, speed

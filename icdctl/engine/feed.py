"""An epoch's views on the device, always in the same memory, and the position of the batch that is due.

The position is a counter on the device: reading a batch through it is the same work at every step, so a CUDA graph can
hold that work, and the host need not say where it is. Shapes: B images of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icdctl.data import Views


class Feed:
    """Batches of an epoch, read through a position on the device."""

    drawn: Views
    """The epoch on the CPU."""
    views: Views
    """The epoch on the device."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        """
        Args:
            batch_size: images of a full batch.
            device: the students' device.
        """
        self.batch_size, self.device = batch_size, device
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        """Number of the due step in its epoch, from 0."""
        self._offsets = torch.arange(batch_size, device=device)

    def load(self, drawn: Views, *, first_step: int = 0) -> None:
        """Load an epoch in place of the last one, and go to its first step.

        Args:
            drawn: its views on the CPU: as many images as in all epochs, and no seed of random augmentation.
            first_step: number of the step to go to, where an epoch is continued.
        """
        self.drawn = drawn
        if not hasattr(self, "views"):
            self.views = drawn[torch.arange(len(drawn))].to(self.device)
        self.views.copy_(drawn)
        self.position.fill_(first_step)

    def rows(self, size: int, *, cycle: int | None = None) -> Tensor:
        """Positions of the due batch's images in the epoch: [B] int64.

        Args:
            size: B.
            cycle: count the position modulo this many steps.
        """
        position = self.position if cycle is None else self.position % cycle
        return position * self.batch_size + self._offsets[:size]

    def batch(self, size: int) -> Views:
        """The views of the due batch, of `size` images."""
        return self.views[self.rows(size)]

"""The processes of one training run, started by torchrun (PyTorch's own engine); without it, one.

Micro-batches of a step are dealt over the ranks, gradients are summed. Rank 0 alone prints and writes. Nothing but
typed tensors crosses between ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from trilemma.errors import ConfigError

_BUCKET_ELEMENTS = 8 << 20
_PATIENCE = timedelta(hours=2)  # the others wait while rank 0 tokenises; torchrun notices a dead one by itself


class Processes:
    """This process among its peers: `rank` of `world`; `device` to compute on."""

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world, self.device = rank, world, device

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def mine(self, number: int) -> bool:
        """Whether item `number` (a micro-batch of the step, a validation batch) is this process's."""
        return number % self.world == self.rank

    def sum(self, values: list[float]) -> list[float]:
        """The sums over all processes, the same bits everywhere."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sums the gradients over all processes, in buckets of one type each."""
        if self.world == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (
                bucket[0].dtype != parameter.grad.dtype or sum(g.numel() for g in bucket) > _BUCKET_ELEMENTS
            ):
                _sum_bucket(bucket)
                bucket = []
            bucket.append(parameter.grad)
        if bucket:
            _sum_bucket(bucket)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Every process takes rank 0's values."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Rank 0 runs the body, then the others do: what it wrote is there for them to read."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()


@contextmanager
def started(device: str) -> Iterator[Processes]:
    """Joins the group that torchrun describes in the environment, or stands alone; leaves it at the end.

    A group that the caller has initialised already is used and left alone.

    Args:
        device: "cpu", "cuda" or "mps"; with cuda, each process takes the GPU of its local rank.
    Raises:
        ConfigError: the environment is incomplete, or there are more processes than GPUs.
    """
    world = _number("WORLD_SIZE", 1)
    local = _number("LOCAL_RANK", 0)
    place = torch.device(device)
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(f"process {local} has no GPU: there are {torch.cuda.device_count()}; use fewer processes")
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    ours = world > 1 and not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        rank = dist.get_rank() if world > 1 else 0
        yield Processes(rank, world, place)
    finally:
        if ours and dist.is_initialized():
            dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process may print, before any group exists."""
    return _number("RANK", 0) == 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ConfigError(f"environment variable {name}: a number is needed, found {text!r}")
    return int(text)


def _sum_bucket(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()

"""AdamW, the moving average of the weights, and both as named tensors for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from trilemma.config import TrainingConfig
from trilemma.models import SequenceModel
from trilemma.runs.tensors import model_tensors


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019; torch's fused form) and an optional moving average of the weights.

    Decayed are the matrices that `model.no_weight_decay` does not exempt.

    State exists from the start, so that a checkpoint is read into place and its shapes are known before.
    """

    def __init__(self, model: SequenceModel, config: TrainingConfig) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        plain = model.no_weight_decay()
        groups = [
            {"params": [p for n, p in self.parameters.items() if n not in plain], "weight_decay": config.weight_decay},
            {"params": [p for n, p in self.parameters.items() if n in plain], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=all(p.device.type in ("cpu", "cuda", "mps") for p in self.parameters.values()),
        )
        for parameter in self.parameters.values():
            self._adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
        self._model = model_tensors(model)
        self._decay = config.ema
        self._ema = {name: t.detach().clone() for name, t in self._model.items()} if config.ema is not None else {}

    def step(self, number: int, rate: float) -> None:
        """Optimizer step `number` (from 1) with the gradients as they are; they are dropped afterwards."""
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self.clear()
        if self._decay is not None:
            # early averages forget faster, or the random initial weights would dominate them
            decay = min(self._decay, (1 + number) / (10 + number))
            for name, average in self._ema.items():
                current = self._model[name].detach()
                if average.is_floating_point():
                    average.lerp_(current, 1 - decay)
                else:
                    average.copy_(current)

    def clear(self) -> None:
        """Drops the gradients."""
        self._adam.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """State by name: "exp_avg.NAME", "exp_avg_sq.NAME", "ema.NAME". The tensors themselves, not copies."""
        result = {f"ema.{name}": average for name, average in self._ema.items()}
        for name, parameter in self.parameters.items():
            state = self._adam.state[parameter]
            result |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
        return result

    def set_step(self, number: int) -> None:
        """After `tensors` were read from a checkpoint: goes on after optimizer step `number`."""
        for state in self._adam.state.values():
            state["step"].fill_(float(number))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model holds its moving average meanwhile; without one, nothing changes."""
        kept = {name: self._model[name].detach().clone() for name in self._ema}
        assign(self._model, self._ema)
        try:
            yield
        finally:
            assign(self._model, kept)

    def use_average(self) -> None:
        """The model takes the moving average for good; without one, nothing changes."""
        assign(self._model, self._ema)


@torch.no_grad()
def assign(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies each of `values` into the target of its name."""
    for name, value in values.items():
        targets[name].copy_(value)

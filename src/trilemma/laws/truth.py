"""Law 8, truth: each fast operator against its naive reference, forward and backward.

What laws cannot see is a consistently wrong equation; oracles that somebody else wrote stand in tests/.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trilemma.laws.case import Case
from trilemma.laws.report import NotApplicableError
from trilemma.laws.subject import Subject
from trilemma.ops.truth import TruthPair


def truth(subject: Subject) -> None:
    """Random shapes, in float64."""
    pairs = subject.example.truth_pairs()
    if not pairs:
        raise NotApplicableError("stands on no operator of ours")
    for pair in pairs:
        for case in subject.cases(f"truth/{pair.name}", torch.float64, 10, 100):
            _compare(case, pair)


def _compare(case: Case, pair: TruthPair) -> None:
    drawn = pair.draw(case.generator, case.dtype)
    leaves = {k: v for k, v in drawn.items() if isinstance(v, Tensor) and v.is_floating_point()}
    shapes = {k: list(v.shape) if isinstance(v, Tensor) else v for k, v in drawn.items()}
    case.describe(operator=pair.name, **shapes)
    results = []
    for form in (pair.fast, pair.naive):
        fresh = {name: value.clone().requires_grad_() for name, value in leaves.items()}
        outputs = form(**{**drawn, **fresh})
        loss = sum((value.sum() * 0 for value in fresh.values()), torch.zeros((), dtype=case.dtype))  # if all is masked
        for output in outputs:
            weights = torch.arange(1, output.numel() + 1).view(output.shape).cos()
            loss = loss + (output * weights).sum()
        found = torch.autograd.grad(loss, list(fresh.values()))
        results.append((outputs, dict(zip(fresh, found, strict=True))))
    (fast, fast_gradients), (naive, naive_gradients) = results
    for number, (got, want) in enumerate(zip(fast, naive, strict=True)):
        case.close(got.reshape(-1), want.reshape(-1), f"output {number} of {pair.name}", "fast form = naive reference")
    for name, want in naive_gradients.items():
        got = fast_gradients[name]
        claim = "gradients of the fast form = those of the naive reference"
        case.close(got.reshape(-1), want.reshape(-1), f"gradient of {pair.name}'s {name}", claim)

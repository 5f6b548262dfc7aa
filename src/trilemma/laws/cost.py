"""Law 5, cost: declared parameters, FLOPs, State bytes and growth are the counted ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from trilemma.laws.case import Case
from trilemma.laws.report import ViolationError
from trilemma.laws.subject import Subject
from trilemma.mixers.base import MemoryMixer
from trilemma.state import State


def cost(subject: Subject) -> None:
    """Counted by torch's FlopCounterMode (attention by the query-key pairs that its mask allows) and by the State."""
    # Costs do not depend on the device, and torch cannot see into cuDNN's recurrent kernels.
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        for case in subject.cases("cost", torch.float64, 2, 8):
            counted = sum(parameter.numel() for parameter in case.mixer.parameters())
            case.describe(parameters=counted)
            _equal(case.mixer.count_parameters(), counted, "count_parameters()")
            _flops(case, subject)
            if subject.carries_state:
                _state_bytes(case)


def _flops(case: Case, subject: Subject) -> None:
    mixer, memory_length = case.mixer, 0
    memory = None
    if isinstance(mixer, MemoryMixer):
        memory_length = case.integer(1, 9)
        values = case.normal(1, memory_length, mixer.memory_width)
        memory = values, torch.tensor([memory_length])
        _equal(mixer.memory_flops(memory_length), count_flops(lambda: mixer.remember(values)), "memory_flops(length)")
    with torch.no_grad():
        for length in (1, case.integer(2, 30), case.pick((64, 65, 100))):
            case.describe(length=length, memory=memory_length)
            x = case.normal(1, length, mixer.d_model)
            state = None if memory is None else mixer.remember(memory[0])  # type: ignore[operator]
            counted = count_flops(lambda x=x, state=state: case.run(x, state))  # type: ignore[misc]
            _equal(mixer.flops(length, memory_length), counted, f"flops({length}, {memory_length})")
        if not subject.carries_state or memory is not None:
            return
        for context, length in ((case.integer(1, 30), 1), (case.integer(1, 30), case.integer(2, 9)), (70, 1)):
            case.describe(context=context, length=length)
            x = case.normal(1, context + length, mixer.d_model)
            _, state = case.step(x[:, :context], mixer.init_state(1))
            counted = count_flops(lambda x=x, state=state, at=context: case.run(x[:, at:], state))  # type: ignore[misc]
            _equal(mixer.flops(length, context), counted, f"flops({length}, {context})")


def _state_bytes(case: Case) -> None:
    mixer = case.mixer
    constant = set()
    with torch.no_grad():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for length in (1, case.integer(2, 20), 90):
                case.describe(length=length, dtype=dtype)
                state = _after(case, length, dtype)
                if state is None:
                    continue
                _equal(mixer.state_bytes(length, dtype), state.nbytes // 2, f"state_bytes({length}, {dtype})")
                if state.capacity_nbytes < state.nbytes:
                    raise ViolationError("capacity_nbytes is at least nbytes", "State")
                if dtype == case.dtype:
                    constant.add(state.capacity_nbytes)
    if case.mixer.capabilities.constant_state and len(constant) != 1:
        raise ViolationError(f"constant_state: the State keeps its size; found {sorted(constant)} bytes", "State")


def _after(case: Case, length: int, dtype: torch.dtype) -> State | None:
    """The State of two rows after `length` tokens, held in `dtype`."""
    if isinstance(case.mixer, MemoryMixer):  # it has the type of its keys and values
        if dtype != case.dtype:
            return None
        return case.mixer.remember(case.normal(2, length, case.mixer.memory_width))
    _, state = case.step(case.normal(2, length, case.mixer.d_model), case.mixer.init_state(2, dtype=dtype))
    return state


def _equal(declared: int, counted: int, what: str) -> None:
    if declared != counted:
        raise ViolationError(f"{what} is declared as {declared}, {counted} is counted", error=float(declared - counted))


def count_flops(action: Callable[[], object]) -> int:
    """FLOPs of matrix products that `action` executes (multiply-add = 2).

    Attention counts 2 (D + D_v) for each query-key pair that its mask allows, whichever kernel runs it.
    """
    counter = FlopCounterMode(display=False)
    with counter, _AttentionByPairs(counter) as attention:
        action()
    total: int = counter.get_total_flops() + attention.correction
    return total


class _AttentionByPairs(TorchFunctionMode):
    """Replaces what the counter saw within `scaled_dot_product_attention` by the pairs that are needed."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter, self.correction = counter, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        before = self.counter.get_total_flops()
        result = func(*args, **kwargs)
        seen = self.counter.get_total_flops() - before
        self.correction += _needed(*args, **kwargs) - seen
        return result


def _needed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> int:
    batch, heads, length, width = query.shape
    if attn_mask is not None:
        allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
        pairs = int(allowed.expand(batch, heads, length, key.shape[2]).sum())
    elif is_causal:
        pairs = batch * heads * length * (length + 1) // 2
    else:
        pairs = batch * heads * length * key.shape[2]
    return 2 * pairs * (width + value.shape[3])

"""Known bugs of other code bases, planted one at a time: each is caught by the law that should catch it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import trilemma.mixers.attention as attention_module
import trilemma.mixers.retention as retention_module
from trilemma.laws import check
from trilemma.mixers.attention import Attention
from trilemma.mixers.base import Mixer, Replay
from trilemma.mixers.bidirectional import Bidirectional
from trilemma.mixers.cross_attention import CrossAttention, Memory
from trilemma.mixers.gru import GRU
from trilemma.mixers.lstm import LSTM
from trilemma.mixers.retention import Retention, RetentionState
from trilemma.nn.cache import KVCache, RingCache
from trilemma.ops.attention import ATTEND, attention_mask
from trilemma.ops.decayed_scan import DECAYED_SCAN, decayed_scan
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged, call_positions
from trilemma.state import State

D_MODEL = 16
Shared = Mapping[str, Tensor] | None
Result = tuple[Tensor, State | None]


@dataclass(frozen=True)
class Mutant:
    """A mixer with a bug, the law that sees it, and what has to be patched for it."""

    law: str
    factory: Callable[[], Mixer]
    patches: list[tuple[Any, str, Any]] = field(default_factory=list)


MUTANTS: dict[str, Mutant] = {}


def mutant(law: str, *patches: tuple[Any, str, Any], **options: Any) -> Callable[[type[Mixer]], type[Mixer]]:
    """Registers a class as a mutant that `law` must catch."""

    def add(cls: type[Mixer]) -> type[Mixer]:
        MUTANTS[cls.__name__] = Mutant(law, lambda: cls(d_model=D_MODEL, **options), list(patches))
        return cls

    return add


# split


@mutant("split", normaliser=True, group_norm="none", decay="experiments")
class NormaliserOfTheChunk(Retention):
    """The normaliser counts from the call's first token, not from the sequence's (torchscale#40, #77)."""

    def _mask_row_sums(self, positions: Tensor) -> Tensor:
        return super()._mask_row_sums(positions - positions[:, :1])


@mutant("split", chunk_size=4)
class DroppedLastChunk(Retention):
    """A last chunk that is shorter than the others is lost (fla#98)."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        y, after = super().mix(x, state, ragged, shared)
        whole = x.shape[1] // self.chunk_size * self.chunk_size
        if 0 < whole < x.shape[1]:
            y = torch.cat([y[:, :whole], torch.zeros_like(y[:, whole:])], dim=1)
        return y, after


@mutant("split")
class StateNotRolled(GRU):
    """Prefill leaves the State at zero; only steps update it (mamba#536, #739)."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        before = None if state is None else state.clone()
        y, after = super().mix(x, state, ragged, shared)
        return y, before if x.shape[1] > 1 else after


def _scan_without_mask(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *rest: Any, **named: Any) -> Any:
    if q.shape[2] > 1:
        log_decay = torch.zeros_like(log_decay)
    return decayed_scan(q, k, v, log_decay, *rest, **named)


@mutant("split", (retention_module, "decayed_scan", _scan_without_mask))
class DecayMaskForgotten(Retention):
    """The parallel form lacks the decay that the step has (syncdoth/RetNet#10)."""


@mutant("split")
class StepIsNotForward(LSTM):
    """One token at a time is computed by other code than the whole sequence (mamba#500, #641)."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        y, after = super().mix(x, state, ragged, shared)
        return (y * 1.01 if state is not None and x.shape[1] == 1 else y), after


def _positions_from_zero(length: int, ragged: Ragged | None, offset: Any, device: torch.device) -> Tensor:
    return call_positions(length, ragged, 0, device)


@mutant("split", (retention_module, "call_positions", _positions_from_zero))
class PositionsRestart(Retention):
    """Each call rotates from position 0 (x-transformers PR#81)."""


def _top_left(query_positions: Tensor, key_positions: Tensor, causal: bool, *rest: Any) -> Tensor:
    mask = attention_mask(query_positions, key_positions, False, *rest)
    corner = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
    return mask & corner if causal else mask


@mutant("split", (attention_module, "attention_mask", _top_left))
class TopLeftMask(Attention):
    """With fewer queries than keys the causal triangle sits in the wrong corner (x-transformers#187, lag-llama#81)."""


@mutant("split", window=4)
class RingDropsLiveKeys(Attention):
    """A ring a slot short: across its edge a key is lost that the window still sees (fla#431)."""

    def new_state(self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device) -> Any:
        return RingCache.empty(rows, self.num_kv_heads, self.head_dim, 2, rewind, dtype, device)


@mutant("split")
class CarriedGradientCut(Retention):
    """The carried State is detached: outputs are right, gradients are not."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        return super().mix(x, None if state is None else state.detach(), ragged, shared)


@mutant("split")
class LengthsOfThePadding(Retention):
    """A padded row's length advances by the padded width."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        y, after = super().mix(x, state, ragged, shared)
        if isinstance(after, RetentionState) and ragged is not None and ragged.lengths is not None:
            after = replace(after, lengths=after.lengths + x.shape[1] - ragged.lengths)
        return y, after


@mutant("split")
class ReservedRoomCountsPadding(Attention):
    """Padding fills the reserved room: this was ours, found by the law."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        if isinstance(state, KVCache) and state.fixed and state.bound + x.shape[1] > state.keys.shape[2]:
            raise RuntimeError("no room")
        return super().mix(x, state, ragged, shared)


# causality


@mutant("causality")
class FutureSeen(Attention):
    """No causal mask on whole sequences."""

    def _attend_call(self, *arguments: Any) -> Tensor:
        self.causal = False
        try:
            return super()._attend_call(*arguments)
        finally:
            self.causal = True


@mutant("causality")
class PrefixIgnored(Attention):
    """A prefix is accepted and read causally."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        return super().mix(x, state, None if ragged is None else replace(ragged, prefix=None), shared)


@mutant("causality", causal=False, inner="gru")
class OneDirectionOnly(Bidirectional):
    """The backward half runs forward, too."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        return self.ahead(x, None, ragged, shared)[0] + self.back(x, None, ragged, shared)[0], None


# raggedness


@mutant("raggedness", causal=False)
class PaddingIgnored(Attention):
    """An encoder attends to padding (transformers#31540, torchscale#85)."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        return super().mix(x, state, None if ragged is None else replace(ragged, lengths=None), shared)


@mutant("raggedness")
class PaddingDecaysTheState(Retention):
    """Padding adds nothing to the State but lets it decay."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        y, after = super().mix(x, state, ragged, shared)
        if isinstance(after, RetentionState) and ragged is not None and ragged.lengths is not None:
            late = (x.shape[1] - ragged.lengths)[:, None, None, None]
            after = replace(after, matrix=after.matrix * 0.97**late)
        return y, after


@mutant("raggedness")
class PackedBoundaryLost(Retention):
    """Packed neighbours leak into each other (fla#1086, mamba#180)."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        return super().mix(x, state, None if ragged is None else replace(ragged, segments=None), shared)


@mutant("raggedness")
class SegmentsOverwrittenByLengths(Attention):
    """Given lengths and segments together, one is dropped (fla#1086)."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        if ragged is not None and ragged.lengths is not None and ragged.segments is not None:
            ragged = Ragged(lengths=ragged.lengths)
        return super().mix(x, state, ragged, shared)


@mutant("raggedness")
class BatchMatesMatter(GRU):
    """A statistic over the batch (lm-eval#3055)."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        y, after = super().mix(x - 0.1 * x.mean(0, keepdim=True), state, ragged, shared)
        return y, after


@mutant("raggedness")
class MemoryPaddingInGradients(CrossAttention):
    """NaN in a memory's padding is masked in the outputs and poisons the gradients: this was ours, found by the law."""

    def remember(self, memory: Tensor, lengths: Tensor | None = None, state: Any = None) -> Memory:
        result = super().remember(memory, lengths, state)
        if lengths is not None:
            poison = (self.key_value(memory) * 0).sum()
            late = torch.arange(result.cache.keys.shape[2]) >= lengths[:, None]
            keys = torch.where(late[:, None, :, None], poison, result.cache.keys)
            result = replace(result, cache=replace(result.cache, keys=torch.where(keys.isnan(), 0, keys)))
        return result


# state


def _select_without_reorder(self: KVCache, rows: Tensor) -> KVCache:
    order = torch.arange(len(rows)) % len(self.lengths)
    kept = replace(self, keys=self.keys[order].clone(), values=self.values[order].clone())
    return replace(kept, lengths=self.lengths.index_select(0, rows))


@mutant("state", (KVCache, "select", _select_without_reorder))
class ReorderNotApplied(Attention):
    """Beams are reordered, their keys stay (fla's cache has no reorder; transformers#34232)."""


@mutant("state", (RetentionState, "clone", lambda self: replace(self, lengths=self.lengths.clone())))
class CloneAliases(Retention):
    """A fork shares the tensor that its original writes to."""


@mutant("state", (Replay, "rewind", lambda self, counts: replace(self, counts=self.counts - counts)))
class RewindWithoutRestoring(Retention):
    """The length is taken back, the recurrent State is not (transformers#49036)."""


@mutant("state")
class WritesUnderAutograd(GRU):
    """The State given is written to while gradients are recorded."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        y, after = super().mix(x, state, ragged, shared)
        if state is not None and after is not None:
            for name, tensor in state.tensors().items():
                tensor.data.copy_(after.tensors()[name].data)
        return y, after


@mutant("state")
class AddressMoves(LSTM):
    """New tensors at each step, where a captured graph reads the old ones."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        y, after = super().mix(x, state, ragged, shared)
        return y, None if after is None else after.clone()


@mutant("state")
class HiddenMemory(GRU):
    """Something is remembered outside the State (llama.cpp#14211, mamba#1024)."""

    last: Tensor | None = None

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        y, after = super().mix(x, state, ragged, shared)
        if state is not None and not torch.is_grad_enabled():
            if self.last is not None:
                y = y + 1e-3 * self.last
            self.last = y.mean().detach()
        return y, after


@mutant("state", (Memory, "select", lambda self, rows: replace(self, source=self.source[: len(rows)], group=0)))
class SourcesNotReordered(CrossAttention):
    """Hypotheses move, what they read does not."""


@mutant(
    "state",
    (Memory, "select", lambda self, rows: Memory(self.cache.select(self.source[rows]), torch.arange(len(rows)), 1)),
)
class MemoryCopied(CrossAttention):
    """Each beam carries a copy of its source's keys (transformers#27449)."""


# cost


@mutant("cost")
class FlopsOfTheSquare(Attention):
    """Causal attention counted as the full square."""

    def flops(self, length: int, context: int = 0) -> int:
        inner = self.num_heads * self.head_dim
        return super().flops(length, context) + 4 * inner * (length * (length - 1) // 2)


@mutant("cost")
class StateGrows(Retention):
    """Declared constant, grows with the tokens read."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        y, after = super().mix(x, state, ragged, shared)
        return y, None if after is None else GrownState(x.detach().clone(), after)


@dataclass
class GrownState(State):
    """A State with the inputs kept beside it."""

    inputs: Tensor
    inner: State


@mutant("cost", bias=True)
class BiasesNotCounted(Attention):
    """A parameter formula that forgets the biases."""

    def count_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.ndim > 1)


# training


def _split_exponentials(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Any, starts: Any, size: int, want: bool
) -> Any:
    if state is not None or starts is not None:
        return decayed_scan(q, k, v, log_decay, state, starts, size, want)
    g = log_decay * torch.arange(1, q.shape[2] + 1)
    scores = (q * g.exp()[..., None].to(q.dtype)) @ (k * (-g).exp()[..., None].to(k.dtype)).transpose(-1, -2)
    return scores.tril() @ v, None


@mutant("training", (retention_module, "decayed_scan", _split_exponentials), decay="one", num_heads=1)
class DecayOverflows(Retention):
    """gamma^n / gamma^m by two exponentials: right at short lengths, infinite at long ones."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        self.log_decay = [-0.15]
        return super().mix(x, state, ragged, shared)


@mutant("training")
class UnwrittenMemory(GRU):
    """The first State is whatever the allocator returns (fla PR#967)."""

    def new_state(self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device) -> Any:
        state = super().new_state(rows, capacity, rewind, dtype, device)
        return replace(state, h=torch.empty_like(state.h))


@mutant("training")
class WeightOutsideTheStateDict(GRU):
    """Something learned or drawn that no checkpoint holds."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.offset = torch.randn(d_model)

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        y, after = super().mix(x, state, ragged, shared)
        return y + self.offset.to(y.dtype), after


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * context.saved_tensors[0]  # a factor of 2 is missing


@mutant("training")
class WrongGradient(GRU):
    """A backward written by hand, consistently wrong in every form."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        return super().mix(_WrongGradient.apply(x), state, ragged, shared)


# compile


@mutant("compile")
class GraphBreak(Attention):
    """A number read from a tensor, without a declared reason."""

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        if float(x.detach().abs().max()) > 1e6:
            x = x / 2
        return super().mix(x, state, ragged, shared)


@mutant("compile")
class GraphPerStep(Attention):
    """A Python number that grows is baked into the graph: each token compiles again."""

    seen = 0

    def mix(self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared) -> Result:
        if state is not None:
            assert isinstance(state, KVCache)
            x = x + torch.zeros([1] * (1 + state.bound % 7)).sum()
        return super().mix(x, state, ragged, shared)


# truth


def _scan_forgets_decay(**given: Any) -> tuple[Tensor, ...]:
    out, state = decayed_scan(**{**given, "log_decay": given["log_decay"] * 0.9}, want_state=True)
    assert state is not None
    return out, state


@mutant("truth")
class ConsistentlyWrongScan(Retention):
    """All forms of the operator agree on a wrong decay."""

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        return (replace(DECAYED_SCAN, fast=_scan_forgets_decay),)


@mutant("truth")
class MaskAddedAsZero(Attention):
    """Masked keys keep a score of zero instead of minus infinity."""

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        def fast(**given: Any) -> tuple[Tensor, ...]:
            mask = given.pop("mask", None)
            if mask is not None:
                given["keys"] = given["keys"] * mask.any(dim=(1, 2))[:, None, :, None]
            return ATTEND.fast(**given)

        return (replace(ATTEND, fast=fast),)


@pytest.mark.laws
@pytest.mark.parametrize("name", MUTANTS)
def test_the_law_catches_the_mutant(name: str, session_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = MUTANTS[name]
    for target, attribute, replacement in planted.patches:
        monkeypatch.setattr(target, attribute, replacement)
    report = check(planted.factory, laws=[planted.law], seed=session_seed)
    assert not report.ok, f"{name} passed the law of {planted.law} with seed {session_seed}"
    (result,) = report.failures
    assert result.reason
    assert result.case
    assert f"seed={session_seed}" in result.reproduce


def test_there_are_mutants_for_every_law() -> None:
    laws = {planted.law for planted in MUTANTS.values()}
    assert laws == {"split", "causality", "raggedness", "state", "cost", "training", "compile", "truth"}
    assert len(MUTANTS) >= 12


_SOUND: dict[str, Callable[[], Mixer]] = {
    "retention": lambda: Retention(D_MODEL, normaliser=True, group_norm="none", decay="experiments", chunk_size=4),
    "attention": lambda: Attention(D_MODEL),
    "window": lambda: Attention(D_MODEL, window=4),
    "encoder": lambda: Attention(D_MODEL, causal=False),
    "cross_attention": lambda: CrossAttention(D_MODEL),
    "gru": lambda: GRU(D_MODEL),
    "lstm": lambda: LSTM(D_MODEL),
    "bidirectional": lambda: Bidirectional(D_MODEL, inner="gru"),
    "one head": lambda: Retention(D_MODEL, decay="one", num_heads=1),
}


@pytest.mark.laws
@pytest.mark.parametrize("name", _SOUND)
def test_the_unmutated_mixer_is_lawful(name: str, session_seed: int) -> None:
    """At the mutants' sizes and seed: what is caught above is the bug, not the bench."""
    laws = ["split", "causality", "raggedness", "state", "cost", "training", "truth"]
    check(_SOUND[name], laws=laws, seed=session_seed).require()

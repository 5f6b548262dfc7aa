"""The contract of a token mixer: one class in one file that moves information between positions.

    y, state = mixer(x, state=None, ragged=None, shared=None)        # x, y: [batch, length, d_model]

Whole sequence, chunks of any size or token by token: the same y, the same onward behaviour. `trilemma verify` proves
it.

To add a mixer, subclass `Mixer`, decorate it with `@register_mixer("name")`, and write `mix`, `new_state`, `flops` and
`state_bytes`. See docs/add-a-mixer.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from trilemma.errors import CapabilityError
from trilemma.ops.truth import TruthPair
from trilemma.ragged import Ragged, zero_padding
from trilemma.state import CacheKind, State, updated

# What the layers of one stack share during one call: its learned tensors, and what layers make for later ones.
Shared = MutableMapping[str, Any]
# What such a value is. Aligned with the tokens of the call: the shape of one token's, the value being a tensor [batch,
# length, *shape]; at padding it is finite and means nothing. Anything else: in words, which both sides must agree on.
Published = tuple[int, ...] | str


@dataclass(frozen=True)
class Capabilities:
    """What a mixer class can do. Declared is tested.

    Attributes:
        causal: may be built with causal=True: no output depends on a later token.
        bidirectional: may be built with causal=False: every output may depend on every token. No State.
        prefix: a causal mixer that can read a prefix in both directions (`Ragged.prefix`).
        constant_state: the State's size does not grow with the tokens read.
        reads_memory: reads a State that another part produced and appends nothing itself (cross-attention).
        rewinds: its own State can take tokens back; otherwise the base class replays them.
        keeps_keys: its State holds keys and values, in 8 bits if `Mixer.cache` says so.
        compiles: True, or the reason why `torch.compile` is not used.
    """

    causal: bool = True
    bidirectional: bool = False
    prefix: bool = False
    constant_state: bool = False
    reads_memory: bool = False
    rewinds: bool = False
    keeps_keys: bool = False
    compiles: bool | str = True


class Mixer(nn.Module, ABC):
    """Base of all mixers.

    Attributes:
        name: set by `@register_mixer`.
        capabilities: what the class can do.
        d_model: width of input and output.
        causal: the direction that this instance was built for.
        compiles: the capability, for this instance.
        cache: how keys and values are held, where `capabilities.keeps_keys`: None: as activations are; or "int8", for
            inference only. Set before the first State is made.
    """

    name: ClassVar[str] = ""
    capabilities: ClassVar[Capabilities] = Capabilities()

    def __init__(self, d_model: int, causal: bool = True) -> None:
        super().__init__()
        able = self.capabilities
        if causal and not (able.causal or able.reads_memory):
            raise CapabilityError(f'mixer "{self.name}" cannot be causal; it may serve in encoders only')
        if not causal and not (able.bidirectional or able.reads_memory):
            raise CapabilityError(f'mixer "{self.name}" is causal only; in encoders wrap it: mixer "bidirectional"')
        self.d_model = d_model
        self.causal = causal
        self.compiles: bool | str = able.compiles
        self.cache: CacheKind = None

    @classmethod
    def law_variants(cls) -> list[dict[str, Any]]:
        """Options that the laws are run with, one instance each; the first is the mixer as most people build it.

        "causal" may be among them. Every branch of `mix` should be reached by one of them.
        """
        return [{}]

    @classmethod
    def truth_pairs(cls) -> tuple[TruthPair, ...]:
        """The operators that this mixer stands on, each with its naive reference; the law "truth" compares them."""
        return ()

    @abstractmethod
    def mix(
        self, x: Tensor, state: State | None, ragged: Ragged | None, shared: Shared | None
    ) -> tuple[Tensor, State | None]:
        """The mixer itself; arguments and result as in `forward`, checked, with x zero at padding."""

    @abstractmethod
    def new_state(
        self, rows: int, capacity: int | None, rewind: int, dtype: torch.dtype, device: torch.device
    ) -> State:
        """An empty State; `rewind` is 0 unless `capabilities.rewinds`."""

    @abstractmethod
    def flops(self, length: int, context: int = 0) -> int:
        """Floating-point operations of matrix products (multiply-add = 2) for `length` new tokens of one row, forward,
        after `context` tokens. Causal attention is counted by the pairs that it needs."""

    @abstractmethod
    def state_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Payload bytes of one row's State after `length` tokens, made with `dtype`."""

    def count_parameters(self) -> int:
        """Declared number of weights; the default counts them, a mixer may state its formula instead."""
        return sum(parameter.numel() for parameter in self.parameters())

    def shared_inputs(self) -> Mapping[str, tuple[int, ...]]:
        """Learned tensors that the stack owns and hands to every layer through `shared`: name -> shape."""
        return {}

    def publishes(self) -> Mapping[str, Published]:
        """Values that `mix` makes for later layers by `shared[name] = value`: name -> what it is.

        A class with the option `producer` makes its values in the first layer of a stack that could, and reads them in
        all others.
        """
        return {}

    def reads(self) -> Mapping[str, Published]:
        """Values that a layer before this one publishes and `mix` takes from `shared`, as `publishes` declares them.

        A mixer that reads what is not aligned with tokens must rewind by itself.
        """
        return {}

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that an optimizer must not decay, beyond vectors, which never are."""
        return set()

    def forward(  # final in spirit; nn.Module's own `forward` is a plain attribute, which forbids the decorator
        self,
        x: Tensor,
        state: State | None = None,
        ragged: Ragged | None = None,
        shared: Shared | None = None,
    ) -> tuple[Tensor, State | None]:
        """Mixes the tokens of one call.

        Args:
            x: [batch, length, d_model].
            state: what the rows read before, from `init_state` or an earlier call; None: a whole sequence, and no State
                is built.
            ragged: padding, packing, prefixes; None: every position is a token of one sequence a row.
            shared: the stack's values for all layers; what this mixer publishes is added to it.

        Returns:
            y of x's shape (padding positions hold finite, meaningless values), and the State to go on with.

        Raises:
            CapabilityError: a State for a bidirectional mixer, a packed call with a State, a prefix that the mixer
                cannot read, or one that begins after the first token; a value that it reads is not in `shared`.
        """
        if state is None and self.capabilities.reads_memory:
            raise CapabilityError(f'mixer "{self.name}" reads a memory: give it the State that holds it')
        if state is not None and not self.capabilities.reads_memory:
            if not self.causal:
                raise CapabilityError(
                    f'mixer "{self.name}" was built bidirectional: it reads whole sequences, no State'
                )
            if ragged is not None and ragged.is_packed:
                raise CapabilityError("packed rows hold whole sequences; they cannot carry a State")
        if ragged is not None and ragged.prefix is not None and not self.capabilities.prefix:
            raise CapabilityError(f'mixer "{self.name}" cannot read a prefix in both directions')
        # What padding holds, NaN included, ends here; a mixer sees zeros there.
        if x.shape[1] == 0:
            return x, state
        x = zero_padding(x, ragged.valid(x.shape[1]) if ragged is not None else None)
        for name in self.reads():
            if shared is None or name not in shared:
                raise CapabilityError(f'mixer "{self.name}" reads "{name}", which a layer before it must publish')
        if shared is None and self.publishes():
            shared = {}
        if isinstance(state, Replay):
            return state.run(self, x, ragged, shared)
        return self.mix(x, state, ragged, shared)

    @final
    def init_state(
        self,
        rows: int,
        capacity: int | None = None,
        rewind: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        """An empty State for `rows` sequences.

        Args:
            rows: batch size.
            capacity: tokens to reserve room for; None: it grows.
            rewind: how many tokens `State.rewind` may take back.
            dtype: of the payload; None: the weights' type. Recurrences keep float32 at least.
            device: None: the weights' device.

        Raises:
            CapabilityError: the mixer was built bidirectional.
        """
        if not self.causal and not self.capabilities.reads_memory:
            raise CapabilityError(f'mixer "{self.name}" was built bidirectional: it has no State')
        weight = next((each for each in self.parameters() if each.is_floating_point()), torch.empty(0))
        dtype = dtype or weight.dtype
        place = torch.device(device) if device is not None else weight.device
        if rewind and not self.capabilities.rewinds:
            return Replay.empty(self, rows, capacity, rewind, dtype, place)
        return self.new_state(rows, capacity, rewind, dtype, place)


class MemoryMixer(Mixer):
    """Base of mixers that read a memory: `capabilities.reads_memory`.

    Attributes:
        memory_width: width of the memory's positions.
    """

    memory_width: int

    @abstractmethod
    def remember(self, memory: Tensor, lengths: Tensor | None = None, state: Any = None) -> State:
        """The State that holds a memory [sources, positions, memory_width] with `lengths` [sources] valid positions, or
        `state` with more of it."""

    @abstractmethod
    def memory_flops(self, length: int) -> int:
        """FLOPs of `remember` for one source of `length` positions."""


@dataclass
class Replay(State):
    """Rewinding for States that cannot shorten themselves: an anchor in the past and the inputs since.

    `current` is the State after all tokens; `anchor` lies up to 2 * limit tokens back; `recent` holds the mixer's
    inputs since, x and the values that it reads side by side. Rewinding shortens `recent`; the next call rebuilds
    `current` from the anchor. The anchor moves up only when `recent` is full, so a token is run twice on average.
    """

    current: State
    anchor: State
    recent: Tensor  # [rows, 2 * limit, d_model + width of what is read]
    counts: Tensor  # [rows] inputs held in `recent`
    limit: int
    bound: int  # at least max(counts), known to Python
    stale: bool  # `current` must be rebuilt

    @classmethod
    def empty(
        cls, mixer: Mixer, rows: int, capacity: int | None, limit: int, dtype: torch.dtype, device: torch.device
    ) -> Replay:
        """No tokens read yet."""
        return cls(
            current=mixer.new_state(rows, capacity, 0, dtype, device),
            anchor=mixer.new_state(rows, capacity, 0, dtype, device),
            recent=torch.zeros(rows, 2 * limit, sum(_widths(mixer)), dtype=dtype, device=device),
            counts=torch.zeros(rows, dtype=torch.int64, device=device),
            limit=limit,
            bound=0,
            stale=False,
        )

    def rewind(self, counts: Tensor) -> Replay:
        """Takes tokens back; `current` is rebuilt at the next call."""
        if bool((counts > self.counts.clamp(max=self.limit)).any()) or bool((counts < 0).any()):
            raise CapabilityError(f"at most {self.limit} tokens, and no more than were read, can be taken back")
        return Replay(self.current, self.anchor, self.recent, self.counts - counts, self.limit, self.bound, True)

    def run(self, mixer: Mixer, x: Tensor, ragged: Ragged | None, shared: Shared | None) -> tuple[Tensor, State]:
        """One call of the mixer, with its inputs remembered."""
        current = self.current
        if self.stale:
            _, current = _run(mixer, self.recent[:, : self.bound], self.anchor.clone(), self.counts, shared)
        y, after = mixer.mix(x, current, ragged, shared)
        assert after is not None
        read = [shared[name].flatten(2).to(x.dtype) for name in mixer.reads()] if shared is not None else []
        return y, self._remember(mixer, torch.cat([x, *read], dim=-1) if read else x, after, ragged, shared)

    def _remember(
        self,
        mixer: Mixer,
        x: Tensor,
        current: State,
        ragged: Ragged | None,
        shared: Shared | None,
    ) -> Replay:
        rows, length, width = x.shape
        new = ragged.lengths if ragged is not None and ragged.lengths is not None else None
        added = new if new is not None else torch.full_like(self.counts, length)
        held = self.bound + length
        if held <= 2 * self.limit:
            recent = self._appended(self.recent, x, added)
            return Replay(
                current, self.anchor, updated(self.recent, recent), self.counts + added, self.limit, held, False
            )
        # Full: line up everything since the anchor, let the anchor read all but the last `limit` tokens of each row.
        room = torch.zeros(rows, held, width, dtype=self.recent.dtype, device=x.device)
        room[:, : self.recent.shape[1]] = self.recent[:, :held]
        line = self._appended(room, x, added)
        total = self.counts + added
        absorbed = (total - self.limit).clamp(min=0)
        _, anchor = _run(mixer, line, self.anchor, absorbed, shared)
        kept = torch.arange(2 * self.limit, device=x.device) + absorbed[:, None]
        kept = kept.clamp(max=held - 1)[:, :, None].expand(-1, -1, width)
        recent = updated(self.recent, line.gather(1, kept))
        bound = min(self.limit, held)
        return Replay(current, anchor, recent, total - absorbed, self.limit, bound, False)

    def _appended(self, line: Tensor, x: Tensor, added: Tensor) -> Tensor:
        """`line` with the valid inputs of x written after each row's `counts`."""
        steps = torch.arange(line.shape[1], device=x.device)[None, :]
        from_x = steps - self.counts[:, None]
        is_new = (from_x >= 0) & (from_x < added[:, None])
        index = from_x.clamp(0, x.shape[1] - 1)[:, :, None].expand(-1, -1, x.shape[2])
        return torch.where(is_new[:, :, None], x.gather(1, index).to(line.dtype), line)


def _run(mixer: Mixer, inputs: Tensor, state: State, lengths: Tensor, shared: Shared | None) -> tuple[Tensor, State]:
    """Runs the mixer for its State on what `Replay.recent` holds; a call of length 0 changes nothing.

    What it publishes is old: it goes nowhere.
    """
    if inputs.shape[1] == 0:
        return inputs, state
    x, *read = inputs.split(_widths(mixer), dim=-1)
    shapes = aligned(mixer.reads())
    old = dict(shared or {})
    old |= {name: value.unflatten(2, shapes[name]) for name, value in zip(shapes, read, strict=True)}
    y, after = mixer.mix(x, state, Ragged(lengths=lengths), old)
    assert after is not None
    return y, after


def _widths(mixer: Mixer) -> list[int]:
    """Numbers that a token brings: its own, and those of each value read."""
    return [mixer.d_model, *map(math.prod, aligned(mixer.reads()).values())]


def aligned(values: Mapping[str, Published]) -> dict[str, tuple[int, ...]]:
    """The shapes of published values.

    Raises:
        CapabilityError: one of them is not aligned with the tokens.
    """
    shapes = {}
    for name, kind in values.items():
        if isinstance(kind, str):
            raise CapabilityError(f'"{name}" is {kind}, of no single token: it cannot be turned round or replayed')
        shapes[name] = kind
    return shapes

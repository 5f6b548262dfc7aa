"""What is on trial: a factory of mixers, and how many cases to draw."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from trilemma.errors import ConfigError
from trilemma.laws.case import Case, Trace
from trilemma.laws.sharing import Arranged, Sharing
from trilemma.mixers.base import Mixer
from trilemma.state import CacheKind

LEVELS = ("quick", "full")


@dataclass
class Subject:
    """A mixer on trial.

    Attributes:
        factory: builds a fresh mixer in float32.
        seed: of every draw.
        level: quick or full.
        slow: whether the slow parts run at level quick too.
        cache: how keys and values are held; of another kind than None it passes no gradients, and nothing wants any.
    """

    factory: Callable[[], Mixer]
    seed: int
    level: str = "quick"
    slow: bool = True
    cache: CacheKind = None
    trace: Trace = field(default_factory=Trace)

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ConfigError(f'unknown level "{self.level}" of the laws; valid: {", ".join(LEVELS)}')
        self.example = self.build(torch.float32, torch.Generator("cpu").manual_seed(self.seed))

    @property
    def title(self) -> str:
        """The class on trial."""
        example = self.example
        return type(example.last if isinstance(example, Arranged) else example).__qualname__

    @property
    def full(self) -> bool:
        """Whether everything is wanted."""
        return self.level == "full"

    @property
    def carries_state(self) -> bool:
        """Whether the mixer can be run in several calls."""
        return self.example.causal or self.example.capabilities.reads_memory

    @property
    def reads_memory(self) -> bool:
        """Whether it reads a memory that another part produced."""
        return self.example.capabilities.reads_memory

    def build(self, dtype: torch.dtype, generator: torch.Generator) -> Mixer:
        """A mixer with random weights everywhere: freshly initialised zeros would hide what multiplies them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator, device="cpu")))
            mixer = self.factory()
        if not isinstance(mixer, Mixer):
            raise ConfigError(f"the laws need a factory of a Mixer; this one gave a {type(mixer).__name__}")
        with torch.no_grad():
            for parameter in mixer.parameters():
                noise = torch.randn(parameter.shape, generator=generator, device="cpu")
                parameter.add_(0.2 * noise.to(parameter))
        if self.cache is not None:
            mixer.requires_grad_(False)
            for part in mixer.modules():
                if isinstance(part, Mixer):
                    part.cache = self.cache
        if mixer.publishes() or mixer.reads():
            mixer = Sharing(mixer)
        return mixer.to(torch.get_default_device(), dtype)

    def cases(self, law: str, dtype: torch.dtype = torch.float64, quick: int = 3, full: int = 15) -> Iterator[Case]:
        """Independent cases; the first ones are the same at both levels."""
        for number in range(full if self.full else quick):
            key = f"{self.seed}/{law}/{dtype}/{number}".encode()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:6], "big"))
            mixer = self.build(dtype, generator)
            case = Case(mixer, dtype, generator, self.trace, cache=self.cache)
            case.shared = {name: case.normal(*shape, leaf=True) for name, shape in mixer.shared_inputs().items()}
            yield case

"""What a check of the laws found, in words, numbers and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trilemma.errors import LawError

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "n/a"


class NotApplicableError(Exception):
    """Raised by a law that says nothing about this mixer; the text is the reason."""


class ViolationError(Exception):
    """Raised by a law that does not hold.

    Args:
        claim: what should have been.
        tensor: which tensor is wrong.
        token: the first wrong position, or None where there is none.
        row: its row.
        error: the size of the error, relative to the tensor's largest value (or 1).
        tolerance: what is allowed.
    """

    def __init__(
        self,
        claim: str,
        tensor: str = "",
        token: int | None = None,
        row: int | None = None,
        error: float | None = None,
        tolerance: float | None = None,
    ) -> None:
        super().__init__(claim)
        self.claim, self.tensor, self.token, self.row = claim, tensor, token, row
        self.error, self.tolerance = error, tolerance

    def text(self) -> str:
        """One sentence."""
        parts = [self.claim]
        if self.tensor:
            where = f"first wrong in {self.tensor}"
            if self.token is not None:
                where += f" at token {self.token}"
            if self.row is not None:
                where += f" of row {self.row}"
            parts.append(where)
        if self.error is not None:
            allowed = "" if self.tolerance is None else f" (allowed {self.tolerance:.0e})"
            parts.append(f"error {self.error:.3g}{allowed}")
        return "; ".join(parts)


@dataclass(frozen=True)
class LawResult:
    """One law on one mixer.

    Attributes:
        law: its name. outcome: pass, fail or n/a. reason: why it fails or says nothing.
        worst: the largest error met where it holds, as a fraction of what is allowed there. error: its size.
        tensor, token, row, case: where it fails first.
        reproduce: the command that shows the failure again.
        seconds: time taken.
    """

    law: str
    outcome: str
    reason: str = ""
    error: float | None = None
    worst: float | None = None
    tensor: str = ""
    token: int | None = None
    row: int | None = None
    case: str = ""
    reproduce: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """All laws on one mixer.

    Attributes:
        subject: the mixer, in words. seed, level: as checked. results: one a law, in order.
    """

    subject: str
    seed: int
    level: str
    results: tuple[LawResult, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no law fails."""
        return all(result.outcome != FAIL for result in self.results)

    @property
    def failures(self) -> list[LawResult]:
        """The laws that fail."""
        return [result for result in self.results if result.outcome == FAIL]

    @property
    def seconds(self) -> float:
        """Time taken in all."""
        return sum(result.seconds for result in self.results)

    def __getitem__(self, law: str) -> LawResult:
        for result in self.results:
            if result.law == law:
                return result
        raise KeyError(law)

    def __str__(self) -> str:
        lines = [f"{self.subject} (seed {self.seed}, {self.level}): {'lawful' if self.ok else 'UNLAWFUL'}"]
        for result in self.results:
            lines.append(f"  {result.law:<10} {result.outcome:<5} {result.seconds:6.2f} s  {result.reason}".rstrip())
            if result.reproduce:
                lines.append(f"  {'':<10} in case: {result.case}")
                lines.append(f"  {'':<10} again: {result.reproduce}")
        return "\n".join(lines)

    def require(self) -> Report:
        """Itself, if every law holds.

        Raises:
            LawError: with the failures.
        """
        if not self.ok:
            raise LawError(str(self))
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "subject": self.subject,
            "seed": self.seed,
            "level": self.level,
            "ok": self.ok,
            "seconds": round(self.seconds, 3),
            "laws": [{**vars(result), "seconds": round(result.seconds, 3)} for result in self.results],
        }

"""A measured value beside what was promised: the last lines of every benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """``limit`` is what must be kept, ``goal`` what is wished for; both in ``unit``, and smaller is better."""

    name: str
    measured: float
    unit: str = ""
    limit: float | None = None
    goal: float | None = None

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return "-"
        if self.measured > self.limit:
            return "NOT MET"
        return "met" if self.goal is None or self.measured <= self.goal else "met (goal missed)"

    def row(self) -> str:
        promised = "" if self.limit is None else f"≤ {self.limit:g} {self.unit}"
        promised += "" if self.goal is None else f" (goal {self.goal:g})"
        measured = f"{self.measured:.2f}" if isinstance(self.measured, float) else str(self.measured)
        return f"{self.name:62} {measured:>9} {self.unit:4} {promised:20} {self.verdict}"

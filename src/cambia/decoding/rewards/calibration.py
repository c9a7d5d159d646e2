"""Where people's texts and a model's plain ones lie on a measure, at the number of texts that is scored.

A measure of how a set of texts is distributed depends on how many there are: from few texts every
distribution looks further from another than it is, and more varied. So its ends are measured with as many
texts as are scored, on average over draws from the material.
"""

# H texts that may be drawn from

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Measure = Callable[[Tensor], Tensor]
"""(H,) weights of texts -> (): what is measured of all together. A weight of 0 leaves a text out."""

_DRAWS = 24


@dataclass(frozen=True)
class Ends:
    """What a measure gives for people's texts and for plain ones."""

    human: float
    plain: float
    noise: float
    """By how much it varies between sets of texts, people's or plain ones, one standard deviation."""
    least: float = 1e-3
    """The smallest difference that is worth anything."""

    @property
    def unsureness(self) -> float:
        """The noise as a share of the way from people's texts to plain ones; the measure is a divergence."""
        return max(self.noise, self.least) / max(self.plain - self.human, self.least)

    def nearness(self, found: Tensor) -> Tensor:
        """Of a divergence: 1 where it is what people's texts have, 0 where it is what plain ones have."""
        return 1 - (found - self.human) / self._gap(self.plain - self.human)

    def likeness(self, found: Tensor) -> Tensor:
        """Of a quantity that may be too high and too low: 1 where it is people's, 0 as far off as the plain
        texts' is."""
        return 1 - (found - self.human).abs() / self._gap(abs(self.plain - self.human))

    def _gap(self, way: float) -> float:
        """From one end to the other; no less than twice the noise, since a measure by which plain texts
        cannot be told from people's has no scale of its own: plain texts then score more than 0."""
        return max(way, 2 * self.noise, self.least)


class Ruler:
    """The ends of a measure, for any number of texts.

    Where more are scored than there are to draw from, they are continued by what halving the number changes,
    as for an error that falls with one over the number.

    Args:
        human: the measure, of people's texts.
        plain: the same of plain ones.
        available: H, how many there are of each.
        least: the smallest difference that is worth anything.
    """

    def __init__(self, human: Measure, plain: Measure, available: int, *, least: float = 1e-3):
        self._human, self._plain, self._available, self._least = human, plain, available, least
        self._known: dict[int, Ends] = {}

    def at(self, number: int) -> Ends:
        """The ends for so many texts."""
        if number not in self._known:
            self._known[number] = self._found(number)
        return self._known[number]

    def _found(self, number: int) -> Ends:
        most = self._available
        # Of all of them there is one draw, which says nothing of the noise.
        some = min(number, max(1, most // 2))
        human, plain = self._drawn(self._human, some), self._drawn(self._plain, some)
        spread = max(human.std(correction=0).item(), plain.std(correction=0).item())
        noise = spread * (some / number / max(1 - some / most, 1 / most)) ** 0.5
        if number <= some:
            return Ends(human.mean().item(), plain.mean().item(), noise, self._least)
        return Ends(self._mean(self._human, number), self._mean(self._plain, number), noise, self._least)

    def _mean(self, measure: Measure, number: int) -> float:
        most = self._available
        if number <= most:
            return self._drawn(measure, number).mean().item()
        all_of_them = self._drawn(measure, most).mean().item()
        half = self._drawn(measure, max(1, most // 2)).mean().item()
        return all_of_them + (half - all_of_them) * (most / number - 1)

    def _drawn(self, measure: Measure, size: int) -> Tensor:
        """(draws,): the measure of so many texts, each time other ones."""
        generator = torch.Generator().manual_seed(size)
        draws = _DRAWS if size < self._available else 1
        found = []
        for _ in range(draws):
            weights = torch.zeros(self._available, dtype=torch.float64)
            weights[torch.randperm(self._available, generator=generator)[:size]] = 1
            found.append(measure(weights).detach())
        return torch.stack(found)

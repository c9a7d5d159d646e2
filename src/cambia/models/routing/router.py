"""Who answers a text: told from its first tokens, by statistics that only become more.

Of every Part's domain the router keeps counts of n-grams, a distribution of the frozen base's features, and
what was measured once, when the Part was sealed, on held-out rows: no text, and nothing that training could
wear off. A prefix is read by cheap evidence first (n-grams, and one pass of the base). Parts to which it is
far too strange are out; only where several are left do they read the prefix themselves.

* ``compete``: of the Parts that accept a prefix the likeliest answers (`pooling` says how kinds of evidence
  add up), nobody where it is strange to all of them. A Part that comes later may take over what it foretells
  better.
* ``first_claim``: the first Part, in order of birth, that accepts a prefix answers it. What decides over a
  Part is measured at its birth, on it, the base and the prefix alone; so what was accepted once stays with
  its Part, to the bit, whatever comes later.

    >>> router = Router(vocab_size=264)
    >>> router.add("sql", grams, gaussian, held=reader.read(held_out_rows))
    >>> routes = router.route(reader.read(input_ids))
    >>> routes.names, routes.confidence
    (('sql', None), tensor([0.99, 1.00], dtype=torch.float64))
"""

# B prefixes, N held-out rows, K Parts, L prefix lengths, M margins, S kinds of evidence

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cambia.errors import ConfigError
from cambia.models.routing.evidence import NUM_CHEAP, Evidence
from cambia.models.routing.gaussians import FeatureGaussian
from cambia.models.routing.pooling import pooled_weights
from cambia.models.routing.prefixes import Prefixes
from cambia.models.routing.routes import Routes
from cambia.models.routing.strangeness import Strangeness, between, lengths_within
from cambia.models.routing.token_grams import TokenGrams

Rule = Literal["compete", "first_claim"]
ITSELF = "."
"""No Part's name: a domain is answered by the Part that is called like it."""
LEAST_ROWS = 8
"""Held-out rows without which nothing can be said of what is ordinary."""


@dataclass(eq=False)
class KnownDomain:
    """What the router keeps of one domain's text."""

    name: str
    answers: str | None
    """The Part that answers it; None: the base does."""
    grams: TokenGrams
    """Sealed."""
    gaussian: FeatureGaussian
    """Sealed."""
    cheap: Strangeness
    """By n-grams, by n-grams against the base, and by features."""
    full: Strangeness
    """By those, and by the Part against the base."""
    margins: Tensor
    """(L, M, 3) float64: by how much n-grams, features and Parts speak for it and against its nearest rivals,
    on its own held-out rows."""
    is_sealed: bool = True
    """Nothing of it changes any more; the Part that is being taught is measured again and again."""


class Router:
    """Who answers a text, told from its first tokens.

    Args:
        vocab_size: how many tokens there are.
        routing: ``compete`` or ``first_claim``.
        accept: the share of a domain's own prefixes that its Part is to accept.
        doubt: Parts less probable than this by cheap evidence are not asked.
        most_asked: Parts that read one prefix at most, under ``compete``.
        switch_odds: how many times likelier another Part has to be than the one that a text has already.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        routing: Rule = "compete",
        accept: float = 0.99,
        doubt: float = 0.01,
        most_asked: int = 4,
        switch_odds: float = 10.0,
    ):
        if not (0.5 <= accept < 1 and 0 < doubt < 1 and most_asked >= 1 and switch_odds >= 1):
            raise ConfigError(
                f"a router with accept {accept}, doubt {doubt}, most_asked {most_asked} and switch_odds "
                f"{switch_odds}: expected shares (accept from 0.5 on), and numbers from 1 on"
            )
        self.vocab_size, self.routing = vocab_size, routing
        self.accept, self.doubt, self.most_asked, self.switch_odds = accept, doubt, most_asked, switch_odds
        self.domains: dict[str, KnownDomain] = {}
        """In order of birth."""
        self._weights: tuple[tuple[int, ...], Tensor, Tensor] | None = None

    # ---- what is known -----------------------------------------------------------------------------

    def add(
        self,
        name: str,
        grams: TokenGrams,
        gaussian: FeatureGaussian,
        held: Prefixes,
        *,
        answers: str | None = ITSELF,
        sealed: bool = True,
    ) -> None:
        """Take in a domain, or measure the open one again.

        Args:
            name: the domain's id, usually its Part's.
            grams: sealed n-grams of its text.
            gaussian: the sealed distribution of its features.
            held: rows of it that neither its Part nor the statistics learned from, all of one length.
            answers: the Part that answers it, by default the one of this name; None: the base.
            sealed: whether that was the last time.

        Raises:
            ConfigError: the domain is known and sealed, there are too few rows, or the statistics are of
                other tokens or features than those of the domains before.
        """
        self._check_new(name, grams, gaussian, held)
        part = name if answers == ITSELF else answers
        rivals = self._rivals(name, part, held)
        lengths = lengths_within(int(held.lengths.min()))
        strangeness, margins = [], []
        for length in lengths:
            read = Evidence(held.first(length))
            cheap, own = read.cheap(grams, gaussian), read.own(part)
            strangeness.append(read.strangeness(cheap, own))
            mine = torch.cat([cheap, own[:, None]], 1)
            others = [
                torch.cat([read.cheap(r.grams, r.gaussian), read.own(r.answers)[:, None]], 1) for r in rivals
            ]
            margins.append(torch.cat([mine - other for other in others]) if others else mine.new_empty(0, 3))
        found = torch.stack(strangeness)
        self.domains[name] = KnownDomain(
            name,
            part,
            grams,
            gaussian,
            cheap=Strangeness.of(lengths, found[:, :, :NUM_CHEAP]),
            full=Strangeness.of(lengths, found),
            margins=torch.stack(margins),
            is_sealed=sealed,
        )
        self._weights = None

    def _rivals(self, name: str, part: str | None, held: Prefixes) -> list[KnownDomain]:
        """The domains of other Parts that n-grams take held-out rows for most easily."""
        read = Evidence(held)
        others = [d for known, d in self.domains.items() if known != name and d.answers != part]
        means = {d.name: float(read.cheap(d.grams, d.gaussian)[:, 0].mean()) for d in others}
        return sorted(others, key=lambda d: -means[d.name])[:_RIVALS]

    def _check_new(self, name: str, grams: TokenGrams, gaussian: FeatureGaussian, held: Prefixes) -> None:
        known = self.domains.get(name)
        if known is not None and known.is_sealed:
            raise ConfigError(f"the router knows {name!r} already, and what it knows of it is sealed")
        if len(held) < LEAST_ROWS or int(held.lengths.min()) < 2:
            raise ConfigError(
                f"{name!r} came to the router with {len(held)} held-out rows, the shortest of "
                f"{int(held.lengths.min()) if len(held) else 0} tokens: to say what is ordinary for it, at "
                f"least {LEAST_ROWS} rows of 2 tokens are needed"
            )
        if grams.vocab_size != self.vocab_size:
            raise ConfigError(
                f"the n-grams of {name!r} are of {grams.vocab_size} tokens, the router's of "
                f"{self.vocab_size}: count them with the tokenizer of this model"
            )
        dimensions = len(gaussian.mean)
        for other in self.domains.values():
            if len(other.gaussian.mean) != dimensions:
                raise ConfigError(
                    f"the features of {name!r} have {dimensions} dimensions, those of {other.name!r} "
                    f"{len(other.gaussian.mean)}: all have to be of one layer of one model"
                )

    @property
    def answering(self) -> set[str | None]:
        """The Parts that a domain is answered by."""
        return {domain.answers for domain in self.domains.values()}

    def seal(self, name: str) -> None:
        """What is known of a domain stays as it is."""
        self._domain(name).is_sealed = True

    def forget(self, name: str) -> None:
        """A domain that is not sealed is known no more.

        Raises:
            ConfigError: it is sealed, or unknown.
        """
        known = self._domain(name)
        if known.is_sealed:
            raise ConfigError(f"what the router knows of {name!r} is sealed, so it stays")
        del self.domains[name]
        self._weights = None

    def _domain(self, name: str) -> KnownDomain:
        if name not in self.domains:
            raise ConfigError(
                f"the router does not know {name!r}; it knows {', '.join(self.domains) or 'none'}"
            )
        return self.domains[name]

    # ---- who answers -------------------------------------------------------------------------------

    def route(self, prefixes: Prefixes, before: Sequence[str | None] | None = None) -> Routes:
        """Who answers each prefix; one of less than two tokens is answered by the base.

        Args:
            before: who answered the texts so far, where this is not the first time that they are routed. Each
                stays with the Part that it has, unless another is `switch_odds` times likelier
                (``first_claim``: unless its Part refuses it by that much, or an earlier one accepts by it).

        Raises:
            ConfigError: tokens that the router's vocabulary does not have.
        """
        if len(prefixes.input_ids.flatten()) and int(prefixes.input_ids.max()) >= self.vocab_size:
            raise ConfigError(
                f"a prefix holds token {int(prefixes.input_ids.max())}, the router knows {self.vocab_size} "
                "tokens: it was made for another tokenizer"
            )
        if before is not None and len(before) != len(prefixes):
            raise ConfigError(f"before names who answered {len(before)} texts, and {len(prefixes)} came")
        had = tuple(before) if before is not None else (None,) * len(prefixes)
        if not self.domains or not bool((prefixes.lengths >= 2).any()):
            return Routes((None,) * len(had), torch.ones(len(had)).double(), torch.zeros(len(had)).double())
        rule = self._compete if self.routing == "compete" else self._first_claim
        return rule(Evidence(prefixes), had)

    def _first_claim(self, read: Evidence, had: tuple[str | None, ...]) -> Routes:
        rows = torch.arange(len(had))
        names: list[str | None] = [None] * len(had)
        inside = torch.full((len(had),), -math.inf, dtype=torch.float64)  # how far, in standard deviations
        free = read.prefixes.lengths >= 2
        for domain in self.domains.values():
            cheap = read.cheap(domain.grams, domain.gaussian)
            near = domain.cheap.inside(read.strangeness(cheap), read.prefixes.lengths, self._share(_FAR))
            asked = rows[free & (near >= 0)]
            inside[free] = inside[free].maximum(near[free].clamp(max=0))
            if not len(asked):
                continue
            strange = read.strangeness(cheap[asked], read.own(domain.answers, asked), asked)
            lengths = read.prefixes.lengths[asked]
            found = domain.full.inside(strange, lengths, self.accept)
            held = torch.tensor([had[i] == domain.answers for i in asked.tolist()])
            taken = torch.tensor([had[i] not in (None, domain.answers) for i in asked.tolist()])
            for rule, share in (
                (held, self._share(1 / self.switch_odds)),
                (taken, self._share(self.switch_odds)),
            ):
                if bool(rule.any()):
                    found[rule] = domain.full.inside(strange[rule], lengths[rule], share)
            inside[asked] = torch.where(found >= 0, found, inside[asked].maximum(found))
            for i in asked[found >= 0].tolist():
                names[i] = domain.answers
            free[asked[found >= 0]] = False
        confidence = _normal(inside.abs())
        return Routes(
            tuple(names), confidence, _entropy(torch.stack([confidence, 1 - confidence])), read.passes
        )

    def _share(self, odds: float) -> float:
        """A share of a domain's own prefixes: as `accept`, with the rest so many times as large."""
        return max(0.5, 1 - (1 - self.accept) * odds)

    def _compete(self, read: Evidence, had: tuple[str | None, ...]) -> Routes:
        domains, lengths = list(self.domains.values()), read.prefixes.lengths
        stays = torch.tensor(
            [[name is not None and name == d.answers for name in had] for d in domains]
        )  # (K, B)
        bonus = stays.double() * math.log(self.switch_odds)
        grid, cheap_weights, full_weights = self._evidence_weights()
        cheap = torch.stack([read.cheap(d.grams, d.gaussian) for d in domains])  # (K, B, 2)
        strange = [read.strangeness(cheap[k]) for k in range(len(domains))]
        near = self._insides([d.cheap for d in domains], strange, lengths, _FAR, stays)
        open_to = (near >= 0) & (lengths >= 2)
        scores = (cheap * between(grid, cheap_weights, lengths)).sum(2) + bonus
        shares = _shares(scores, open_to)
        rank = (-shares).argsort(0).argsort(0)
        candidates = open_to & (shares >= self.doubt) & (rank < self.most_asked)
        at_home = self._insides([d.cheap for d in domains], strange, lengths, _HOME, None) >= 0
        asked = candidates & ~((candidates.sum(0) == 1) & (candidates & at_home).any(0))
        weights = between(grid, full_weights, lengths)  # (B, 3)
        for k, domain in enumerate(domains):
            rows = asked[k].nonzero()[:, 0]
            if not len(rows):
                continue
            own = read.own(domain.answers, rows)
            scores[k, rows] = (torch.cat([cheap[k, rows], own[:, None]], 1) * weights[rows]).sum(1) + bonus[
                k, rows
            ]
            found = [read.strangeness(cheap[k, rows], own, rows)]
            near[k, rows] = self._insides([domain.full], found, lengths[rows], 1.0, stays[k : k + 1, rows])[0]
        candidates &= near >= 0
        return self._likeliest(domains, scores, candidates, near, read.passes)

    def _insides(
        self,
        known: list[Strangeness],
        found: list[Tensor],
        lengths: Tensor,
        odds: float,
        stays: Tensor | None,
    ) -> Tensor:
        """(K, B): how far inside of what each domain accepts prefixes are, and further where they stay."""
        near = torch.stack(
            [k.inside(f, lengths, self._share(odds)) for k, f in zip(known, found, strict=True)]
        )
        if stays is None or not bool(stays.any()):
            return near
        share = self._share(odds / self.switch_odds)
        wide = torch.stack([k.inside(f, lengths, share) for k, f in zip(known, found, strict=True)])
        return torch.where(stays, wide, near)

    def _likeliest(
        self, domains: list[KnownDomain], scores: Tensor, candidates: Tensor, near: Tensor, passes: int
    ) -> Routes:
        shares = _shares(scores, candidates)  # (K, B)
        certain, best = shares.max(0)
        nobody = ~candidates.any(0)
        outside = _normal(-near.amax(0).clamp(max=0))
        names = tuple(
            None if n else domains[i].answers for n, i in zip(nobody.tolist(), best.tolist(), strict=True)
        )
        entropy = torch.where(nobody, _entropy(torch.stack([outside, 1 - outside])), _entropy(shares))
        return Routes(names, torch.where(nobody, outside, certain), entropy, passes)

    def _evidence_weights(self) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """Prefix lengths, and how much each kind of evidence counts there: (L, 2) without Parts, (L, 3)."""
        if self._weights is None:
            known: dict[int, list[Tensor]] = {}
            for domain in self.domains.values():
                for length, margins in zip(domain.full.lengths, domain.margins, strict=True):
                    if len(margins):
                        known.setdefault(length, []).append(margins)
            found = {length: torch.cat(known[length]) for length in sorted(known)}
            found = found or {1: torch.zeros(1, 3, dtype=torch.float64)}  # nobody has a rival yet
            cheap = torch.stack([pooled_weights(margins[:, :2]) for margins in found.values()])
            full = torch.stack([pooled_weights(margins) for margins in found.values()])
            self._weights = tuple(found), cheap, full
        return self._weights

    # ---- what must survive a restart ---------------------------------------------------------------

    def state_dict(self, *, with_statistics: bool = True) -> dict[str, Any]:
        """Plain values and tensors.

        Args:
            with_statistics: the n-grams and distributions too; without them they have to be given to
                `load_state_dict`, by whoever keeps them.
        """
        return {
            "routing": self.routing,
            "domains": [
                {
                    "name": d.name,
                    "answers": d.answers,
                    "cheap": d.cheap.state_dict(),
                    "full": d.full.state_dict(),
                    "margins": d.margins.clone(),
                    "sealed": d.is_sealed,
                    "order": d.grams.order,
                    "grams": d.grams.state_dict() if with_statistics else None,
                    "gaussian": d.gaussian.state_dict() if with_statistics else None,
                }
                for d in self.domains.values()
            ],
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        statistics: Mapping[str, tuple[TokenGrams, FeatureGaussian]] | None = None,
    ) -> None:
        """Go on exactly where `state_dict` was taken.

        Args:
            statistics: by domain, where the state was taken without them.
        """
        self.routing, self.domains, self._weights = state["routing"], {}, None
        for saved in state["domains"]:
            if statistics is not None:
                grams, gaussian = statistics[saved["name"]]
            else:
                grams = TokenGrams(self.vocab_size, order=saved["order"])
                gaussian = FeatureGaussian(len(saved["gaussian"]["mean"]))
                grams.load_state_dict(saved["grams"])
                gaussian.load_state_dict(saved["gaussian"])
            self.domains[saved["name"]] = KnownDomain(
                saved["name"],
                saved["answers"],
                grams,
                gaussian,
                Strangeness.from_state(saved["cheap"]),
                Strangeness.from_state(saved["full"]),
                saved["margins"].clone(),
                saved["sealed"],
            )


_RIVALS = 2
"""Domains against which a new one is measured, the nearest ones."""
_FAR, _HOME = 0.1, 30.0
"""How many times as many of a domain's own prefixes as a Part refuses may lie so far out that nobody asks
it; and further out than where nobody needs to."""


def _shares(scores: Tensor, allowed: Tensor) -> Tensor:
    """(K, B) log odds -> probabilities of those allowed; zeros where none is."""
    return torch.softmax(scores.masked_fill(~allowed, -math.inf), 0).nan_to_num(0)


def _entropy(shares: Tensor) -> Tensor:
    """(K, B) -> (B,), nats."""
    return -(shares * shares.clamp_min(1e-300).log()).sum(0)


def _normal(deviations: Tensor) -> Tensor:
    """The share of a normal distribution below."""
    return torch.special.ndtr(deviations)

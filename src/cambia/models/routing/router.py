"""Who answers a text: told from its first tokens, by statistics that only become more.

Of every Part's domain the router keeps counts of n-grams, a distribution of the frozen base's features, and
what was measured once, when the Part was sealed, on held-out rows: no text, and nothing that training could
wear off. A prefix is read by cheap evidence first (n-grams, and one pass of the base). Parts to which it is
far too strange are out; only where several are left do they read the prefix themselves.

* ``compete``: of the Parts that accept a prefix the likeliest answers (`pooling` says how kinds of evidence
  add up). The one that n-grams point at is among them also where the prefix is strange to it, if it foretells
  it far better than the base. A Part that comes later may take over what it foretells better.
* ``first_claim``: the first Part, in order of birth, that accepts a prefix answers it; domains that the base
  answers claim nothing. What decides over a Part is measured at its birth, on it, the base and the prefix
  alone; so what was accepted once stays with its Part, to the bit, whatever comes later.

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
from cambia.models.routing.routes import Routes, entropy
from cambia.models.routing.strangeness import LEAST_ROWS, Strangeness, between, lengths_within
from cambia.models.routing.token_grams import TokenGrams

Rule = Literal["compete", "first_claim"]
ITSELF = "."
"""No Part's name: a domain is answered by the Part that is called like it."""


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
    """By n-grams, and by n-grams against the base."""
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
        bound: how many standard deviations stranger than its own text a prefix may be to a Part that accepts
            it; by default 3 under ``first_claim``, which leaves room for later Parts, and 5 under
            ``compete``, where the base and the other Parts compete as well.
        doubt: Parts less probable than this by cheap evidence are not asked.
        most_asked: Parts that read one prefix at most, under ``compete``.
        switch_odds: how many times likelier another Part has to be than the one that a text has already.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        routing: Rule = "compete",
        bound: float | None = None,
        doubt: float = 0.02,
        most_asked: int = 4,
        switch_odds: float = 10.0,
    ):
        if not ((bound is None or bound > 0) and 0 < doubt < 1 and most_asked >= 1 and switch_odds >= 1):
            raise ConfigError(
                f"a router with bound {bound}, doubt {doubt}, most_asked {most_asked} and switch_odds "
                f"{switch_odds}: expected a bound above 0, a share, and numbers from 1 on"
            )
        self.vocab_size, self.routing = vocab_size, routing
        self.bound, self.doubt, self.most_asked, self.switch_odds = bound, doubt, most_asked, switch_odds
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
            mine = _likelihoods(read, grams, gaussian, part)
            others = [_likelihoods(read, r.grams, r.gaussian, r.answers) for r in rivals]
            strangeness.append(read.strangeness(mine[:, 0], mine[:, 2]))
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
        means = {d.name: float(read.grams(d.grams).mean()) for d in others}
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

    def succeed(self, old: str, new: str) -> None:
        """A new version of a Part answers what the old one answered; all that is known of the text stays."""
        for domain in self.domains.values():
            if domain.answers == old:
                domain.answers = new

    def knows(self, name: str) -> bool:
        """Whether it can choose a Part, or knows that a newer version is to be chosen in its place."""
        return name in self.domains or any(domain.answers == name for domain in self.domains.values())

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
                (``first_claim``: unless its Part clearly refuses it, or an earlier one clearly accepts it).

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
            return Routes.base(len(had))
        rule = self._compete if self.routing == "compete" else self._first_claim
        return rule(Evidence(prefixes), had)

    def _first_claim(self, read: Evidence, had: tuple[str | None, ...]) -> Routes:
        names: list[str | None] = [None] * len(had)
        inside = torch.full((len(had),), -math.inf, dtype=torch.float64)  # how far, in standard deviations
        free = read.prefixes.lengths >= 2
        for domain in self.domains.values():
            if domain.answers is None:
                continue  # the base answers whatever no Part claims
            grams = read.grams(domain.grams)
            slack = torch.tensor([self._slack(name, domain.answers) for name in had])
            near = _FAMILIAR * self._bound + slack.clamp_min(0) + _SLACK
            near = near - domain.cheap.units(read.strangeness(grams), read.prefixes.lengths)
            asked = (free & (near >= 0)).nonzero()[:, 0]
            if len(asked):
                near[asked], _ = self._asked(read, domain, grams[asked], asked, slack[asked])
            inside[free] = inside[free].maximum(near[free])
            for i in (free & (near >= 0)).nonzero()[:, 0].tolist():
                names[i], free[i] = domain.answers, False
        sure = _normal(inside.abs())
        return Routes(tuple(names), sure, entropy(torch.stack([sure, 1 - sure])), read.passes)

    @property
    def _bound(self) -> float:
        return self.bound if self.bound is not None else _BOUNDS[self.routing]

    def _slack(self, had: str | None, answers: str | None) -> float:
        """How much stranger than otherwise a prefix may be to a Part, for a text that has one already."""
        return 0.0 if had is None else _SLACK if had == answers else -_SLACK

    def _asked(
        self, read: Evidence, domain: KnownDomain, grams: Tensor, rows: Tensor, slack: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What comes of it when a Part reads prefixes itself.

        One that foretells a prefix worse than the base does refuses it; under ``compete``, clearly worse:
        a text of its own that it is not given costs more than one that the base foretells a little better.
        Under ``first_claim`` a prefix that it foretells as only its own text is foretold may be stranger.

        Args:
            grams: (R,) likelihoods by its n-grams.
            rows: (R,) which of the prefixes.
            slack: (R,) how much stranger than otherwise they may be.

        Returns:
            How far (R,) inside of what it accepts they lie, and its likelihoods (R,).
        """
        own, lengths = read.own(domain.answers, rows), read.prefixes.lengths[rows]
        inside = self._bound + slack - domain.full.units(read.strangeness(grams, own, rows), lengths)
        better = _gained(read, own, rows) + (slack > 0) * math.log(self.switch_odds)
        if self.routing == "compete":
            better = better + math.log(_CLEARLY)
        else:
            share = (own + read.prefixes.losses(None)[rows]) / domain.full.usual_gain(lengths)
            familiar = (share >= _HALF) & (better >= math.log(_BEYOND_DOUBT))
            inside = inside + familiar * (_FAMILIAR - 1) * self._bound
        return inside.minimum(better), own

    def _compete(self, read: Evidence, had: tuple[str | None, ...]) -> Routes:
        domains, lengths = list(self.domains.values()), read.prefixes.lengths
        stays = torch.tensor([[name is not None and name == d.answers for name in had] for d in domains])
        bonus = stays.double() * math.log(self.switch_odds)  # (K, B)
        grid, cheap_weights, full_weights = self._evidence_weights()
        cheap = torch.stack(
            [torch.stack([read.grams(d.grams), read.features(d.gaussian)], 1) for d in domains]
        )
        strange = [read.strangeness(each[:, 0]) for each in cheap]  # of (K, B, 2)
        units = torch.stack([d.cheap.units(s, lengths) for d, s in zip(domains, strange, strict=True)])
        near = self._bound + _SLACK + stays * _SLACK - units
        open_to = (near >= 0) & (lengths >= 2)
        pointed = (cheap * between(grid, cheap_weights, lengths)).sum(2)  # (K, B)
        scores = pointed + bonus
        shares = _shares(scores, open_to)
        rank = (-shares).argsort(0).argsort(0)
        candidates = open_to & (shares >= self.doubt) & (rank < self.most_asked)
        asked = candidates & ~((candidates.sum(0) == 1) & (candidates & (units <= _HOME)).any(0))
        weights = between(grid, full_weights, lengths)  # (B, 3)

        def weigh(k: int, rows: Tensor, own: Tensor) -> None:
            evidence = torch.cat([cheap[k, rows], own[:, None]], 1)
            scores[k, rows] = (evidence * weights[rows]).sum(1) + bonus[k, rows]

        for k, domain in enumerate(domains):
            rows = asked[k].nonzero()[:, 0]
            if len(rows):
                slack = stays[k, rows] * _SLACK
                near[k, rows], own = self._asked(read, domain, cheap[k, rows, 0], rows, slack)
                weigh(k, rows, own)
        candidates &= near >= 0
        first = pointed.argmax(0)  # (B,)
        for k, domain in enumerate(domains):
            rows = ((first == k) & ~candidates[k] & (lengths >= 2)).nonzero()[:, 0]
            if len(rows) and domain.answers is not None:
                own = read.own(domain.answers, rows)
                candidates[k, rows] = _gained(read, own, rows) >= math.log(_CLEARLY)
                weigh(k, rows, own)
        return self._likeliest(domains, scores, candidates, near, read.passes)

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
        undecided = torch.where(nobody, entropy(torch.stack([outside, 1 - outside])), entropy(shares))
        return Routes(names, torch.where(nobody, outside, certain), undecided, passes)

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

    def state_dict(self, *, sealed_only: bool = False) -> dict[str, Any]:
        """Plain values and tensors, of all domains or of those alone that stay as they are."""
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
                    "grams": d.grams.state_dict(),
                    "gaussian": d.gaussian.state_dict(),
                }
                for d in self.domains.values()
                if d.is_sealed or not sealed_only
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self.routing, self.domains, self._weights = state["routing"], {}, None
        for saved in state["domains"]:
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
_BOUNDS = {"compete": 5.0, "first_claim": 3.0}
_SLACK = 1.0
"""Standard deviations that a text may be stranger to the Part that it has already, that it has to be less
strange to take it from another, and that it may be by cheap evidence alone."""
_HOME = 0.5
"""Standard deviations up to which a prefix that nobody else accepts is so ordinary that nobody is asked."""
_CLEARLY = 1000.0
"""Under ``compete``, how many times likelier a prefix has to be by one of Part and base to overrule what
is ordinary: by the base, where it is ordinary to the Part; by the Part that n-grams point at, where it is
strange to it (text of narrow kinds drifts out of what was ordinary, and is still foretold well)."""


_FAMILIAR, _HALF, _BEYOND_DOUBT = 2.0, 0.5, 1e9
"""Under ``first_claim`` a prefix may be so many times stranger if its Part gains over the base at least such
a share of what it gains on its own text, and foretells it so many times likelier. Of a law that drifts from
book to book its own expert gained a share of 0.37 to 1.57, those of other far domains at most 0.31."""


def _likelihoods(read: Evidence, grams: TokenGrams, gaussian: FeatureGaussian, answers: str | None) -> Tensor:
    """(B, 3): by n-grams, by features, and by the Part itself."""
    return torch.stack([read.grams(grams), read.features(gaussian), read.own(answers)], 1)


def _gained(read: Evidence, own: Tensor, rows: Tensor) -> Tensor:
    """(R,) nats by which a Part of these likelihoods (R,) foretells prefixes better than the base does."""
    return (own + read.prefixes.losses(None)[rows]) * (read.prefixes.lengths[rows] - 1)


def _shares(scores: Tensor, allowed: Tensor) -> Tensor:
    """(K, B) log odds -> probabilities of those allowed; zeros where none is."""
    return torch.softmax(scores.masked_fill(~allowed, -math.inf), 0).nan_to_num(0)


def _normal(deviations: Tensor) -> Tensor:
    """The share of a normal distribution below."""
    return torch.special.ndtr(deviations)

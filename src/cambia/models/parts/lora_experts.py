"""LoRA experts beside a frozen model: they only become more, and the right one answers.

    >>> experts = LoraExperts(model)
    >>> experts.add("sql")                      # born as nothing: the model says what it said
    >>> with experts.teaching("sql") as new:    # every batch takes this expert
    ...     optimizer = torch.optim.AdamW(new.parameters(), lr=1e-3)
    ...     ...
    >>> experts.seal("sql")                     # it never changes again
    >>> with experts.routed(["sql", None]):     # row by row; None: the model alone
    ...     model(input_ids)

The model keeps its class, its names and its weights, and outside of such a block it answers as if nothing
stood beside it. No expert shares a tensor with another, so that teaching one cannot change what another says.
"""

# B batch (rows), T time

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from cambia.errors import ConfigError
from cambia.models.parts.answering import measured, prefixes_of, routed_logits
from cambia.models.parts.deciding import answer_to, by_arrow, check_routing, decided
from cambia.models.parts.folder import opened, read_base, read_experts, shape_of, write_experts
from cambia.models.parts.lora_expert import LoraExpert
from cambia.models.parts.lora_shape import LoraShape, new_deltas, places_of
from cambia.models.parts.merging import merged
from cambia.models.parts.peft_format import read_adapter, write_adapter, write_base
from cambia.models.routing.router import Router
from cambia.models.routing.routes import Routes
from cambia.nn.routed import ByRow, Everywhere, Mixed, Routed, Use


class LoraExperts(nn.Module):
    """LoRA experts beside a causal language model, which is frozen.

    Args:
        model: any whose linear layers are `nn.Linear` (quantised ones too) or `Conv1D`.
        shape: what an expert adds to, unless `add` is told otherwise.
        seed: of the experts' random tensors.

    Raises:
        ConfigError: nothing of the model can be adapted, or another `LoraExperts` stands beside it already.
    """

    def __init__(self, model: PreTrainedModel, shape: LoraShape | None = None, *, seed: int = 0):
        super().__init__()
        self.shape = shape or LoraShape()
        places_of(model, self.shape.targets)  # says now what could not be adapted later
        self._routed = Routed(model, self)
        self.model = model.requires_grad_(False)
        self.seed = seed
        self._routing, self._prefix_tokens = "compete", 64
        self.router = Router(model.config.get_text_config().vocab_size)
        """What is known of the experts' domains, and who answers by it."""
        self.made_router: tuple[Any, Any] | None = None
        """The hybrid or the Arrow router, and of what it was made."""
        self.feature_layer = -1
        """Of the model, whose outputs a router reads; 0 are the embeddings."""
        self.born = 0
        """How many there have been, so that the name of one that was dropped is not given again."""
        self._answers: str | None = _WHO_KNOWS
        self.parts = nn.ModuleDict()

    @staticmethod
    def of(model: PreTrainedModel) -> LoraExperts | None:
        """The experts beside a model; None where there are none."""
        routed = Routed.on(model)
        return routed.owner if routed is not None and isinstance(routed.owner, LoraExperts) else None

    # ---- experts -----------------------------------------------------------------------------------

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> LoraExpert:
        if name not in self.parts:
            raise ConfigError(
                f"there is no LoRA expert {name!r}; there are {', '.join(self.names) or 'none'}"
            )
        part = self.parts[name]
        assert isinstance(part, LoraExpert)
        return part

    @property
    def names(self) -> list[str]:
        """Ids of all experts, oldest first."""
        return list(self.parts)

    @property
    def sealed(self) -> list[str]:
        """Ids of those that never change again, oldest first."""
        return [name for name in self.names if self[name].state == "sealed"]

    def add(
        self, name: str | None = None, *, like: str | None = None, shape: LoraShape | None = None
    ) -> LoraExpert:
        """A new expert, which changes nothing yet, or says what another one says.

        Args:
            name: its id; by default expert_0, expert_1, ...
            like: begin as a copy of this one, of its shape.
            shape: what it adds to; by default what all of them do.

        Raises:
            ConfigError: the name is taken, or unfit to be a folder's.
        """
        # Nor the name of one that was dropped, whose domain is known by it.
        while (free := f"expert_{self.born}") in self.parts or free in self.router.domains:
            self.born += 1
        name = free if name is None else name
        self._check_new(name)
        if like is not None:
            part = self[like].copied(name)
        else:
            part = LoraExpert(name, new_deltas(self.model, shape or self.shape))
            part.reset(self.seed + self.born)
        self.hang(part)
        return part

    def _check_new(self, name: str) -> None:
        if name in self.parts or not name or set(name) & set("./\\") or name.strip() != name:
            raise ConfigError(
                f"{name!r} cannot be a new LoRA expert's name: it has to be unused (there are "
                f"{', '.join(self.names) or 'none'}) and without dots and slashes"
            )

    def hang(self, part: LoraExpert) -> None:
        """Take in an expert that exists."""
        self.parts[part.name] = part
        self.born += 1
        self._routed.add(part.name, part.by_module)

    def drop(self, name: str) -> None:
        """Take an expert away that was not worth keeping.

        Raises:
            ConfigError: it is sealed.
        """
        if self[name].state == "sealed":
            raise ConfigError(f"{name!r} is sealed, so it stays")
        del self.parts[name]
        self._routed.drop(name)
        if name in self.router.domains:
            self.router.forget(name)

    def seal(self, name: str) -> None:
        """It never changes again."""
        self[name].seal()
        if name in self.router.domains:
            self.router.seal(name)

    def remove(self) -> None:
        """Leave the model as it was found."""
        self._routed.remove()

    # ---- on the disk -------------------------------------------------------------------------------

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        with_base: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Path:
        """Write all experts, each as a stock adapter of PEFT; see `cambia.models.parts.folder`.

        Args:
            with_base: write the model beside them, so that the folder is complete.
            tokenizer: written with the model.
        """
        return write_experts(folder, self, with_base=with_base, tokenizer=tokenizer)

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: PreTrainedModel | None = None) -> LoraExperts:
        """What `save_pretrained` has written, to the last bit.

        Args:
            model: that the experts were trained beside; by default the one in the folder.

        Raises:
            CheckpointError: a file, an expert or the model is not what it was.
        """
        about = opened(folder)
        experts = cls(read_base(folder) if model is None else model, shape_of(about), seed=about["seed"])
        experts.prefix_tokens, experts.feature_layer = about["prefix_tokens"], about["feature_layer"]
        try:
            read_experts(folder, experts, about)
        except BaseException:
            experts.remove()
            raise
        return experts

    def to_peft(self, name: str, folder: str | Path) -> Path:
        """Write one expert as a stock adapter of PEFT: ``PeftModel.from_pretrained(model, folder)``."""
        if Path(folder).exists():
            raise ConfigError(f"{folder} exists already: name a new folder")
        write_adapter(Path(folder), self[name], self.model)
        write_base(Path(folder), self.model)
        return Path(folder)

    def from_peft(self, folder: str | Path, name: str | None = None) -> LoraExpert:
        """Take in an adapter that PEFT has written, as a sealed expert.

        Args:
            name: its id; by default the folder's name.

        Raises:
            CheckpointError: it is none, or of another model.
            ConfigError: it does what a LoRA expert cannot.
        """
        name = Path(folder).resolve().name.replace(".", "_") if name is None else name
        self._check_new(name)
        part = read_adapter(Path(folder), name, self.model)
        part.seal()
        self.hang(part)
        return part

    @torch.no_grad()
    def merged(self, name: str) -> PreTrainedModel:
        """A copy of the model that says by itself what it says with one expert, up to rounding."""
        return merged(self.model, self[name])

    # ---- who answers -------------------------------------------------------------------------------

    @property
    def routing(self) -> str:
        """How is decided who answers: compete, first_claim, likelihood, hybrid or arrow."""
        return self._routing

    @routing.setter
    def routing(self, name: str) -> None:
        self._routing = check_routing(name)

    @property
    def prefix_tokens(self) -> int:
        """First tokens of a sequence from which is decided who answers it."""
        return self._prefix_tokens

    @prefix_tokens.setter
    def prefix_tokens(self, tokens: int) -> None:
        if tokens < 2:
            raise ConfigError(f"prefix_tokens is {tokens}: nothing can be told from less than 2 tokens")
        self._prefix_tokens = tokens

    def calibrate(self, name: str, input_ids: Tensor, held: Tensor | None = None) -> None:
        """Let the router know an expert by some of its text; the text itself is not kept.

        Args:
            name: of the expert, as it is now: to be done when it has been taught. Of one that is not sealed
                it can be done again.
            input_ids: (N, T) rows of its text, in their order.
            held: (M, T) rows that it did not learn from; by default the last quarter of `input_ids`, which
                should be such then.

        Raises:
            ConfigError: there are too few rows, or tokens that the model does not have.
        """
        part, rest = self[name], input_ids
        if held is None:
            most = len(input_ids) - len(input_ids) // 4
            rest, held = input_ids[:most], input_ids[most:]
        grams, gaussian, reader = measured(self, rest)
        sealed = part.state == "sealed"
        self.router.add(name, grams, gaussian, reader.read(held), sealed=sealed)

    def using(self, name: str | None) -> Any:
        """Inside the block this expert answers every row; None: the model alone."""
        return self.routed(None if name is None else [name])

    def routed(self, names: Sequence[str | None] | None) -> Any:
        """Inside the block each row is answered by its own expert.

        What a row is answered does not depend on who answers the others, to the last bit. Make a block anew
        for experts that were trained meanwhile.

        Args:
            names: for each row an id, or None for the model alone; one for all rows also serves. None: the
                model alone everywhere.
        """
        for name in names or ():
            if name is not None:
                self[name]
        return self._routed.using(None if names is None else _by_row(names))

    def mixed(self, names: Sequence[str], weights: Tensor | Callable[[str, Tensor], Tensor]) -> Any:
        """Inside the block every row takes the deltas of several experts, each with a weight.

        Args:
            names: E ids.
            weights: (B, E), or (B, T, E) for each token, or a function of a module's name and its input
                that gives them.
        """
        given = (lambda module, x: weights) if isinstance(weights, Tensor) else weights
        return self._routed.using(Mixed([self[name].name for name in names], given))

    def route(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, tokens: int | None = None
    ) -> list[str | None]:
        """Who answers each row, by its first tokens: an expert, or None for the model alone.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 where a row is padded, on either side.
            tokens: decide from at most so many; `prefix_tokens` by default.
        """
        return list(self.decide(input_ids, attention_mask, tokens=tokens).names)

    def decide(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        tokens: int | None = None,
        before: Sequence[str | None] | None = None,
    ) -> Routes:
        """As `route`, with how certain it is.

        Args:
            before: who answered these texts so far, where they have been routed already: each stays with its
                expert unless the evidence for another is clear.
        """
        prefixes = prefixes_of(self, input_ids, attention_mask, tokens or self.prefix_tokens)
        return decided(self, prefixes, before)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any
    ) -> CausalLMOutputWithPast:
        """Each row answered by whom its own first tokens name; those themselves by the model alone.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 where a row is padded, on either side.
            settings: of the model's forward pass.
        """
        if self._answers is not _WHO_KNOWS:
            with self.using(self._answers):
                return self.model(input_ids=input_ids, attention_mask=attention_mask, **settings)
        if self.routing == "arrow":
            with by_arrow(self):
                return self.model(input_ids=input_ids, attention_mask=attention_mask, **settings)
        answer = answer_to(self, prefixes_of(self, input_ids, attention_mask, self.prefix_tokens))
        return routed_logits(self, answer, input_ids, attention_mask, self.prefix_tokens, **settings)

    @contextmanager
    def answered_by(self, name: str | None) -> Generator[None]:
        """Inside the block nothing is routed: this expert, or the model alone, answers all of every row."""
        before, self._answers = self._answers, name
        try:
            yield
        finally:
            self._answers = before

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> Any:
        """As `model.generate`; each prompt is routed for itself, and what is written stays with its expert.

        Args:
            input_ids: (B, T), padded on the left where prompts differ in length.
            attention_mask: (B, T).
            settings: of `model.generate`.
        """
        if self.routing == "arrow":
            block = by_arrow(self)
        else:
            block = answer_to(self, prefixes_of(self, input_ids, attention_mask, input_ids.shape[1])).block()
        with block:
            return self.model.generate(  # ty: ignore[not-callable]
                input_ids, attention_mask=attention_mask, **settings
            )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @contextmanager
    def teaching(self, name: str, *, beside: Sequence[str] = (), share: float = 1.0) -> Generator[LoraExpert]:
        """Inside the block every batch takes this expert, in the fewest operations.

        Args:
            beside: experts that take part, as they are.
            share: of the deltas of these, together.

        Raises:
            ConfigError: it is sealed.
        """
        part = self[name]
        if part.state == "sealed":
            raise ConfigError(
                f"{name!r} is sealed and never trains again: add(like={name!r}) goes on from it"
            )
        if beside and share:
            weights = torch.tensor([[1.0, *[share / len(beside)] * len(beside)]], device=self.model.device)
            block = self.mixed([name, *beside], weights)
        else:
            block = self._routed.using(Everywhere(name))
        with block:
            yield part


_WHO_KNOWS = "."  # no expert's name: who answers is decided sequence by sequence


def _by_row(names: Sequence[str | None]) -> Use | None:
    return ByRow(tuple(names)) if any(name is not None for name in names) else None

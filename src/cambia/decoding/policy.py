"""How a model is decoded from, as one object: parameters, weights of layers and heads, a head for each token.

    >>> policy = DecodingPolicy(DecodingParameters(temperature=0.8, top_p=0.95))
    >>> policy.generate(model, input_ids, max_new_tokens=40, seed=1)        # (B, T + 40)
    >>> policy.to_json("inference_params.json")
    >>> DecodingPolicy.from_json("inference_params.json", model=model)

It works with any causal language model of transformers, and leaves the model as it is.
"""

# B rows, T time, L layers, H heads of a layer, D hidden size

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cambia import files
from cambia.decoding.context_head import ContextHead
from cambia.decoding.drawing import Drawing, Noise
from cambia.decoding.mixing import Anatomy, heads_of, mixed_layers, scaled_heads
from cambia.decoding.odds import History, RowParameters, warped
from cambia.decoding.parameters import DecodingParameters
from cambia.errors import ConfigError, DataError
from cambia.generation import end_tokens, only_as_told
from cambia.nn.modes import evaluating

if TYPE_CHECKING:
    from cambia.decoding.rewards.reward import Reward

FORMAT_VERSION = 1
_SIZES = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")


@dataclass(eq=False)
class DecodingPolicy:
    """How tokens are drawn from a model.

    Args:
        parameters: temperature and so on.
        layer_weights: (L + 1,) of the hidden states whose sum the final norm is given, the embedding's first;
            None: the last one alone.
        head_weights: for each layer (H,) scales of its attention heads; None: all 1.
        context: sets temperature and top-p for each token; None: they are the same for all.
        made_for: sizes of the model that it was fitted to, as `sizes_of` gives them; None: any model.
    """

    parameters: DecodingParameters = field(default_factory=DecodingParameters)
    layer_weights: Tensor | None = None
    head_weights: Sequence[Tensor] | None = None
    context: ContextHead | None = None
    made_for: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        parameters: DecodingParameters | None = None,
        *,
        layers: bool = False,
        heads: bool = False,
        context: bool = False,
    ) -> Self:
        """One that does nothing yet, with what shall be learned in it.

        Args:
            layers: weights of layers, the last 1 and all others 0.
            heads: scales of heads, all 1.
            context: a head that sets temperature and top-p for each token.

        Raises:
            ConfigError: heads of a model of whose attention nothing is known.
        """
        weights = torch.zeros(model.config.num_hidden_layers + 1)
        weights[-1] = 1.0
        return cls(
            parameters or DecodingParameters(),
            weights if layers else None,
            [torch.ones(count) for count in heads_of(model)] if heads else None,
            ContextHead(model.config.hidden_size) if context else None,
            sizes_of(model) if layers or heads or context else None,
        )

    def with_parameters(self, **changed: Any) -> Self:
        """The same with other decoding parameters.

        Raises:
            ConfigError: a name is unknown, or a number outside its range.
        """
        return replace(self, parameters=DecodingParameters.of({**asdict(self.parameters), **changed}))

    @property
    def listens(self) -> bool:
        """Whether it changes what of the model is heard, and not only how tokens are drawn."""
        return self.layer_weights is not None or self.head_weights is not None

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model of another shape.

        Raises:
            ConfigError: it was fitted to a model of other sizes, or its weights are for another.
        """
        sizes, wrong = sizes_of(model), dict[str, tuple[Any, Any]]()
        for name, size in (self.made_for or {}).items():
            wrong[name] = (size, sizes.get(name))
        if self.layer_weights is not None:
            wrong["num_hidden_layers"] = (len(self.layer_weights) - 1, sizes["num_hidden_layers"])
        if self.head_weights is not None:
            wrong["heads of each layer"] = ([len(scales) for scales in self.head_weights], heads_of(model))
        if self.context is not None:
            wrong["hidden_size"] = (self.context.linear.in_features, sizes["hidden_size"])
        for name, (wanted, found) in wrong.items():
            if wanted != found:
                raise ConfigError(
                    f"this policy was fitted to a model with {name} {wanted}, this one has {found}: fit one "
                    "for it, `cambia tune-decoding`, or leave out its weights and its context head"
                )

    @contextmanager
    def heard(self, model: PreTrainedModel) -> Generator[None]:
        """Inside the block the model answers with the weights of layers and heads.

        Raises:
            ConfigError: the policy was made for a model of another shape.
        """
        self.check(model)
        with ExitStack() as blocks:
            if self.layer_weights is not None:
                blocks.enter_context(mixed_layers(Anatomy.of(model), self.layer_weights.to(model.device)))
            if self.head_weights is not None:
                scales = [scale.to(model.device) for scale in self.head_weights]
                blocks.enter_context(scaled_heads(model, scales))
            yield

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 64,
        seed: int = 0,
        writer: Any = None,
        streamer: Any = None,
        **settings: Any,
    ) -> Tensor:
        """Continue prompts; as `model.generate`, which it calls, with its cache, its streamers, its stopping.

        Args:
            input_ids: (B, T), padded on the left where prompts differ in length.
            attention_mask: (B, T), 0 where a row is padded.
            max_new_tokens: at most so many.
            seed: the same seed, prompts and policy give the same tokens; the global random state stays.
            writer: whose `generate` writes; the model itself, or what stands around it, as `LoraExperts`.
            streamer: is given each token as it is written, as in `model.generate`.
            settings: others of a `GenerationConfig`, such as `min_new_tokens`.

        Returns:
            (B, T + what was written).

        Raises:
            ConfigError: the policy was made for a model of another shape.
            DataError: a prompt is empty, or there is no room for the new tokens behind it.
        """
        self.check(model)
        _check_room(model, input_ids, attention_mask, max_new_tokens)
        noise = None if self.parameters.is_greedy else Noise(seed)
        return self.written(
            model,
            input_ids,
            attention_mask,
            noise,
            writer=writer,
            streamer=streamer,
            max_new_tokens=max_new_tokens,
            **settings,
        )

    @torch.no_grad()
    def written(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        noise: Noise | None,
        *,
        given: RowParameters | None = None,
        odds: Callable[[Tensor, RowParameters, History | None], Tensor] = warped,
        writer: Any = None,
        streamer: Any = None,
        **settings: Any,
    ) -> Tensor:
        """`generate` with noise and odds of one's own, and parameters for each row (B,) if they are given."""
        given = given or RowParameters.of(self.parameters)
        with evaluating(model), only_as_told(model), ExitStack() as blocks:
            blocks.enter_context(self.heard(model))
            if self.context is None:
                drawing = Drawing(given, noise, attention_mask, odds)
            else:
                hidden = blocks.enter_context(last_states(model))
                drawing = Drawing(
                    lambda: self.in_context(hidden[0][:, -1], given), noise, attention_mask, odds
                )
            writes: Any = writer or model
            return writes.generate(
                input_ids,
                attention_mask=attention_mask,
                logits_processor=[drawing],
                generation_config=_plain(model, settings),
                streamer=streamer,
            )

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        reward: Reward | None = None,
        **settings: Any,
    ) -> DecodingPolicy:
        """This policy fitted to a reward; `cambia.decoding.fitting.DecodingFit` tells what came of it.

        Args:
            texts: documents, in no order.
            reward: what is maximised; by default the match with what people write.
            settings: of a `DecodingFit`: `tokens`, `parameters`, `by="gradient"`, `seed` and others.

        Raises:
            ConfigError: the reward is constant or not a number, or a setting does not fit.
            DataError: the texts are too few or too short, or longer than the model's context.
        """
        from cambia.decoding.fitting import DecodingFit
        from cambia.decoding.rewards.match import MatchReward

        return DecodingFit(**settings).run(self, model, tokenizer, texts, reward or MatchReward()).policy

    def in_context(self, hidden: Tensor, given: RowParameters) -> RowParameters:
        """Parameters of each next token, (...,), from what the head is given, (..., D)."""
        if self.context is None:
            return given
        temperature, top_p = self.context(hidden, given.temperature, given.top_p)
        return replace(given, temperature=temperature, top_p=top_p)

    # ---- files ---------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in JSON."""
        found: dict[str, Any] = {"format_version": FORMAT_VERSION, **asdict(self.parameters)}
        if self.layer_weights is not None:
            found["layer_weights"] = self.layer_weights.tolist()
        if self.head_weights is not None:
            found["head_weights"] = [scale.tolist() for scale in self.head_weights]
        if self.context is not None:
            found["context"] = {name: value.tolist() for name, value in self.context.state_dict().items()}
        return found if self.made_for is None else {**found, "made_for": dict(self.made_for)}

    def to_json(self, path: str | Path) -> Path:
        """Write it to a file."""
        path = Path(path)
        files.write_json(path, self.to_dict())
        return path

    @classmethod
    def from_json(cls, path: str | Path, *, model: PreTrainedModel | None = None) -> Self:
        """Read what `to_json` wrote.

        Args:
            model: that it is for; its shape is checked.

        Raises:
            ConfigError: it is no such file, a parameter is outside its range, or it is for another model.
        """
        try:
            values = files.read_json(Path(path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as decoding parameters: {error}") from None
        try:
            policy = cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        if model is not None:
            policy.check(model)
        return policy

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; a mapping of parameters alone will do.

        Raises:
            ConfigError: a name is unknown, or a number outside its range.
        """
        left = _mapping(values, "a policy")
        version = left.pop("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ConfigError(f"format_version {version} is not known here (known: {FORMAT_VERSION})")
        layers, heads = left.pop("layer_weights", None), left.pop("head_weights", None)
        context, made_for = (
            None if left.get(name) is None else _mapping(left[name], name) for name in ("context", "made_for")
        )
        left = {name: value for name, value in left.items() if name not in ("context", "made_for")}
        parameters = DecodingParameters.of(left)
        try:
            return cls(
                parameters,
                None if layers is None else _numbers(layers, "layer_weights"),
                None if heads is None else [_numbers(scales, "head_weights") for scales in heads],
                None if context is None else _context(context),
                made_for,
            )
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"weights that are no numbers, or of no known shape: {error}") from None


InferenceEngine = DecodingPolicy
"""What the Dual-layer system called it."""


def sizes_of(model: PreTrainedModel) -> dict[str, Any]:
    """What a policy must know of a model, to refuse another."""
    return {name: getattr(model.config, name) for name in _SIZES}


@contextmanager
def last_states(model: PreTrainedModel) -> Generator[list[Tensor]]:
    """Inside the block a list whose one item is what the head was given last, (B, T, D)."""
    found: list[Tensor] = []

    def hook(module: Any, given: tuple[Any, ...]) -> None:
        found[:] = [given[0]]

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def _plain(model: PreTrainedModel, settings: Mapping[str, Any]) -> GenerationConfig:
    """Settings of `generate` with none of the model's own ways of drawing in them."""
    own, ends = model.generation_config, end_tokens(model)
    padding = own.pad_token_id if own.pad_token_id is not None else (*ends, 0)[0]
    plain = {"pad_token_id": padding, "eos_token_id": ends or None, "bos_token_id": own.bos_token_id}
    return GenerationConfig(do_sample=False, repetition_penalty=1.0, **{**plain, **settings})


def _check_room(model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None, new_tokens: int) -> None:
    """Refuse prompts that cannot be continued."""
    longest = input_ids.shape[1]
    empty = longest == 0 if mask is None else bool((mask.sum(1) == 0).any())
    if empty:
        raise DataError("a prompt is empty: a model writes behind at least one token, such as its bos_token")
    context = getattr(model.config, "max_position_embeddings", None)
    if mask is not None:
        longest = int(mask.sum(1).max())
    if context is not None and longest + new_tokens > context:
        raise DataError(
            f"a prompt of {longest} tokens and {new_tokens} new ones are more than the {context} that the "
            "model reads: shorten it, or lower max_new_tokens"
        )


def _mapping(values: Any, name: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name} has to be a mapping of names to values, not {values!r}")
    return dict(values)


def _numbers(values: Any, name: str) -> Tensor:
    found = torch.tensor(values, dtype=torch.float32)
    if found.dim() != 1 or not bool(torch.isfinite(found).all()):
        raise ConfigError(f"{name} have to be rows of finite numbers")
    return found


def _context(state: Mapping[str, Any]) -> ContextHead:
    tensors = {name: torch.tensor(value) for name, value in state.items()}
    head = ContextHead(tensors["linear.weight"].shape[1])
    head.load_state_dict(tensors)
    return head

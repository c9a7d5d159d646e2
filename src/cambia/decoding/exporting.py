"""Decoding parameters as others take them: transformers, servers with OpenAI's interface, vLLM, llama.cpp.

Each knows some of the parameters and reads some otherwise. What it cannot hold, or does in another way, is
said beside what it can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from cambia.decoding.parameters import SHORT, DecodingParameters
from cambia.decoding.policy import DecodingPolicy
from cambia.errors import ConfigError

PARAMS_JSON = "inference_params.json"
"""A policy beside a model."""


@dataclass(frozen=True)
class Exported:
    """Parameters for somebody else's program."""

    values: Mapping[str, Any]
    """As they are given to it."""
    left_out: tuple[str, ...] = ()
    """What it cannot hold, or does otherwise."""


def exported(policy: DecodingPolicy, to: str) -> Exported:
    """A policy's parameters as another program takes them.

    Args:
        to: transformers, openai, vllm or llama.cpp.

    Raises:
        ConfigError: there is no such program here.
    """
    if to not in EXPORTS:
        raise ConfigError(f"there is no export to {to!r}; known are {', '.join(EXPORTS)}")
    known = EXPORTS[to]
    parameters, own = policy.parameters, policy.parameters.changed
    values = {known.names[name]: getattr(parameters, name) for name in known.names}
    lost = [
        f"{SHORT[name]} {value:.3g}: {to} has no such parameter"
        for name, value in own.items()
        if name not in known.names
    ]
    if to == "transformers":
        values = _for_transformers(parameters, values)
    if to == "vllm" and not parameters.top_k:
        values["top_k"] = -1
    if to == "llama.cpp":
        values |= {"--repeat-last-n": -1, "--samplers": "penalties;temperature;top_k;top_p;min_p"}
    lost += [note for name, note in known.otherwise.items() if name in own]
    return Exported(values, (*lost, *_inside(policy)))


@dataclass(frozen=True)
class _Program:
    names: Mapping[str, str]
    """Our name of a parameter -> its own."""
    otherwise: Mapping[str, str]
    """What it does with one that we do in another way."""


_ALL = (
    *("temperature", "top_p", "min_p", "top_k"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
_DRAWN = "min-p: vLLM applies it before top-k and top-p, not after"
EXPORTS = {
    "transformers": _Program({name: name for name in _ALL[:5]}, {}),
    "openai": _Program(
        {name: name for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty")}, {}
    ),
    "vllm": _Program({name: name for name in _ALL}, {"min_p": _DRAWN}),
    "llama.cpp": _Program(
        {
            "temperature": "--temp",
            "top_p": "--top-p",
            "min_p": "--min-p",
            "top_k": "--top-k",
            "repetition_penalty": "--repeat-penalty",
            "presence_penalty": "--presence-penalty",
            "frequency_penalty": "--frequency-penalty",
        },
        {
            name: f"{SHORT[name]}: llama.cpp counts the tokens of the prompt, too"
            for name in ("presence_penalty", "frequency_penalty")
        },
    ),
}
"""Who takes which parameters."""


def _for_transformers(parameters: DecodingParameters, values: dict[str, Any]) -> dict[str, Any]:
    if parameters.is_greedy:  # a temperature beside do_sample=False is refused when it is saved
        return {"do_sample": False, "repetition_penalty": parameters.repetition_penalty}
    return {"do_sample": True, **values}


def _inside(policy: DecodingPolicy) -> list[str]:
    """What of a policy is no parameter of drawing."""
    lost = []
    if policy.layer_weights is not None:
        lost.append("weights of layers: no program but Cambia mixes hidden states before the head")
    if policy.head_weights is not None:
        lost.append("scales of heads: fold them into the weights, `cambia export --fold-heads`")
    if policy.context is not None:
        lost.append(
            "the head that sets temperature and top-p for each token: what stands here is where it begins"
        )
    return lost


def generation_config(
    policy: DecodingPolicy, model: PreTrainedModel | GenerationConfig | None = None
) -> GenerationConfig:
    """As `generation_config.json` of a model folder holds it, for stock transformers.

    Args:
        model: whose other settings (its end of text, its padding) are kept.
    """
    own = model.generation_config if isinstance(model, PreTrainedModel) else model
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    kept = {} if own is None else {name: getattr(own, name) for name in names}
    return GenerationConfig(**{**kept, **exported(policy, "transformers").values})


def write_beside(policy: DecodingPolicy, folder: Path) -> None:
    """Write a policy into a model's folder: whole for Cambia, and what stock transformers knows of it."""
    policy.to_json(folder / PARAMS_JSON)
    own = GenerationConfig.from_pretrained(folder) if (folder / GENERATION_CONFIG_NAME).exists() else None
    generation_config(policy, own).save_pretrained(folder)

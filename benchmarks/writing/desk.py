"""Models that write, and prompts from text that they know: what benchmarks of decoding share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetting.runs import NATIVE, pretrained, source
from forgetting.stories import stories_folder
from forgetting.streams import base_model
from harness import Parts

from cambia import rundir
from cambia.data.sources import TEST, TRAIN, VALID
from cambia.decoding import DecodingPolicy
from cambia.decoding.fitting import DecodingFit
from cambia.decoding.prompts import Prompts
from cambia.decoding.rewards import Reward
from cambia.experiment.build import open_stream
from cambia.experiment.decoding import prompts_of
from cambia.experiment.machine import find_device
from cambia.experiment.tree import experiment_from, read_tree
from cambia.models.saved import load_model

TOKENS = {"stories260K": (32, 48), "wikitext": (48, 64), "python": (48, 64)}
"""Of a prompt, and of a continuation; those of the last two are bytes."""


def model_of(name: str, data: Path, base_steps: int) -> Path:
    """The folder of a model."""
    if name == "stories260K":
        return stories_folder(data / "stories260K", rundir.run_folder("bench-decoding-stories260K"))
    folder = rundir.run_folder(f"bench-decoding-{name}-{base_steps}")
    if name == "wikitext":
        return base_model("llama", data, folder, steps=base_steps, rows=16)
    text = {"type": "embedded", "domain": "python"}
    return pretrained(folder, text, NATIVE, steps=base_steps, rows=16)


def text_of(name: str, data: Path) -> dict[str, Any]:
    """Where a model's text is."""
    if name == "stories260K":
        return {"type": "files", "path": str(data / "stories260K/tinystories_sample.txt.gz")}
    if name == "wikitext":
        return source("wikitext", data, plain=False)
    return {"type": "embedded", "domain": "python"}


@dataclass
class Desk:
    """A model, its prompts, and how parameters are looked for."""

    name: str
    data: Path
    base_steps: int

    def __post_init__(self) -> None:
        folder = model_of(self.name, self.data, self.base_steps)
        prompt_tokens, new_tokens = TOKENS[self.name]
        tree = read_tree("tune_decoding")[0]
        tree["data"]["tasks"] = [{"name": self.name, "source": text_of(self.name, self.data)}]
        tree["data"] |= {"valid_fraction": 0.3, "test_fraction": 0.3}
        tree["model"]["path"] = str(folder)
        tree["decoding"]["fit"] |= {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        experiment = experiment_from(tree, source="benchmark", flags={})
        tokenizer, stream = open_stream(experiment)
        assert experiment.decoding is not None
        self.model, self.tokenizer = load_model(folder).eval().to(find_device("auto")), tokenizer.hf
        self.fit = experiment.decoding.fit
        self.prompts = {
            split: prompts_of(stream, experiment.decoding, self.model, split)
            for split in (TRAIN, VALID, TEST)
        }

    def some(self, split: str, count: int) -> Prompts:
        """Prompts from all over a part of the text, no more than there are."""
        return self.prompts[split].at_most(count)

    def fitted(self, fit: DecodingFit, reward: Reward, *, most: int) -> tuple[DecodingPolicy, int]:
        """What a search comes to with so many prompts, and the tokens that it wrote."""
        found = fit.run(DecodingPolicy(), self.model, self.tokenizer, self.some(TRAIN, most), reward)
        return found.policy, found.tokens


def at_each_desk(
    cell: Callable[[Desk, int, Any], Any],
    models: Sequence[str],
    preset: Any,
    data: Path,
    parts: Parts,
    *,
    kind: str = "",
) -> dict[str, list[Any]]:
    """What `cell` finds for each model and seed; a model is opened when it is first needed.

    Args:
        kind: begins the name of each part, where several kinds are measured.
    """
    found: dict[str, list[Any]] = {}
    for name in models:
        desk = functools.cache(functools.partial(Desk, name, data, preset.base_steps))
        found[name] = [
            parts.once(f"{kind}{name}-{seed}", lambda at=desk, i=seed: cell(at(), i, preset))
            for seed in range(preset.seeds)
        ]
    return found

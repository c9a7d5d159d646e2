"""What weights of layers and heads are worth: held-out bits per byte of a model that stays as it is.

    cambia bench decoding_weights --preset headline

Three frozen models (`decoding_search` says which) are fitted to text by exact gradients of its likelihood:
the temperature alone, weights of layers, scales of heads, and all together. A quarter of the fitted text
decides when it is best; other documents say what it is worth, in bits per byte, beside the model as it is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness import in_parts, keep, over_seeds, table
from writing.desk import Desk, at_each_desk

from cambia.data.sources import TEST, TRAIN
from cambia.decoding import DecodingPolicy
from cambia.decoding.learners import text_of
from cambia.decoding.likelihood import LikelihoodFit, Text, mean_loss
from cambia.decoding.prompts import Prompts
from cambia.decoding.rollouts import Rollouts


@dataclass(frozen=True)
class Preset:
    """How much is measured."""

    models: tuple[str, ...] = ("stories260K", "wikitext", "python")
    seeds: int = 3
    steps: int = 200
    rows: int = 32
    """Of a step."""
    read: int = 2000
    """Stretches that are fitted to."""
    held: int = 1000
    """Stretches of other documents."""
    base_steps: int = 800
    workers: int | None = None


PRESETS = {
    "quick": Preset(("stories260K",), seeds=1, steps=20, rows=8, read=80, held=40),
    "headline": Preset(),
    "full": Preset(steps=1000, read=4000),
    "gpu": Preset(steps=2000, rows=256, read=4000),
}
LEARNS: dict[str, dict[str, Any]] = {
    "temperature": {},
    "layers": {"layers": True},
    "heads": {"heads": True},
    "all": {"layers": True, "heads": True},
}


def cell(at: Desk, seed: int, preset: Preset) -> dict[str, Any]:
    """Bits per byte by what is learned, and how far it moved."""

    def rows(prompts: Prompts) -> Text:
        return text_of(Rollouts(at.model, at.tokenizer, prompts, new_tokens=at.fit.new_tokens))

    train = at.prompts[TRAIN]
    size = min(preset.read, len(train))
    begin = seed * size % max(1, len(train) - size + 1)
    chosen = rows(train.take(range(begin, begin + size)))
    held = at.some(TEST, preset.held)
    text, size_bytes = rows(held), written_bytes(at, held)
    count = int(text.counted.sum())

    def bits(policy: DecodingPolicy) -> float:
        return mean_loss(policy, at.model, text) * count / size_bytes / math.log(2)

    found = {"as it is": bits(DecodingPolicy())}
    moved: dict[str, list[float]] = {}
    for name, parts in LEARNS.items():
        learns = ("temperature",) if name in ("temperature", "all") else ()
        fit = replace(LikelihoodFit(), learns=learns, steps=preset.steps, batch_size=preset.rows)
        start = DecodingPolicy.of(at.model, **parts)
        learner = fit.learner(start, at.model, *halves(chosen), seed=seed)
        for _ in range(preset.steps):
            learner.step()
        learner.look()
        found[name] = bits(learner.best)
        weights = learner.best.layer_weights
        moved[name] = [] if weights is None else weights.tolist()
    return {"bits": found, "layer_weights": moved, "windows": len(held)}


def halves(text: Text) -> tuple[Text, Text]:
    """Three quarters to learn from, and one that decides when it is best."""
    cut = 3 * len(text) // 4
    places = range(len(text))
    return text.chosen(list(places[:cut])), text.chosen(list(places[cut:]))


def written_bytes(at: Desk, prompts: Prompts) -> int:
    """UTF-8 bytes of what stands behind prompts."""
    texts = (at.tokenizer.decode(list(row), skip_special_tokens=True) for row in prompts.human)
    return sum(len(str(text).encode()) for text in texts)


def markdown(result: Mapping[str, Any]) -> str:
    """The table."""
    preset, rows = result["preset"], []
    for name, cells in result["models"].items():
        before = cells[0]["bits"]["as it is"]
        gains = {what: [one["bits"]["as it is"] - one["bits"][what] for one in cells] for what in LEARNS}
        rows.append(
            [
                name,
                f"{cells[0]['windows']:,}",
                f"{before:.4f}",
                *(over_seeds(gains[what], 4) for what in LEARNS),
            ]
        )
    note = (
        "Bits per byte of stretches of documents that nothing was fitted to, and by how much it falls with "
        f"what is learned, {preset['steps']} steps on at most {preset['read']:,} stretches; mean and "
        f"standard deviation over {preset['seeds']} seeds (other stretches, in another order)."
    )
    head = ["model", "stretches", "as it is", *(f"{name} learned" for name in LEARNS)]
    return f"{note}\n\n{table(head, rows)}"


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    """The README's row."""
    gains = {
        name: statistics.fmean(one["bits"]["as it is"] - one["bits"]["all"] for one in cells)
        for name, cells in result["models"].items()
    }
    told = ", ".join(f"{name} {gain:+.3f}" for name, gain in gains.items())
    return {
        "temperature, weights of layers and heads, learned: bits per byte that a frozen model saves": told
    }


def main() -> None:
    options, preset, data, parts = in_parts(__doc__, PRESETS)
    models = at_each_desk(cell, preset.models, preset, data, parts)
    result = {
        "name": f"decoding_weights_{options.preset}",
        "preset": asdict(preset),
        "models": models,
    }
    print(markdown(result))
    keep(__file__, options, result)


if __name__ == "__main__":
    main()

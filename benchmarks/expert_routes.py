"""Who answers a text, told from its beginning in every way there is, and what tells new text from known.

    cambia bench expert_routes --preset headline [--parts FOLDER]

A small model that has read an encyclopedia learns domains one after another, by the recipe `learn`, without
being told where one ends: far ones, near ones with the marks of their making removed, and near ones as they
are. Then test windows of 128 bytes are routed by their first bytes:

    routes      the share of windows that go to the expert which learned their domain, over the length of the
                prefix, and the loss behind the first 64 bytes, beside that of the right routes
    in PEFT     the same experts without tables and gains, which PEFT holds as stock adapters: its Arrow, and
                its X-LoRA, whose gate is trained on text of all domains at once, beside ours
    detectors   how well each novelty score of the package tells the next domain's text from that of the known
                ones, and after how many batches it is noticed at the stated rate of false alarms

Everything that is trained is a sweep of runs: a stopped benchmark goes on where it was. What was measured on
each run is kept in the folder of --parts. The corpora are found by CAMBIA_DATA.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from forgetting.runs import NATIVE, sweep_seeds
from forgetting.streams import PREFIX, base_model, domains_of, experiment, learner
from harness import in_parts, keep, over_seeds, seeds_told, table
from routes import in_peft
from routes.deciders import LABELS, WAYS, Learned, bits, by_tokens, compared, suffix_losses
from routes.detectors import TOGETHER, Amount, Texts, detected
from routes.figures import curves_figure, detectors_figure
from torch import Tensor, nn

import cambia
from cambia import rundir
from cambia.continual.novelty import NOVELTY_SCORES
from cambia.data.batches import TrainBatches
from cambia.data.sources import TEST, TRAIN
from cambia.experiment.build import open_stream
from cambia.experiment.tree import experiment_from
from cambia.reporting.units import plural
from cambia.rundir import RunReader

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
KINDS = {
    "experts": learner(),
    "low_rank": learner(shape={"tables": "none", "gains": False}),
}
"""The experts of the recipe, and those that all of PEFT's ways can take."""
GATE_RATE = 0.01
"""Of X-LoRA's gate."""
GOALS = {"far": 0.99, "near": 0.90, "near_raw": 0.95}
"""The share of windows to be routed right by 64 bytes under `compete`."""
SCORES = {
    "likelihood": "n-gram likelihood",
    "ratio": "the same over the base's",
    "mahalanobis": "relative Mahalanobis distance",
    TOGETHER: "these three, averaged (the default)",
    "entropy": "entropy of a router",
    "cosine": "cosine to the domain's mean",
}


@dataclass(frozen=True)
class Preset:
    """How much is measured."""

    streams: tuple[str, ...] = ("far", "near", "near_raw")
    steps: int = 200
    """Steps of new text on each domain."""
    rows: int = 16
    """Sequences of 128 bytes in each step."""
    base_steps: int = 800
    base: str = "bench-experts-headline-llama"
    """The run that trains it: the one of `experts`."""
    shape: Mapping[str, Any] = field(default_factory=lambda: dict(NATIVE))
    """Of the base."""
    seeds: int = 1
    beside_peft: tuple[str, ...] = ("far", "near")
    """Streams on which PEFT's ways are measured too."""
    low_rank_seeds: int = 1
    """Of the experts there."""
    windows: int = 120
    """Test windows of each domain."""
    lengths: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Bytes of prefixes."""
    gate_steps: int = 80
    """Steps of 16 rows of all domains' text in which X-LoRA's gate is trained."""
    amount: Amount = field(default_factory=lambda: Amount(rows=800, batches=24))
    """Text for the detectors."""
    workers: int | None = None


PRESETS = {
    "quick": Preset(
        ("far",),
        steps=20,
        base_steps=40,
        base="",
        shape={**NATIVE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        seeds=1,
        windows=24,
        lengths=(16, 64),
        gate_steps=5,
        amount=Amount(rows=320, batches=6, trials=2),
    ),
    "headline": Preset(),
    "full": Preset(seeds=3, low_rank_seeds=3, windows=160),
}


# ---- the runs ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Place:
    """Where things are."""

    name: str
    data: Path
    base: Path
    preset: Preset

    def settings(self, stream: str) -> dict[str, Any]:
        """Of all runs on a stream."""
        preset = self.preset
        return experiment(
            stream, None, self.data, self.base, steps=preset.steps, rows=preset.rows, scored_bytes=4096
        )

    def seeds(self, stream: str) -> dict[str, range]:
        """Of each kind of experts."""
        low_rank = self.preset.low_rank_seeds if stream in self.preset.beside_peft else 0
        return {"experts": range(self.preset.seeds), "low_rank": range(low_rank)}

    @functools.cache  # noqa: B019 (lives as long as the benchmark)
    def runs(self, stream: str) -> dict[str, list[RunReader]]:
        """Trained, by kind, in the order of the seeds."""
        seeds = self.seeds(stream)
        kinds = {kind: settings for kind, settings in KINDS.items() if seeds[kind]}
        return sweep_seeds(
            f"{self.name}-{stream}",
            self.settings(stream),
            kinds,
            seeds,
            self.preset.workers,
            keep_checkpoints=True,
        )

    def detectors(self, stream: str) -> list[list[dict[str, Any]]]:
        """What `detected` finds, for each seed's order."""
        _, texts = open_stream(experiment_from(self.settings(stream), source=stream, flags={}))
        read = Texts.read(cambia.load(self.base), texts, self.preset.amount)
        orders = [list(domains_of(stream, seed)) for seed in range(self.preset.seeds)]
        return [detected(read, order, self.preset.amount) for order in orders]


def cell(run: RunReader, kind: str, preset: Preset) -> dict[str, Any]:
    """All ways on what a run has learned."""
    learned = Learned.by(run)
    windows = learned.windows(TEST, preset.windows)
    found = {
        "right_one": dict(learned.right),
        "experts": len(learned.experts.names),
        **compared(learned, windows, preset.lengths),
    }
    if kind == "low_rank" and learned.experts.names:
        found["losses"]["arrow"] = by_tokens(learned.experts, windows)
        with tempfile.TemporaryDirectory() as folder:
            found["losses"] |= of_peft(learned, windows, Path(folder), preset)
    return found


def of_peft(
    learned: Learned, windows: Mapping[str, Tensor], folder: Path, preset: Preset
) -> dict[str, dict[str, float]]:
    """Row -> domain -> bits per byte."""
    experts = learned.experts
    adapters = in_peft.written(experts, folder)
    models: dict[str, nn.Module] = {
        f"peft_arrow_{k}": in_peft.arrow(experts, adapters, top_k=min(k, len(adapters))) for k in (1, 3)
    }
    torch.manual_seed(0)
    models["xlora"], _ = in_peft.xlora(experts, adapters, all_text(learned, preset), rate=GATE_RATE)
    return {
        row: {domain: bits(suffix_losses(model, rows)) for domain, rows in windows.items()}
        for row, model in models.items()
    }


def all_text(learned: Learned, preset: Preset) -> Iterator[Tensor]:
    """Batches of training text of all domains, mixed."""
    stream = learned.stream
    count = -(-preset.rows // len(stream.names))
    turns = [
        TrainBatches(task.file(TRAIN), batch_size=count, sequence_length=stream.sequence_length, seed=100 + i)
        for i, task in enumerate(stream.tasks)
    ]
    for _ in range(preset.gate_steps):
        yield torch.cat([next(turn).input_ids for turn in turns])


# ---- tables --------------------------------------------------------------------------------------


def mean_of(by_domain: Mapping[str, float]) -> float:
    """Every domain counts alike."""
    return statistics.fmean(by_domain.values())


def best_single(cell: Mapping[str, Any]) -> float:
    """Bits per byte if one of them answered everything."""
    return min(mean_of(by_domain) for by_domain in cell["single"].values())


def losses_of(cells: Sequence[Mapping[str, Any]], row: str) -> list[float]:
    """By seed."""
    if row == "single":
        return [best_single(one) for one in cells]
    return [mean_of(one["losses"][row]) for one in cells]


def shares_of(cells: Sequence[Mapping[str, Any]], way: str, at: int) -> list[float]:
    """By seed: the share of windows that go right, at a length's place."""
    return [statistics.fmean(s[at] for s in one["right"][way].values()) for one in cells]


def routes_table(result: Mapping[str, Any], kind: str) -> str:
    """Every way on every stream, lowest loss first."""
    streams = {stream: found[kind] for stream, found in result["streams"].items() if found[kind]}
    first = next(iter(streams.values()))
    at = result["preset"]["lengths"].index(PREFIX)
    rows = [row for row in LABELS if row == "single" or row in first[0]["losses"]]
    rows.sort(
        key=lambda row: statistics.fmean(v for cells in streams.values() for v in losses_of(cells, row))
    )
    head = ["who answers"]
    for stream in streams:
        shown = stream.replace("_", ", ")
        head += [f"{shown}: right", f"{shown}: bits per byte"]
    lines = []
    for row in rows:
        line = [LABELS[row]]
        for cells in streams.values():
            line += [over_seeds(shares_of(cells, row, at)) if row in WAYS else ""]
            line += [over_seeds(losses_of(cells, row))]
        lines.append(line)
    return table(head, lines)


def detectors_table(result: Mapping[str, Any]) -> str:
    """Each score on each stream."""
    head = ["novelty score"]
    for stream in result["detectors"]:
        shown = stream.replace("_", ", ")
        head += [f"{shown}: AUROC by window, batch", f"{shown}: batches until noticed"]
    lines = []
    for score, label in SCORES.items():
        line = [label]
        for seeds in result["detectors"].values():
            found = [change["scores"][score] for changes in seeds for change in changes]
            line.append(
                ", ".join(f"{statistics.fmean(f[w] for f in found):.3f}" for w in ("window", "batch"))
            )
            line.append(delay_text(found))
        lines.append(line)
    return table(head, lines)


def delay_text(found: Sequence[Mapping[str, Any]]) -> str:
    """Median and longest delay, what was never noticed, and false alarms."""
    delays = [delay for one in found for delay in one["delays"]]
    came = sorted(delay for delay in delays if delay is not None)
    told = f"{statistics.median_low(came)} (at most {came[-1]})" if came else "never"
    if came and len(came) < len(delays):
        told += f", {len(delays) - len(came)} of {len(delays)} never"
    false = sum(one["false"] for one in found)
    return f"{told}; {plural(false, 'false alarm')}" if false else told


def markdown(result: Mapping[str, Any]) -> str:
    """The tables and the pictures."""
    preset, picture = result["preset"], f"pictures/{result['name']}"
    counts = {kind: len(next(iter(result["streams"].values()))[kind]) for kind in KINDS}
    at = preset["lengths"].index(PREFIX)
    reached = []
    for stream, found in result["streams"].items():
        share, goal = statistics.fmean(shares_of(found["experts"], "compete", at)), GOALS[stream]
        said = "reached" if share >= goal else "missed"
        reached.append(f"{stream.replace('_', ', ')} {share:.3f} of {goal:.2f}, {said}")
    orders = list(result["detectors"].values())
    quiet = sum(one["scores"][TOGETHER]["quiet"] for seeds in orders for changes in seeds for one in changes)
    parts = [
        f"Test windows routed by their first {PREFIX} bytes, {preset['windows']} a domain, and bits per "
        f"byte of what follows; {seeds_told(counts['experts'])}. Goals of `compete`: {'; '.join(reached)}.",
        routes_table(result, "experts"),
        f"![windows routed right over the length of the prefix; dotted: goals]({picture}_curves.png)",
        "Experts of low-rank deltas alone, as PEFT's ways need them "
        f"({seeds_told(counts['low_rank'])}). X-LoRA's gate read {preset['gate_steps']} batches of "
        "all domains at once; Arrow and X-LoRA decide token by token:",
        routes_table(result, "low_rank"),
        "New text against known text: each domain against those before it, "
        f"{plural(len(orders[0]), 'order')} a stream, batches of {preset['amount']['batch']} windows of "
        "128 bytes. Noticed by a bet whose probability of ever a false alarm is at most 0.01; "
        f"{quiet} batches of known text were watched:",
        detectors_table(result),
        f"![AUROC by novelty score; dots: changes, diamonds: their means]({picture}_detectors.png)",
    ]
    # Of quick nothing is drawn.
    drawn = result["name"] != "expert_routes_quick"
    return "\n\n".join(part for part in parts if drawn or not part.startswith("!["))


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    """README's rows."""
    at = result["preset"]["lengths"].index(PREFIX)
    found = {stream: kinds["experts"] for stream, kinds in result["streams"].items()}
    shares = ", ".join(f"{statistics.fmean(shares_of(cells, 'compete', at)):.3f}" for cells in found.values())
    names = ", ".join(stream.replace("_", " ") for stream in found)
    rows = {f"windows that 64 bytes send to the right LoRA expert, by `compete`: {names}": shares}
    beside = result["streams"].get("far", {}).get("low_rank")
    if beside:
        ways = ("peft_arrow_3", "xlora", "compete", "oracle")
        losses = ", ".join(over_seeds(losses_of(beside, way)) for way in ways)
        rows["far domains, the same LoRA experts, bits per byte: Arrow, X-LoRA, ours, told which"] = losses
    return rows


def draw(result: Mapping[str, Any]) -> None:
    """Both pictures."""
    preset = result["preset"]
    curves = {
        stream: {
            way: [
                statistics.fmean(shares_of(kinds["experts"], way, i)) for i in range(len(preset["lengths"]))
            ]
            for way in WAYS
        }
        for stream, kinds in result["streams"].items()
    }
    scores = {
        what: {
            stream: {
                score: [change["scores"][score][what] for changes in seeds for change in changes]
                for score in SCORES
            }
            for stream, seeds in result["detectors"].items()
        }
        for what in ("window", "batch")
    }
    figures = {
        "curves": curves_figure(preset["lengths"], curves, LABELS, GOALS),
        "detectors": detectors_figure(scores, SCORES),
    }
    for kind, figure in figures.items():
        figure.savefig(PICTURES / f"{result['name']}_{kind}.png", dpi=130, facecolor="white")


def main() -> None:
    options, preset, data, parts = in_parts(__doc__, PRESETS)
    assert set(SCORES) == {*NOVELTY_SCORES, TOGETHER}
    name = f"bench-expert_routes-{options.preset}"
    folder = rundir.run_folder(preset.base or f"{name}-base")
    base = base_model("llama", data, folder, steps=preset.base_steps, rows=preset.rows, shape=preset.shape)
    place = Place(name, data, base, preset)
    streams: dict[str, dict[str, list[Any]]] = {}
    detectors = {}
    for stream in preset.streams:
        streams[stream] = {kind: [] for kind in KINDS}
        for kind, seeds in place.seeds(stream).items():
            for i, seed in enumerate(seeds):
                measure = functools.partial(
                    lambda s, k, i: cell(place.runs(s)[k][i], k, preset), stream, kind, i
                )
                streams[stream][kind].append(parts.once(f"{stream}-{kind}-{seed}", measure))
        detectors[stream] = parts.once(f"{stream}-detectors", functools.partial(place.detectors, stream))
    result = {
        "name": f"expert_routes_{options.preset}",
        "preset": asdict(preset),
        "streams": streams,
        "detectors": detectors,
    }
    if options.preset != "quick":
        draw(result)
    print(markdown(result))
    keep(__file__, options, result)


if __name__ == "__main__":
    main()

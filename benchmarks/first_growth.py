"""The first run, measured: time, task matrix, exactness of growth, and whether prompts stay in their domain.

    cambia bench first_growth --preset full

Three seeds of recipe `first_growth`, each as `cambia run` would do it. Then text is continued: prompts of
128 bytes from the test split of each domain, 256 bytes written to each as `cambia generate` does it, and a
byte n-gram classifier built from the training splits says which domain the continuation alone (without its
prompt) is of. The classifier's own accuracy on real test text of the same length stands beside it. Goals:
under 5 minutes a run on 2 cores, at least 9 of 10 continuations in the domain of their prompt.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from harness import arguments, keep, table

from cambia.data.corpus import PreparedCorpus
from cambia.evaluation import task_matrix, transfer_metrics
from cambia.experiment import load, read_experiment, train
from cambia.experiment.build import open_stream
from cambia.generation import continue_text
from cambia.models.saved import load_tokenizer
from cambia.reporting.units import duration
from cambia.rundir import RunReader

ORDER = 6
BUCKETS = 1 << 22
PRIOR = 4.0
SHORTEST = 16  # bytes
PROMPT_BYTES, WRITTEN_BYTES = 128, 256
PROMPTS = 40  # per domain
DOMAINS = {"english": "English", "python": "Python", "cpp": "C++"}
PRESETS = {
    "quick": {"seeds": 1, "prompts": 2, "settings": {"training.steps": 8, "evaluation.max_bytes": 2000}},
    "full": {"seeds": 3, "prompts": PROMPTS, "settings": {}},
}


class NgramClassifier:
    """Which domain gives a text the highest likelihood, each by a byte n-gram model of its training split.

    Every order falls back on the next shorter one with the weight of `PRIOR` observations (absolute
    counts, hashed). All domains are read to the length of the shortest, so that none is favoured.
    """

    def __init__(self, corpora: dict[str, PreparedCorpus]):
        self.names = list(corpora)
        texts = [np.asarray(corpus.splits["train"].tokens) for corpus in corpora.values()]
        least = min(map(len, texts))
        self.counts = [
            [np.bincount(grams, minlength=BUCKETS) for grams in self.grams(text[:least])] for text in texts
        ]

    @staticmethod
    def grams(tokens: np.ndarray) -> list[np.ndarray]:
        """For each length from 0 to ORDER the hash of the last bytes at each place, from place ORDER on."""
        values = tokens.astype(np.uint64) + np.uint64(1)
        sums, hashes = np.zeros(len(values), dtype=np.uint64), []
        for length in range(ORDER + 1):
            if length:
                back = np.concatenate([np.zeros(length - 1, np.uint64), values[: len(values) - length + 1]])
                sums = sums + back * np.uint64(pow(0x9E3779B97F4A7C15, length, 1 << 64))
            mixed = (sums ^ (sums >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(32)
            hashes.append((mixed % np.uint64(BUCKETS)).astype(np.int64)[ORDER - 1 :])
        return hashes

    def __call__(self, text: bytes) -> str:
        """The domain's name, or "nothing" for a text that ends before it can be judged."""
        if len(text) < SHORTEST:
            return "nothing"
        grams = self.grams(np.frombuffer(text, dtype=np.uint8))
        return self.names[int(np.argmax([self._log_likelihood(counts, grams) for counts in self.counts]))]

    @staticmethod
    def _log_likelihood(counts: list[np.ndarray], grams: list[np.ndarray]) -> float:
        likely = np.full(len(grams[0]) - 1, 1 / 256)
        for length in range(1, ORDER + 1):
            seen = counts[length - 1][grams[length - 1][:-1]] if length > 1 else counts[1].sum()
            likely = (counts[length][grams[length][1:]] + PRIOR * likely) / (seen + PRIOR)
        return float(np.log(likely).sum())


def stretches(corpus: PreparedCorpus, length: int, count: int) -> list[bytes]:
    """Stretches of test text, spread evenly, each inside one document and valid UTF-8 at its start."""
    file = corpus.splits["test"]
    tokens = np.asarray(file.tokens)
    found = []
    for start in np.linspace(0, len(tokens) - length - 1, 40 * count).astype(int):
        piece = tokens[start : start + length]
        if piece.max() < 128 and (not found or start >= found[-1][0] + length):
            found.append((start, bytes(piece.astype(np.uint8))))
    chosen = np.linspace(0, len(found) - 1, count).astype(int)
    return [found[i][1] for i in chosen]


def one_run(seed: int, count: int, settings: dict[str, Any]) -> dict:
    """Train; continue `count` prompts of each domain."""
    began = time.perf_counter()
    folder = train("first_growth", name=f"first_growth-seed{seed}", overrides={"seed": seed, **settings})
    seconds = time.perf_counter() - began
    reader = RunReader(folder)
    found = task_matrix(reader.rows("eval.csv"))
    matrix, tasks = found.rows, found.tasks
    metrics = transfer_metrics(matrix, tasks, trained=found.trained)

    _, stream = open_stream(read_experiment("first_growth"))
    corpora = {task.name: task.corpus for task in stream.tasks}
    classify = NgramClassifier(corpora)
    model, tokenizer = load(folder), load_tokenizer(folder / "latest")
    kept, plainly, ceiling = {}, {}, {}
    for name, corpus in corpora.items():
        prompts = [text.decode("ascii") for text in stretches(corpus, PROMPT_BYTES, count)]
        written = continue_text(model, tokenizer, prompts, max_new_tokens=WRITTEN_BYTES, seed=seed)
        kept[name] = statistics.mean(classify(text.encode()) == name for text in written)
        as_it_is = {"temperature": 1.0, "top_p": 1.0}
        written = continue_text(
            model, tokenizer, prompts, max_new_tokens=WRITTEN_BYTES, seed=seed, **as_it_is
        )
        plainly[name] = statistics.mean(classify(text.encode()) == name for text in written)
        real = stretches(corpus, WRITTEN_BYTES, 4 * count)
        ceiling[name] = statistics.mean(classify(text) == name for text in real)
    events = reader.growth()
    return {
        "seed": seed,
        "wall_seconds": round(seconds, 1),
        "parameters": [events[0]["parameters_before"], events[-1]["parameters_after"]],
        "growth_events": len(events),
        "largest_logit_error": max(event["logit_error"] for event in events),
        "matrix_bits_per_byte": matrix,
        "tasks": tasks,
        "learned": metrics.learned,
        "forgotten": metrics.forgotten,
        "final_mean_bits_per_byte": metrics.final_mean,
        "continuations_in_domain": kept,
        "continuations_in_domain_at_temperature_1": plainly,
        "classifier_on_real_text": ceiling,
    }


def markdown(result: Mapping[str, Any]) -> str:
    tasks = [DOMAINS[task] for task in result["runs"][0]["tasks"]]
    head = (
        "seed",
        "wall time",
        "parameters",
        "largest logit error",
        "bits per byte at the end, mean",
        f"forgotten, bits per byte ({', '.join(tasks)})",
        "continuations in their domain",
        "at temperature 1",
        "real text, as judged",
    )
    rows = []
    for row in result["runs"]:
        kept = (
            "continuations_in_domain",
            "continuations_in_domain_at_temperature_1",
            "classifier_on_real_text",
        )
        rows.append(
            [
                str(row["seed"]),
                duration(row["wall_seconds"]),
                " → ".join(f"{count:,}" for count in row["parameters"]),
                tiny(row["largest_logit_error"]),
                f"{row['final_mean_bits_per_byte']:.3f}",
                ", ".join(f"{value:.2f}" for value in row["forgotten"]),
                *(", ".join(f"{share:.3f}" for share in row[name].values()) for name in kept),
            ]
        )
    return table(head, rows)


def tiny(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-")


def headlines(result: Mapping[str, Any]) -> dict[str, str]:
    runs = result["runs"]
    seconds = [row["wall_seconds"] for row in runs]
    error = max(row["largest_logit_error"] for row in runs)
    shares = {
        label: statistics.mean(row["continuations_in_domain"][name] for row in runs)
        for name, label in DOMAINS.items()
    }
    return {
        "`first_growth`: wall time; largest relative change of a logit at growth": (
            f"{duration(min(seconds))} to {duration(max(seconds))}; {tiny(error)}"
        ),
        f"`first_growth`: continuations in the domain of their prompt, {PROMPTS} prompts each, "
        f"{len(runs)} seeds, as an n-gram classifier judges": ", ".join(
            f"{name} {share:.2f}" for name, share in shares.items()
        ),
    }


def main() -> None:
    options = arguments(__doc__, PRESETS)
    preset = PRESETS[options.preset]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CAMBIA_RUNS"] = str(Path(folder) / "runs")
        runs = [one_run(seed, preset["prompts"], preset["settings"]) for seed in range(preset["seeds"])]
    found = {"runs": runs}
    print(markdown(found))
    keep(__file__, options, found)


if __name__ == "__main__":
    main()

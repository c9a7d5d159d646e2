"""Commands that use or show what a run has made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cambia.cli.app import Whole, app, console, refuse_unless
from cambia.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cambia.decoding.policy import DecodingPolicy


@app.command
def generate(
    model: str,
    *,
    prompt: list[str],
    max_new_tokens: Whole = 256,
    temperature: float | None = None,
    top_p: float | None = None,
    decoding: list[str] | None = None,
    seed: Whole = 0,
) -> None:
    """Continue text with the model of a run, a checkpoint, or a Hugging Face folder.

    Where it has experts, each prompt is answered by the one whose text it resembles, or by the model alone.
    A model that was tuned (`cambia tune-decoding`) writes as it has learned, others with temperature 0.7 and
    top-p 0.9.

    Args:
        model: a run's name, or a folder.
        prompt: text to continue; may be given several times.
        max_new_tokens: how much to write (bytes, for a byte-level model).
        temperature: 0 takes the likeliest token always.
        top_p: sample from the likeliest tokens that together have this probability.
        decoding: an inference_params.json, or a run whose decoding has learned; EXPERT=FILE for one expert.
        seed: the same seed writes the same text.
    """
    from cambia.experiment.decoding import policies_of
    from cambia.experiment.starts import experts_beside, model_folder
    from cambia.generation import continue_text, routes_of
    from cambia.models.saved import load_model, load_tokenizer

    refuse_unless(max_new_tokens >= 1, "--max-new-tokens", max_new_tokens, "a whole number from 1")
    refuse_unless(0 <= seed < 2**63, "--seed", seed, "a whole number from 0, below 2^63")
    is_drawn = temperature is None or temperature == 0 or 1e-4 <= temperature < 1e4
    refuse_unless(is_drawn, "--temperature", temperature, "0, or a number from 0.0001, below 10000")
    if decoding and (temperature is not None or top_p is not None):
        raise ConfigError("--decoding says how to draw: leave out --temperature and --top-p")
    folder = model_folder(model)
    loaded, tokenizer = load_model(folder), load_tokenizer(folder)
    experts = experts_beside(model, loaded)
    routes = routes_of(experts, tokenizer, prompt) if experts is not None else [None] * len(prompt)
    drawn = {"temperature": temperature, "top_p": top_p}
    chosen = {name: value for name, value in drawn.items() if value is not None}
    policies = policies_of(decoding or [], loaded, None if chosen else folder)
    texts = continue_text(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        seed=seed,
        writer=policies.writer(loaded, routes, seed=seed, writer=experts) or experts,
        **chosen,
    )
    out = console()
    for given, text, route in zip(prompt, texts, routes, strict=True):
        out.print(f"[bold]{_escape(given)}[/bold]{_escape(text)}\n", soft_wrap=True)  # as it was written
        told = [f"answered by {route or 'the model alone'}"] if experts is not None else []
        told += [f"drawn with {policies.of(route).parameters}"] if policies else []
        if told:
            out.print(f"[dim]{_escape(', '.join(told))}[/dim]\n", soft_wrap=True)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@app.command(name="eval")
def evaluate(
    model: str,
    *files: Path,
    data: list[Path] | None = None,
    split: str = "test",
    max_bytes: Whole = 262_144,
) -> None:
    """Score a model in bits per byte: on the tasks of its run, or on text files.

    Args:
        model: a run's name, a checkpoint, or a folder with a model.
        files: text files; left out, the tasks of the run.
        data: text files too; may be given several times.
        split: of the run's tasks: valid or test.
        max_bytes: text scored per task or file, in whole documents.
    """
    from rich.table import Table

    from cambia.experiment.score import score_files, score_run

    refuse_unless(max_bytes >= 1, "--max-bytes", max_bytes, "a whole number from 1")
    texts = [*files, *(data or [])]
    scores = score_files(model, texts, max_bytes) if texts else score_run(model, split, max_bytes)
    table = Table("text", "bytes", "bits per byte", "nats per byte", box=None)
    for name, score in scores.items():
        table.add_row(name, f"{score.bytes:,}", f"{score.bits_per_byte:.4f}", f"{score.nats_per_byte:.4f}")
    console().print(table)


@app.command
def report(name: str, *, metric: str | None = None, baseline: str | None = None) -> None:
    """Print the results of a run or a sweep and write its report.html, also while it is still going.

    Args:
        name: of a run or a sweep, or its folder.
        metric: of a sweep: what to show instead of bits per byte.
        baseline: of a sweep: AXIS=VALUE, what the other values of that axis are compared with.
    """
    from cambia import reporting

    found = reporting.load(name)
    if isinstance(found, reporting.Sweep):
        reporting.write_sweep_report(found, metric=metric, baseline=baseline)
        reporting.print_sweep(found, console(), metric=metric, baseline=baseline)
        return
    if metric or baseline:
        flag = "--metric" if metric else "--baseline"
        raise ConfigError(f"{flag} is for sweeps and {name!r} is a run: leave it out")
    reporting.write_report(found)
    reporting.print_summary(found, console())


@app.command
def compare(*names: str, metric: str | None = None, out: Path = Path("comparison.html")) -> None:
    """Compare runs at equal tokens, operations and parameters, or sweeps where they chose alike.

    Args:
        names: at least two runs, or checkpoints of them (RUN/ckpt_step200); or at least two sweeps.
        metric: of sweeps: what to compare instead of bits per byte.
        out: the page to write, with the curves or the paired differences.
    """
    from cambia import reporting

    if reporting.are_sweeps(names):
        sweeps = reporting.compare_sweeps([reporting.load_sweep(name) for name in names], metric)
        reporting.print_sweep_comparison(sweeps, console())
        console().print(f"page: {reporting.write_sweep_comparison(sweeps, out)}", soft_wrap=True)
        return
    if metric:
        raise ConfigError("--metric is for sweeps and these are runs: leave it out")
    runs = reporting.compare([reporting.load_for_comparison(name) for name in names])
    reporting.print_comparison(runs, console())
    console().print(f"curves: {reporting.write_comparison(runs, out)}")


@app.command
def export(model: str, out: Path, *, to: str | None = None, fold_heads: bool = False) -> None:
    """Write a model as a stock Hugging Face class with the same logits, without the state of training.

    Experts are written into its folder `experts`, each as a stock adapter of PEFT. With `--to vllm` and the
    like only how it is decoded from is written, as a JSON file, and what the program cannot hold is said.

    Args:
        model: a run's name, or a folder with a model.
        out: the folder to write, or the file; must not exist.
        to: the class: llama for a native model (uneven layers are padded with zeros), its own for another;
            or a program that takes decoding parameters: transformers, openai, vllm, llama.cpp.
        fold_heads: put the scales of heads that decoding has learned into the weights.
    """
    from cambia.continual.methods.experts import EXPERTS_FOLDER
    from cambia.decoding.exporting import EXPORTS
    from cambia.experiment.starts import experts_beside, model_folder
    from cambia.files import atomic_folder
    from cambia.models.causal_lm import CambiaForCausalLM
    from cambia.models.export import to_llama
    from cambia.models.saved import load_model, load_tokenizer
    from cambia.reporting.units import plural

    if to not in (None, "llama", *EXPORTS):
        raise ConfigError(
            f"--to {to!r}: the only class so far is llama, and decoding parameters go to {', '.join(EXPORTS)}"
        )
    if out.exists():
        raise ConfigError(f"{out} exists already; name one that does not")
    folder = model_folder(model)
    if to in EXPORTS:
        return _export_decoding(folder, out, to)
    grown = load_model(folder)
    if fold_heads:
        grown = _with_folded_heads(grown, folder)
    if to not in (None, grown.config.model_type) and not isinstance(grown, CambiaForCausalLM):
        raise ConfigError(f"{folder} holds a {type(grown).__name__}, a stock class: leave out --to {to}")
    experts = experts_beside(model, grown)
    if experts is not None and isinstance(grown, CambiaForCausalLM):
        raise ConfigError(
            f"{folder} has experts beside a native model, and they would not know an exported one again: "
            f"open them where they are, LoraExperts.from_pretrained({str(folder / EXPERTS_FOLDER)!r})"
        )
    exported = to_llama(grown) if isinstance(grown, CambiaForCausalLM) else grown
    with atomic_folder(out) as temporary:
        exported.save_pretrained(temporary)
        load_tokenizer(folder).save_pretrained(temporary)
        if experts is not None:
            experts.save_pretrained(temporary / EXPERTS_FOLDER)
    beside = f", and {plural(len(experts.names), 'expert')} beside it" if experts is not None else ""
    console().print(f"{out}: {type(exported).__name__}, {exported.num_parameters():,} parameters{beside}")


def _export_decoding(folder: Path, out: Path, to: str) -> None:
    """How a model is decoded from, for another program."""
    from cambia import files
    from cambia.decoding.exporting import exported

    found = exported(_learned_policy(folder), to)
    files.write_json(out, dict(found.values))
    console().print(f"{out}: {', '.join(f'{name} {value}' for name, value in found.values.items())}")
    for line in found.left_out:
        console().print(f"left out: {line}", style="dim", soft_wrap=True)


def _with_folded_heads(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model whose weights hold the scales of heads that were learned for it."""
    from cambia.decoding.mixing import with_heads_folded

    policy = _learned_policy(folder, model)
    if policy.head_weights is None:
        raise ConfigError(f"{folder} has learned no scales of heads: leave out --fold-heads")
    return with_heads_folded(model, policy.head_weights)


def _learned_policy(folder: Path, model: PreTrainedModel | None = None) -> DecodingPolicy:
    """What decoding has learned beside a model."""
    from cambia.decoding.exporting import PARAMS_JSON
    from cambia.decoding.policy import DecodingPolicy

    if not (folder / PARAMS_JSON).is_file():
        raise ConfigError(f"{folder} has no {PARAMS_JSON}: learn how to decode from it, cambia tune-decoding")
    return DecodingPolicy.from_json(folder / PARAMS_JSON, model=model)

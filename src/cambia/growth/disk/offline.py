"""Growth of a checkpoint on the disk, larger than memory if need be.

The plan is the one that a live model gets. Then each tensor of the grown model is made from the old file and
written into the new one, a block of rows at a time, so that memory holds a few blocks whatever the size of
the checkpoint. What comes out is, byte for byte, what `from_pretrained`, `grow` and `save_pretrained` give.

    >>> grown = grow_checkpoint(Path("llama"), WidenFFN(factor=1.5), out=Path("llama-wide"))
    >>> grown.event.parameters_after
    9_630_000_000
"""

from __future__ import annotations

import dataclasses
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cambia.errors import ConfigError, GrowthError, StorageFullError
from cambia.files import atomic_folder, write_text
from cambia.growth.barrier import tolerance
from cambia.growth.check import check_loss, relative_error
from cambia.growth.disk.checkpoint import CheckpointOnDisk, open_checkpoint
from cambia.growth.disk.rows import Rows, grown_blocks, grown_rows
from cambia.growth.disk.shards import INDEX, TensorSpec, index_text, split_into_shards, write_shard
from cambia.growth.operators import Operator
from cambia.growth.plan import GrowthPlan, plan_growth, random_batch
from cambia.records import GrowthEvent

SHARD_BYTES = 5_000_000_000
CHECK_BYTES = 500_000_000
"""`check="auto"` loads the old and the new model where both together are smaller: then nobody minds."""


@dataclass(frozen=True, eq=False)
class CheckpointPlan:
    """What growth will make of a checkpoint."""

    checkpoint: CheckpointOnDisk
    growth: GrowthPlan
    tensors: Mapping[str, TensorSpec]
    """Shape and type of each tensor afterwards."""
    notes: tuple[str, ...]
    """What its user should know before, in sentences."""
    seed: int

    @property
    def bytes_before(self) -> int:
        return self.checkpoint.num_bytes

    @property
    def bytes_after(self) -> int:
        return sum(spec.num_bytes for spec in self.tensors.values())

    @property
    def loads_as(self) -> str:
        """The class that opens the result, and whether it is one of transformers' own."""
        kind = type(self.growth.after)
        stock = kind.__module__.startswith("transformers.")
        return f"{kind.__name__} ({'stock transformers' if stock else 'needs Cambia, or cambia export'})"


@dataclass(frozen=True, eq=False)
class GrownCheckpoint:
    """A checkpoint that was grown on the disk."""

    plan: CheckpointPlan
    event: GrowthEvent
    """Its logit error and losses are None where the models were not compared."""
    out: Path
    resident_before: int
    """Memory of the process before the first tensor was read, in bytes: the program itself."""
    resident_peak: int
    """The most it was until the last tensor was written, in bytes; comparing models comes after that."""


def plan_checkpoint(
    checkpoint: Path, *operators: Operator, seed: int = 0, context: int = 1024
) -> CheckpointPlan:
    """Plan the growth of a model folder; only the headers of its files are read.

    Args:
        checkpoint: a folder with config.json and safetensors.
        operators: applied in order, as one event.
        seed: of new random weights.
        context: tokens per sequence, for the count of operations.

    Raises:
        CheckpointError: the folder cannot be opened as a model.
        GrowthError: the growth is illegal for this model; the message says why and what would do.
    """
    if any(operator.needs_gains for operator in operators):
        raise GrowthError(
            "layers='gradient' measures a model in memory, and offline growth never has one there: name the "
            "layers (layers=[0, 3]), or grow it live with cambia.growth.grow"
        )
    opened = open_checkpoint(Path(checkpoint))
    growth = plan_growth(opened.model, *operators, context=context, seed=seed)
    if growth.fades_in:
        raise GrowthError(
            "fade_in brings new layers in while a model trains, and a checkpoint on disk does not: leave it "
            "out for layers that begin silent, or ask for preserve=False for copies that write at once"
        )
    grown = dict(growth.after.named_parameters())
    tensors = {}
    for name, lineage in growth.lineages.items():
        assert lineage.sibling is not None
        tensors[name] = TensorSpec(tuple(grown[name].shape), opened.tensors[lineage.sibling].dtype)
    return CheckpointPlan(opened, growth, tensors, tuple(_notes(opened, growth)), seed)


def _notes(opened: CheckpointOnDisk, growth: GrowthPlan) -> Iterator[str]:
    """Raises: GrowthError where tokenizer and vocabulary do not fit."""
    before, after = opened.model.config, growth.config
    used = opened.num_tokens
    if used is not None and used > after.vocab_size:
        raise GrowthError(
            f"the tokenizer of {opened.folder} has {used:,} tokens and the vocabulary "
            f"{after.vocab_size:,} rows: add rows for all of them, --op add_tokens --to {-(-used // 64) * 64}"
        )
    if after.vocab_size > before.vocab_size and used is not None:
        free = before.vocab_size - used
        if free > 0:
            yield (
                f"the tokenizer uses {used:,} of {before.vocab_size:,} rows: its next {free:,} new tokens "
                "take those that are there, and only the ones after them take rows that are added now"
            )
        yield "the tokenizer is copied as it is: new rows have no words until it gets some (add_tokens)"
    if opened.others:
        yield (
            f"{len(opened.others)} tensors that are no parameters are left out, such as "
            f"{opened.others[0]!r}: the model makes them itself, or never reads them"
        )
    declared = {field.name for field in dataclasses.fields(after)}
    is_said = "head_dim" in growth.config_changes and "head_dim" not in declared
    if is_said and after.head_dim * after.num_attention_heads != after.hidden_size:
        yield (
            f"{type(after).__name__} does not declare head_dim={after.head_dim}: transformers honors it, "
            "other engines may take hidden_size / num_attention_heads"
        )
    low = any(stored.dtype.itemsize < 4 for stored in opened.tensors.values())
    if growth.contract.rescales and low:
        yield "weights are multiplied and rounded to 16 bits again: equal up to that rounding, not exactly"
    if growth.contract.exactness == "none":
        yield "the model's answers change (preserve=False): the loss will jump"


def grow_checkpoint(
    checkpoint: Path,
    *operators: Operator,
    out: Path,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    check: Literal["auto", "yes", "no"] = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> GrownCheckpoint:
    """Grow a model folder into a new one, holding a few blocks of rows in memory.

    Args:
        checkpoint: a folder with config.json and safetensors, of any size.
        operators: applied in order, as one event.
        out: the folder to write; it must not exist, and is there whole or not at all.
        seed: of new random weights; they depend on it and their name alone, as in `grow`.
        shard_bytes: the largest file of weights.
        check: load the old and then the new model and compare what they say, before `out` appears. auto:
            where both together have less than 500 MB.
        progress: is told bytes written and bytes to write.

    Raises:
        CheckpointError: the folder cannot be opened as a model.
        GrowthError: the growth is illegal for this model, or not exact.
        StorageFullError: there is no room for the result.
    """
    return write_grown(
        plan_checkpoint(checkpoint, *operators, seed=seed),
        out=out,
        shard_bytes=shard_bytes,
        check=check,
        progress=progress,
    )


def write_grown(
    plan: CheckpointPlan,
    *,
    out: Path,
    shard_bytes: int = SHARD_BYTES,
    check: Literal["auto", "yes", "no"] = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> GrownCheckpoint:
    """Carry a plan out; see `grow_checkpoint`."""
    began = time.perf_counter()
    refuse_out(plan, out)
    resident_before, _ = _resident()
    checked = check == "yes" or (check == "auto" and plan.bytes_before + plan.bytes_after < CHECK_BYTES)
    compared: dict[str, float] = {}
    with atomic_folder(out) as temporary:
        _write_weights(plan, temporary, shard_bytes, progress)
        _, resident_peak = _resident()
        _write_config(plan, temporary)
        plan.checkpoint.copy_beside(temporary)
        if checked:
            compared = _compared(plan, temporary)
    event = plan.growth.event("asked for", compared | {"seconds": time.perf_counter() - began})
    return GrownCheckpoint(plan, event, out, resident_before, resident_peak)


def refuse_out(plan: CheckpointPlan, out: Path) -> None:
    """Refuse a folder that is taken, inside the checkpoint, or on a disk without room.

    Raises:
        ConfigError, StorageFullError: as said.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; name a folder that does not (--out)")
    folder = plan.checkpoint.folder.resolve()
    if folder in out.resolve().parents:
        raise ConfigError(f"{out} lies inside the checkpoint {folder}; name a folder beside it (--out)")
    there = next(parent for parent in out.resolve().parents if parent.exists())
    free = shutil.disk_usage(there).free
    # Between operators a large tensor goes through a file, of which two may be there at once.
    largest = max(spec.num_bytes for spec in plan.tensors.values())
    needed = plan.bytes_after + largest * min(2, len(plan.growth.operators) - 1)
    if needed > free:
        raise StorageFullError(
            f"growing takes {needed / 1e9:,.1f} GB of disk and {there} has {free / 1e9:,.1f} GB free: make "
            "room there, or name another disk (--out)"
        )


def _write_config(plan: CheckpointPlan, folder: Path) -> None:
    # What `save_pretrained` of a model adds to its config.
    config = plan.growth.config
    config.architectures = [type(plan.growth.after).__name__]
    if config.dtype is None:
        config.dtype = str(next(iter(plan.tensors.values())).dtype).removeprefix("torch.")
    config.save_pretrained(folder)


# ---- weights -------------------------------------------------------------------------------------


def _write_weights(
    plan: CheckpointPlan, folder: Path, shard_bytes: int, progress: Callable[[int, int], None] | None
) -> None:
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, plan.bytes_after)

    shards = split_into_shards(plan.tensors, shard_bytes)
    for file, names in shards.items():
        specs = {name: plan.tensors[name] for name in names}
        write_shard(folder / file, specs, lambda name: _contents(plan, name, folder), wrote)
    if len(shards) > 1:
        write_text(folder / INDEX, index_text(plan.tensors, shards))


def _contents(plan: CheckpointPlan, name: str, folder: Path) -> Iterator[Tensor | memoryview]:
    """A tensor of the grown model, piece by piece, from the old file."""
    lineage = plan.growth.lineages[name]
    stored = None if lineage.origin is None else plan.checkpoint.tensors[lineage.origin]
    steps = [(m, seed) for m, seed in lineage.steps(plan.seed) if m.source is None or m.axes]
    if stored is not None and not steps:
        yield from stored.pieces()
        return
    rows: Rows | None = stored
    last = len(steps) - 1
    for number, (tensor_map, seed) in enumerate(steps):
        path, before = folder / f".step{number % 2}", folder / f".step{(number + 1) % 2}"
        if number < last:
            rows = grown_rows(tensor_map, rows, seed=seed, path=path)
        else:
            for block in grown_blocks(tensor_map, rows, seed=seed):
                yield block.to(plan.tensors[name].dtype)
        before.unlink(missing_ok=True)


# ---- memory and the check ------------------------------------------------------------------------


def _resident() -> tuple[int, int]:
    """Memory of this process now and the most it was so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, peak = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
        return now, peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kilobytes
    return peak, peak


def _compared(plan: CheckpointPlan, grown: Path) -> dict[str, float]:
    """Load the old model, then the new one, and compare their answers as `grow` does."""
    old = _loaded(plan.checkpoint.folder)
    batch = random_batch(old, plan.seed)
    before = _logits(old, batch)
    promised = tolerance(old.dtype, plan.growth.contract)
    del old
    after = _logits(_loaded(grown), batch)
    error = relative_error(before, after[..., : before.shape[-1]])
    if plan.growth.contract.exactness != "none" and not error <= promised:
        raise GrowthError(
            f"the grown checkpoint's logits differ by {error:.1e} (relative), more than {promised:.0e}; "
            "nothing was written. Ask for preserve=False where a jump is wanted; otherwise this is a bug"
        )
    losses = {"loss_before": check_loss(before, batch), "loss_after": check_loss(after, batch)}
    return {"logit_error": error, **losses}


def _loaded(folder: Path) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True).eval()


@torch.no_grad()
def _logits(model: PreTrainedModel, batch: Tensor) -> Tensor:
    return model(input_ids=batch, use_cache=False).logits.float()  # (B, T, V)

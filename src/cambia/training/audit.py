"""What a run promises when a task ends, so that it can be checked later: `cambia verify`.

A line of promises.jsonl has the SHA-256 of each tensor that the method says will not change any more. And for
each task a probe is kept: a few rows of its text and the logits that the model gave them when it had just
learned it. What nobody promised may move, and the probe tells how far it did.
"""

# B rows of a probe, T its tokens, V vocabulary

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from cambia import files, rundir
from cambia.continual.methods import Method
from cambia.continual.methods.method import AnyStream
from cambia.models.hashing import sha256
from cambia.rundir import RunWriter

_ROWS, _TOKENS = 2, 32


@dataclass(frozen=True, eq=False)
class Probe:
    """Text of one task, and what the model said of it when it had just learned it."""

    task: int
    input_ids: Tensor
    """(B, T), int64."""
    logits: Tensor
    """(B, T, V), as they were."""

    def again(self, model: PreTrainedModel, method: Method) -> Tensor:
        """The logits of now, (B, T, V): of the same rows in the same arrangement."""
        with method.answering(self.task):
            return _logits(model, self.input_ids)


def record_stage(
    run: RunWriter, stage: int, stream: AnyStream, method: Method, model: PreTrainedModel
) -> None:
    """Write down what is promised at the end of a stage, and a probe of each task that it trained."""
    if len(stream.stages) < 2:
        return
    promised = {name: sha256(tensor) for name, tensor in method.promised().items()}
    run.append_json(rundir.PROMISES, {"stage": stage, "task": stream.stages[stage].name, "tensors": promised})
    kept: dict[str, Tensor] = {}
    for task, weight in enumerate(stream.stages[stage].weights):
        batch = next(iter(stream.evaluation(task, "valid", 65_536, _ROWS)), None) if weight > 0 else None
        if batch is not None:
            input_ids = batch.input_ids[:, :_TOKENS].contiguous()
            with method.answering(task):
                kept[f"{task}.logits"] = _logits(model, input_ids)
            kept[f"{task}.input_ids"] = input_ids
    path = run.probe(stage)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file(kept, temporary)
    files.fsync_path(temporary)
    temporary.replace(path)


def read_probes(path: Path) -> list[Probe]:
    """The probes of one stage."""
    kept = load_file(path)
    tasks = sorted(int(name.split(".")[0]) for name in kept if name.endswith(".logits"))
    return [Probe(task, kept[f"{task}.input_ids"].clone(), kept[f"{task}.logits"]) for task in tasks]


@torch.no_grad()
def _logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        return model(input_ids=input_ids.to(model.device), use_cache=False).logits.cpu().contiguous()
    finally:
        model.train(was_training)

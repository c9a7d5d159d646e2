"""What a run promises when a task ends, so that it can be checked later: `cambia verify`.

A line of promises.jsonl has the SHA-256 of each tensor that the method says will not change any more. And for
each task a probe is kept: a few rows of its text and the logits that the model gave them when it had just
learned it. What nobody promised may move, and the probe tells how far it did.

Of a method that routes texts a few passages more are kept, with who answered them and how well: so it can be
told later how many go another way, and what that costs.
"""

# B rows of a probe, T its tokens, V vocabulary, N passages

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cambia import files, rundir
from cambia.continual.methods import Method
from cambia.continual.methods.method import AnyStream
from cambia.models.hashing import sha256
from cambia.nn.modes import evaluating
from cambia.rundir import RunWriter

_ROWS, _TOKENS = 2, 32
_PASSAGES = 16


@dataclass(frozen=True, eq=False)
class Probe:
    """Text of one task, and what the model said of it when it had just learned it."""

    task: int
    input_ids: Tensor
    """(B, T), int64."""
    logits: Tensor
    """(B, T, V), as they were."""
    passages: Tensor | None = None
    """(N, T), int64: more of the text, of which is known who answered it; None where nothing is routed."""
    losses: Tensor | None = None
    """(N,), nats per token that each passage had by its route."""

    def again(self, model: PreTrainedModel, method: Method) -> Tensor:
        """The logits of now, (B, T, V): of the same rows in the same arrangement."""
        with method.answering(self.task):
            return _logits(method.answerer(model), self.input_ids)

    def by(self, part: str | None, model: PreTrainedModel, method: Method) -> Tensor:
        """The logits of now, (B, T, V), as a Part gives them; None: the model alone."""
        with method.answered_by(part):
            return _logits(method.answerer(model), self.input_ids)


def record_stage(
    run: RunWriter, stage: int, stream: AnyStream, method: Method, model: PreTrainedModel
) -> None:
    """Write down what is promised at the end of a stage, and a probe of each task that it trained.

    Where a method routes, an expert may have been sealed after its task was over: then of each task so far.
    """
    if len(stream.stages) < 2 and not method.contract.routes:
        return
    promised = {name: sha256(tensor) for name, tensor in method.promised().items()}
    line: dict[str, Any] = {"stage": stage, "task": stream.stages[stage].name, "tensors": promised}
    kept: dict[str, Tensor] = {}
    answerers: dict[str, str | None] = {}
    routes: dict[str, list[str | None]] = {}
    for task in _probed(stream, stage, method):
        batch = next(iter(stream.evaluation(task, "valid", 65_536, _PASSAGES)), None)
        if batch is None:
            continue
        input_ids = batch.input_ids[:_ROWS, :_TOKENS].clone()  # no memory of the passages'
        with method.answering(task):
            kept[f"{task}.logits"] = _logits(method.answerer(model), input_ids)
        kept[f"{task}.input_ids"] = input_ids
        answerers |= {str(task): part for part in method.answerers_for_good(task)}
        if method.contract.routes:
            kept[f"{task}.passages"] = batch.input_ids.contiguous()
            kept[f"{task}.losses"] = passage_losses(method.answerer(model), batch.input_ids)
            routes[str(task)] = method.routes(batch.input_ids)
    if method.contract.routes:
        line |= {"answerers": answerers, "routes": routes}
    run.append_json(rundir.PROMISES, line)
    path = run.probe(stage)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file(kept, temporary)
    files.fsync_path(temporary)
    temporary.replace(path)


def _probed(stream: AnyStream, stage: int, method: Method) -> list[int]:
    """The tasks of which a probe is kept."""
    first = 0 if method.contract.routes else stage
    stages = stream.stages[first : stage + 1]
    return [task for task in range(len(stream.names)) if any(one.weights[task] > 0 for one in stages)]


def read_probes(path: Path) -> list[Probe]:
    """The probes of one stage."""
    kept = load_file(path)
    tasks = sorted(int(name.split(".")[0]) for name in kept if name.endswith(".logits"))
    return [
        Probe(
            task,
            kept[f"{task}.input_ids"].clone(),
            kept[f"{task}.logits"],
            passages=kept.get(f"{task}.passages"),
            losses=kept.get(f"{task}.losses"),
        )
        for task in tasks
    ]


def passage_losses(answerer: Any, input_ids: Tensor) -> Tensor:
    """(N,) float64: nats per token of passages (N, T), each answered by itself."""
    losses = []
    for row in input_ids.split(1):  # all logits of many passages would be large
        said = _logits(answerer, row)[0, :-1].double()
        losses.append(nn.functional.cross_entropy(said, row[0, 1:]))
    return torch.stack(losses)


@torch.no_grad()
def _logits(answerer: Any, input_ids: Tensor) -> Tensor:
    with evaluating(answerer):
        given = input_ids.to(answerer.device)
        return answerer(input_ids=given, use_cache=False).logits.cpu().contiguous()

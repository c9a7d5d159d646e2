"""Experts in `transformers.Trainer`: the same lifecycle, driven by somebody else's loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from cambia.continual.course import Course
from cambia.continual.methods.experts import Experts
from cambia.data.generated import GeneratedSource
from cambia.errors import ConfigError
from cambia.models import LoraExperts
from cambia.training.callback import ExpertsCallback
from tests.conftest import tiny

LENGTH, ROWS = 33, 16


class Rows(Dataset[Any]):
    """Windows of one kind of text after another."""

    def __init__(self, kinds: list[str], batches: int):
        read = {kind: self.windows(kind) for kind in kinds}
        self.rows = [row for kind in kinds for row in self.taken(read[kind], batches * ROWS)]

    @staticmethod
    def windows(kind: str) -> list[Tensor]:
        text = "".join(d.text for d in GeneratedSource(kind, size_bytes=60_000).documents()).encode()
        return [torch.tensor([*text[i : i + LENGTH]]) for i in range(0, len(text) - LENGTH, LENGTH)]

    @staticmethod
    def taken(windows: list[Tensor], count: int) -> list[Tensor]:
        found = windows[:count]
        del windows[:count]  # a kind that comes again is read on
        return found

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[place], "labels": self.rows[place]}


def settings(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": ROWS,
            "num_train_epochs": 1,
            "learning_rate": 0.02,
            "train_sampling_strategy": "sequential",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            **changes,
        },
    )


def callback() -> ExpertsCallback:
    return ExpertsCallback(
        Experts(course=Course(consolidation_steps=4), background_rows=16, prefix_tokens=16)
    )


def test_a_kind_of_text_each_has_an_expert_and_the_model_stays(tmp_path: Path) -> None:
    model = tiny(vocab_size=256, hidden_size=16, num_hidden_layers=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows, teacher = Rows(["counting", "brackets", "counting"], batches=40), callback()
    trainer = Trainer(
        model,
        settings(tmp_path, save_strategy="steps", save_steps=100),
        train_dataset=rows,
        callbacks=[teacher],
    )
    trainer.train()
    assert teacher.experts.names == teacher.experts.sealed == ["expert_0", "expert_1"]
    assert [event.operators[0]["type"] for event in teacher.events] == ["add_lora_expert"] * 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ids = torch.stack(rows.rows[700:716])  # brackets
    losses = {}
    for name in (None, *teacher.experts.names):
        with teacher.experts.using(name), torch.no_grad():
            losses[name] = float(model(input_ids=ids, labels=ids).loss)
    assert losses["expert_1"] < min(losses[None], losses["expert_0"]) - 0.5
    assert set(teacher.experts.route(ids[:, :16])) == {"expert_1"}
    # A checkpoint amid the third stretch: the first expert lies in it as it is now.
    saved = LoraExperts.from_pretrained(tmp_path / "checkpoint-100/experts", tiny_again(before))
    assert saved["expert_0"].sha256 == teacher.experts["expert_0"].sha256


def tiny_again(weights: dict[str, Tensor]) -> Any:
    model = tiny(vocab_size=256, hidden_size=16, num_hidden_layers=1)
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize(
    ("changes", "repair"),
    [
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"activation_checkpointing": True}, "activation_checkpointing"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    changes: dict[str, Any], repair: str, tmp_path: Path
) -> None:
    model = tiny(vocab_size=256)
    with pytest.raises(ConfigError, match=repair):
        Trainer(model, settings(tmp_path, **changes), callbacks=[callback()])
    assert LoraExperts.of(model) is None

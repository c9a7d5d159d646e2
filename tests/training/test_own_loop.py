"""A model and data of one's own: in our loop, and growth in anybody's."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from transformers import PreTrainedTokenizerFast

from cambia.data.loaders import LoaderStream
from cambia.data.tokenizers import BytesTokenizer, build_tokenizer
from cambia.errors import CheckpointError, ConfigError, DataError
from cambia.growth import AddLayers, GrowthManager, GrowthRule, PlateauTrigger, ScheduleTrigger, WidenFFN
from cambia.probes import TokenSlice
from cambia.rundir import RunReader
from cambia.training import EvaluationConfig, Trainer, TrainingConfig
from tests.conftest import tiny


def rows(count: int = 12, length: int = 9, seed: int = 0) -> Tensor:
    """(count, length) ids in which each follows from the one before."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 31, (count, 1), generator=generator)
    return (start + torch.arange(length)) % 31


@pytest.fixture
def runs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CAMBIA_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.mark.parametrize("family", ["cambia", "llama"])
def test_ones_own_loader_is_trained_on_and_the_model_grows(family: str, runs: Any) -> None:
    loader = DataLoader(rows(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1))
    model = tiny(family)
    growth = GrowthManager([GrowthRule(when=ScheduleTrigger(at_steps=[20]), then=AddLayers(add=1))])
    trainer = Trainer(
        model=model,
        growth=growth,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config=TrainingConfig(steps=60),
        evaluation=EvaluationConfig(every_steps=10),
    )
    assert trainer.train(loader, validation=[rows(4, seed=5)])
    reader = RunReader(runs / "training")
    metrics = reader.rows("metrics.csv")
    assert [row["step"] for row in metrics] == list(range(1, 61))
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert metrics[-1]["validation_loss"] < 0.8 * metrics[9]["validation_loss"]
    assert (metrics[0]["tokens"], metrics[0]["validation_loss"]) == (4 * 8, None)
    (event,) = reader.growth()
    assert event["step"] == 20 and model.config.num_hidden_layers == 3
    assert (runs / "training/latest/model.safetensors").is_file()
    assert "not runnable" in json.loads((runs / "training/config.json").read_text())["description"]
    trainer_again = Trainer(model=model, config=TrainingConfig(steps=1))
    assert trainer_again.train(loader)
    assert (runs / "training-2").is_dir(), "a second run takes another name"


def test_without_a_length_it_is_one_pass(runs: Any) -> None:
    trainer = Trainer(model=tiny())
    trainer.train(DataLoader(rows(), batch_size=4))
    assert trainer.progress.step == 3
    with pytest.raises(ConfigError, match=r"do not say how long a pass is: set steps"):
        Trainer(model=tiny()).train(iter([rows(4)] * 3))
    trainer = Trainer(model=tiny(), config=TrainingConfig(steps=2))
    trainer.train(iter([rows(4)] * 3))
    assert trainer.progress.step == 2


def test_a_loader_of_a_stream_without_a_length_is_trained_on(runs: Any) -> None:
    class Endless(IterableDataset):
        def __iter__(self) -> Any:
            return iter(rows())

    trainer = Trainer(model=tiny(), config=TrainingConfig(steps=2))
    assert trainer.train(DataLoader(Endless(), batch_size=4))
    with pytest.raises(ConfigError, match="set steps"):
        Trainer(model=tiny()).train(DataLoader(Endless(), batch_size=4))
    with pytest.raises(DataError, match="used up the first time"):
        Trainer(model=tiny()).train([rows(4)], validation=iter([rows(4)]))


def test_each_group_of_parameters_keeps_its_own_rate(runs: Any) -> None:
    model = tiny()
    head = [*model.lm_head.parameters()]
    rest = [p for p in model.parameters() if all(p is not one for one in head)]
    optimizer = torch.optim.AdamW([{"params": head, "lr": 1e-4}, {"params": rest, "lr": 1e-2}])
    trainer = Trainer(model=model, optimizer=optimizer, config=TrainingConfig(steps=3))
    assert trainer.train([rows(4)])
    slow, fast = (group["lr"] for group in optimizer.param_groups)
    assert fast == pytest.approx(100 * slow) and 0 < slow < 1e-4


def test_what_is_not_trained_gathers_no_gradient(runs: Any) -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=1e-9)
    Trainer(model=model, optimizer=optimizer, config=TrainingConfig(steps=5)).train([rows(4)])
    norms = [row["grad_norm"] for row in RunReader(runs / "training").rows("metrics.csv")]
    assert norms == pytest.approx([norms[0]] * 5, rel=1e-4)


def test_a_growth_manager_with_a_model_grows_the_trainers_optimizer(runs: Any) -> None:
    model = tiny()
    rules = [GrowthRule(when=ScheduleTrigger(at_steps=[2]), then=WidenFFN(add=4))]
    growth = GrowthManager(rules, model=model)
    trainer = Trainer(model=model, growth=growth, config=TrainingConfig(steps=4))
    assert trainer.train([rows(4)]) and growth.optimizer is trainer.optimizer
    assert growth.context == 8
    with pytest.raises(ConfigError, match="another model or optimizer"):
        Trainer(model=tiny(), growth=GrowthManager(rules, model=model))


def test_looking_ahead_is_refused_where_it_cannot_go_back(runs: Any) -> None:
    evaluation = EvaluationConfig(decayed_at=[0.5])
    trainer = Trainer(model=tiny(), config=TrainingConfig(steps=8), evaluation=evaluation)
    with pytest.raises(ConfigError, match="data loader of one's own cannot"):
        trainer.train([rows(4)])


def test_every_form_of_a_batch_says_the_same() -> None:
    ids = rows(3)
    forms = [ids, (ids,), {"input_ids": ids}, {"input_ids": ids, "labels": ids}, [ids]]
    for form in forms:
        batch = LoaderStream([form]).next_batch(0)
        assert torch.equal(batch.input_ids, ids[:, :-1]) and torch.equal(batch.targets, ids[:, 1:])
    labels = ids.clone()
    labels[:, :4] = -100
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch = LoaderStream([{"input_ids": ids, "labels": labels, "attention_mask": mask}]).next_batch(0)
    assert (batch.targets[:, :3] == -100).all() and (batch.targets[1, 5:] == -100).all()
    assert torch.equal(batch.targets[0, 3:], ids[0, 4:])


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        (torch.zeros(3), r"shape \(3,\)"),
        (torch.zeros(3, 4), r"shape \(3, 4\) as input_ids; expected token ids"),
        ({"text": "a"}, "holds NoneType as input_ids"),
        ({"input_ids": rows(1, 3), "attention_mask": torch.tensor([[0, 1, 1]])}, "padded on the left"),
    ],
)
def test_batches_that_cannot_be_read_are_refused(batch: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        LoaderStream([batch])


def test_a_loader_begins_again_and_goes_on_where_it_was() -> None:
    batches = [rows(2, seed=i) for i in range(3)]
    stream = LoaderStream(batches)
    seen = [stream.next_batch(0).input_ids for _ in range(5)]
    assert torch.equal(seen[3], seen[0])
    again = LoaderStream(batches)
    again.load_state_dict(stream.state_dict())
    assert torch.equal(again.next_batch(0).input_ids, batches[2][:, :-1])
    with pytest.raises(DataError, match="gives no batch"):
        LoaderStream([])
    once = LoaderStream(iter(batches[:1]))
    once.next_batch(0)
    with pytest.raises(DataError, match="a DataLoader or a list instead of a generator"):
        once.next_batch(0)


SHUFFLED = {
    "global": lambda data, own: DataLoader(data, batch_size=3, shuffle=True),
    "own": lambda data, own: DataLoader(data, batch_size=3, shuffle=True, generator=own),
    "sampler": lambda data, own: DataLoader(
        data, batch_sampler=BatchSampler(RandomSampler(data, generator=own), 3, drop_last=False)
    ),
    "workers": lambda data, own: DataLoader(
        data, batch_size=3, shuffle=True, num_workers=1, persistent_workers=True
    ),
}


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 5])
@pytest.mark.parametrize("kind", SHUFFLED)
def test_a_loader_that_shuffles_goes_on_in_the_same_order(kind: str, taken: int) -> None:
    def stream(seed: int) -> LoaderStream:
        torch.manual_seed(seed)
        return LoaderStream(SHUFFLED[kind](rows(9), torch.Generator().manual_seed(seed)))

    first = stream(1)
    for _ in range(taken):
        first.next_batch(0)
    state, drawn = copy.deepcopy(first.state_dict()), torch.get_rng_state()
    expected = [first.next_batch(0).input_ids for _ in range(5)]
    again = stream(2)
    torch.set_rng_state(drawn)  # as a trainer does, which has a random state of its own
    again.load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), drawn), "reading over draws nothing of the trainer's"
    for batch in expected:
        assert torch.equal(again.next_batch(0).input_ids, batch)


def test_the_state_of_another_kind_of_loader_is_refused() -> None:
    shuffled = LoaderStream(SHUFFLED["own"](rows(9), torch.Generator()))
    with pytest.raises(CheckpointError, match=r"has 0 random generators of its own.* had 1: give the same"):
        LoaderStream(DataLoader(rows(9), batch_size=3)).load_state_dict(shuffled.state_dict())


def test_with_a_tokenizer_text_is_counted_in_bytes() -> None:
    hf: PreTrainedTokenizerFast = build_tokenizer(BytesTokenizer()).hf
    ids = torch.tensor([hf.encode("läuft!")])
    batch = LoaderStream([ids], tokenizer=hf).next_batch(0)
    assert batch.num_bytes == len("läuft!".encode()) - 1


def test_a_rule_without_its_measurement_is_refused_before_training(runs: Any) -> None:
    rule = GrowthRule(when=PlateauTrigger(metric="mood"), then=WidenFFN(add=1))
    trainer = Trainer(model=tiny(), growth=GrowthManager([rule]), config=TrainingConfig(steps=2))
    with pytest.raises(ConfigError, match="PlateauTrigger reads 'mood', which nothing measures here"):
        trainer.train([rows(4)])
    with pytest.raises(ConfigError, match="has no model yet"):
        GrowthManager([rule]).step(loss=1.0)


def mood(model: Any, batches: Any) -> float:
    """A probe of one's own."""
    return float(sum(batch.input_ids.numel() for batch in batches))


def test_slices_and_probes_are_measured_logged_and_watched(runs: Any) -> None:
    evaluation = EvaluationConfig(
        every_steps=2,
        slices=[TokenSlice(name="low", tokens=[*range(20)])],
        probes={"mood": "tests.training.test_own_loop:mood"},
    )
    rule = GrowthRule(when=PlateauTrigger(metric="mood", patience=1), then=WidenFFN(add=1), max_events=1)
    trainer = Trainer(
        model=tiny(), growth=GrowthManager([rule]), config=TrainingConfig(steps=6), evaluation=evaluation
    )
    trainer.train([rows(4)], validation=[rows(4, seed=5)])
    metrics = RunReader(runs / "training").rows("metrics.csv")
    assert [row["mood"] for row in metrics] == [None, 32, None, 32, None, 32]
    assert metrics[1]["slice_loss/low"] > 0 and metrics[1]["rest_loss/low"] > 0
    (event,) = RunReader(runs / "training").growth()
    assert event["step"] == 4 and "plateau: mood" in event["reason"]
    # Each of the three readers was given 32 tokens, twice by the model as it was and once as it is.
    before, after = event["flops_per_token_before"], event["flops_per_token_after"]
    summary = RunReader(runs / "training").summary()
    assert summary["flops_scored"] == pytest.approx(3 * 32 * (2 * before + after) / 3)

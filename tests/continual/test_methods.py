"""What each method does: where it must equal naive fine-tuning bit by bit, and where it must not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cambia.continual.methods import Method, Methods, Naive, Situation
from cambia.continual.methods.agem import AGem
from cambia.continual.methods.derpp import DERPlusPlus
from cambia.continual.methods.drift import Drift
from cambia.continual.methods.ewc import EWC
from cambia.continual.methods.freezing import Freeze
from cambia.continual.methods.lora import SharedLora
from cambia.continual.methods.lwf import LwF
from cambia.continual.methods.masks import ElementMasks
from cambia.continual.methods.mixing import Cumulative, Joint
from cambia.continual.methods.olora import OLora
from cambia.continual.methods.osf import OrthogonalSubspace
from cambia.continual.methods.per_task import FullPerTask, LoraPerTask
from cambia.continual.methods.replay import Replay
from cambia.data import BytesTokenizer, GeneratedSource, Stream, Task, build_tokenizer
from cambia.data.prepare import prepare
from cambia.errors import ConfigError
from cambia.experiment.tree import experiment_from
from cambia.models import CambiaConfig, CambiaForCausalLM
from cambia.rundir import RunReader, RunWriter
from cambia.training import CheckpointConfig, EvaluationConfig, Trainer, TrainingConfig
from cambia.training.optim import AdamW
from tests.markdown import blocks

TEXTS = ("counting", "copy", "brackets")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[Task]:
    cache = tmp_path_factory.mktemp("cache")
    tokenizer = build_tokenizer(BytesTokenizer())
    sources = {name: GeneratedSource(task=name, size_bytes=30_000) for name in TEXTS}
    return [Task(name, prepare(source, tokenizer, cache_dir=cache)) for name, source in sources.items()]


def model_of(family: str = "native") -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 264, "hidden_size": 16, "num_hidden_layers": 2}
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=12, n_layer=2, n_head=2, n_positions=64))
    more = {"intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, **more, max_position_embeddings=64))
    return CambiaForCausalLM(CambiaConfig(**sizes, **more, tie_word_embeddings=True))


def trained(
    method: Method | None,
    tasks: list[Task],
    folder: Path,
    *,
    model: PreTrainedModel | None = None,
    steps: int = 6,
    boundaries: bool = True,
    rate: float = 0.01,
    **training: Any,
) -> Trainer:
    """A trainer that has been through the stream."""
    stream = Stream(tasks, batch_size=6, sequence_length=24, seed=0, boundaries=boundaries)
    trainer = Trainer(
        model or model_of(),
        optimizer=AdamW(learning_rate=rate),
        config=TrainingConfig(steps=steps, sequence_length=24, **training),
        evaluation=EvaluationConfig(every_steps=None, max_bytes=600),
        checkpoint=CheckpointConfig(every_steps=None, keep_tasks=False),
        method=method,
    )
    run = RunWriter(folder)
    try:
        trainer.train(stream, run=run)
        run.write_config({}, "")
    finally:
        run.close()
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def equal(one: Trainer, other: Trainer) -> bool:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def naive(tasks, tmp_path_factory) -> Trainer:
    return trained(None, tasks, tmp_path_factory.mktemp("naive") / "run")


# ---- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        Naive(),
        Methods([]),
        EWC(strength=0.0),
        Replay(fraction=0.0),
        LwF(strength=0.0),
        ElementMasks(share=0.0),
        DERPlusPlus(alpha=0.0, beta=0.0, fraction=0.3),
        Methods([EWC(strength=0.0), Replay(fraction=0.0), ElementMasks(share=0.0)]),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_method_of_no_strength_is_naive_bit_by_bit(method, tasks, naive, tmp_path):
    assert equal(trained(method, tasks, tmp_path / "run"), naive)


def test_masks_of_ones_are_naive_bit_by_bit(tasks, naive, tmp_path):
    method = ElementMasks(share=0.0)
    whole = method.attach

    def attach(situation: Situation) -> None:
        whole(situation)
        method.set_masks({n: torch.ones_like(p) for n, p in situation.model.named_parameters()})

    method.attach = attach  # ty: ignore[invalid-assignment]
    assert equal(trained(method, tasks, tmp_path / "run"), naive)


def test_masked_weights_count_as_stored_and_not_as_trained(tasks, tmp_path):
    method = ElementMasks(share=0.5)
    trained(method, tasks, tmp_path / "run")
    counted = method.parameters()
    frozen = sum(int((tensor != 0).sum()) for tensor in method.promised().values())
    assert frozen > counted.stored / 2
    assert counted.trained == counted.stored - frozen


@pytest.mark.parametrize("on_top", [False, True])
def test_derpp_without_logits_is_replay(on_top, tasks, naive, tmp_path):
    settings: dict[str, Any] = {"fraction": 0.3, "capacity": 20, "on_top": on_top}
    replay = trained(Replay(**settings), tasks, tmp_path / "replay")
    assert equal(trained(DERPlusPlus(alpha=0.0, **settings), tasks, tmp_path / "derpp"), replay)
    assert not equal(replay, naive)


LORA: list[Method] = [SharedLora(rank=2), LoraPerTask(rank=2), OLora(rank=2)]
OTHERS: list[Method] = [
    Joint(),
    Cumulative(),
    Replay(fraction=0.3),
    DERPlusPlus(fraction=0.3),
    DERPlusPlus(fraction=0.3, beta=0.5),
    AGem(rows=4),
    EWC(strength=100.0),
    LwF(),
    Freeze(),
    ElementMasks(),
    OrthogonalSubspace(),
    FullPerTask(),
]


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("llama", method) for method in [*LORA, *OTHERS]),
        # Its linear layers are laid out the other way round.
        *(("gpt2", method) for method in [*LORA, Freeze(), OrthogonalSubspace()]),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_method_does_something_on_stock_models(method, family, tasks, tmp_path):
    plain = trained(None, tasks, tmp_path / "naive", model=model_of(family), steps=3)
    trainer = trained(copy.deepcopy(method), tasks, tmp_path / "run", model=model_of(family), steps=3)
    # A-GEM changes nothing where the gradients of old and new rows agree.
    assert isinstance(method, AGem) or not equal(trainer, plain)
    rows = RunReader(tmp_path / "run").rows("eval.csv")
    assert len(rows) == 4 * 3 * 2
    losses = [row["loss"] for row in RunReader(tmp_path / "run").rows("metrics.csv")]
    assert losses[2] < losses[0], "it learns"


@pytest.mark.parametrize(
    "other", [EWC(strength=1e4), AGem(rows=4), LwF(strength=5.0, from_start=True), Replay()]
)
def test_methods_go_together_with_an_adapter(other, tasks, tmp_path):
    """What trains is the adapter, and they work on it."""

    def adapters(*methods: Method) -> dict[str, Tensor]:
        lora = SharedLora(rank=2, whole=False)
        trained(Methods([lora, *methods]), tasks, tmp_path / f"{len(methods)}", model=model_of("llama"))
        rows = RunReader(tmp_path / f"{len(methods)}").rows("metrics.csv")
        penalised = [row["step"] for row in rows if row["penalty"]]
        assert bool(penalised) == any(isinstance(m, EWC | LwF) for m in methods)
        return dict(lora.adapter.state_dict())

    alone, together = adapters(), adapters(copy.deepcopy(other))
    assert not all(torch.equal(alone[name], together[name]) for name in alone)


# ---- replay --------------------------------------------------------------------------------------


def batches_of(method: Method, tasks: list[Task], *, boundaries: bool = True) -> list[Any]:
    """The batches that a method makes of two stages of ten steps."""
    stream = Stream(tasks, batch_size=8, sequence_length=24, seed=0, boundaries=boundaries)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method.attach(Situation(model, optimizer, stream, 0))
    return [method.batch(stream, stage, step / 10) for stage in (0, 1) for step in range(10)]


@pytest.mark.parametrize("on_top", [False, True])
def test_replay_keeps_its_share_exactly(on_top, tasks):
    batches = batches_of(Replay(fraction=0.3, on_top=on_top), tasks)
    assert all(len(batch.input_ids) == 8 for batch in batches[:10])
    total = sum(len(batch.input_ids) for batch in batches[10:])
    assert total == (80 + 24 if on_top else 80)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9])
@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 1.0), (0.1, 0.5), (0.1, 0.0), (0.0, 0.5)])
def test_derpp_shares_its_fraction_between_its_draws(fraction, alpha, beta, tasks):
    method = DERPlusPlus(fraction=fraction, alpha=alpha, beta=beta, capacity=30, logits=4)
    stream = Stream(tasks, batch_size=8, sequence_length=24, seed=0)
    model = model_of()
    method.attach(Situation(model, torch.optim.SGD(model.parameters(), lr=0.1), stream, 0))
    new = []
    for stage in (0, 1):
        for step in range(10):
            batch = method.batch(stream, stage, step / 10)
            assert len(batch.input_ids) == 8
            if method.needs_logits:
                method.penalty(batch, slice(0, 8), model(input_ids=batch.input_ids).logits)
            held = 0 if method._held is None else len(method._held.batch.input_ids)
            read = 0 if method._weighted is None else len(method._weighted.input_ids)
            new.append(8 - held - read)
    assert sum(new[10:]) == pytest.approx(80 * (1 - fraction), abs=1)


def test_replayed_rows_are_rows_of_earlier_tasks(tasks):
    batches = batches_of(Replay(fraction=0.5), tasks)
    seen = {tuple(row) for batch in batches[:10] for row in batch.input_ids.tolist()}
    for batch in batches[10:]:
        rows = [tuple(row) for row in batch.input_ids.tolist()]
        assert all(row in seen for row in rows[4:])
        assert not any(row in seen for row in rows[:4])


def test_without_boundaries_replay_draws_from_everything(tasks):
    batches = batches_of(Replay(fraction=0.25), tasks, boundaries=False)
    assert len(batches[1].input_ids) == 8, "there is something to replay from the second batch on"
    seen = {tuple(row) for row in batches[0].input_ids.tolist()}
    assert all(tuple(row) in seen for row in batches[1].input_ids[6:].tolist())


def test_written_replay_keeps_no_text(tasks, tmp_path):
    method = Replay(text="written", fraction=0.3, capacity=30)
    trainer = trained(method, tasks, tmp_path / "run")
    assert not method.contract.stores_text
    assert method.buffer.tags == {0: 10, 1: 10, 2: 10}
    texts = {
        tuple(row)
        for t in tasks
        for row in t.corpus.splits["train"].tokens[: 24 * 400].reshape(-1, 24).tolist()
    }
    rows = method.buffer.sample(30)
    assert rows is not None
    assert not any(tuple(row) in texts for row in rows.input_ids.tolist())
    assert trainer.progress.flops > trainer.progress.tokens * trainer.flops_per_token


def test_drift_raises_the_share_where_earlier_tasks_are_lost(tasks, tmp_path):
    settings: dict[str, Any] = {"every_steps": 2, "rows": 3, "most": 0.5}
    rising = Replay(fraction=0.1, drift=Drift(target=1e-4, **settings))
    falling = Replay(fraction=0.1, drift=Drift(target=50.0, **settings))
    for name, method in (("rising", rising), ("falling", falling)):
        trained(method, tasks, tmp_path / name, steps=12, rate=0.03)
    assert rising._share == 0.5
    assert falling._share == falling.drift.least  # ty: ignore[unresolved-attribute]


def test_a_budget_that_holds_no_row_is_refused_before_training(tasks, tmp_path):
    with pytest.raises(ConfigError, match="budget_bytes"):
        trained(Replay(capacity=None, budget_bytes=20), tasks, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.csv").exists()


# ---- penalties and gradients ---------------------------------------------------------------------


def test_the_fisher_information_is_unbiased(tasks):
    """Against the exact one of a tiny model: the mean over all labels at their own odds."""
    model = model_of().double()
    stream = Stream(tasks, batch_size=2, sequence_length=4, seed=0)
    method = EWC()
    method.attach(Situation(model, torch.optim.SGD(model.parameters(), lr=0.1), stream, 0))
    batch = stream.next_batch(0)
    logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)  # (8, V)
    name, parameter = "model.norm.weight", model.get_parameter("model.norm.weight")
    exact = torch.zeros_like(parameter)
    for row in logits.log_softmax(-1):
        for odds in row:
            (gradient,) = torch.autograd.grad(odds, parameter, retain_graph=True)
            exact += odds.exp().detach() * gradient.square()
    estimate = torch.stack([method._squared(batch)[name] for _ in range(600)]).mean(0)
    assert torch.allclose(estimate, exact / len(logits), rtol=0.25)


def test_ewc_pulls_by_the_gradient_of_its_penalty(tasks, tmp_path):
    method = EWC(strength=300.0, batches=2)
    trainer = trained(method, tasks, tmp_path / "run", steps=4)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in trainer.model.named_parameters()}
    penalty = sum(
        150.0 * (method._fisher[n] * (p - method._anchor[n] - 0.01).square()).sum()
        for n, p in parameters.items()
    )
    assert isinstance(penalty, Tensor)
    penalty.backward()
    for name, parameter in trainer.model.named_parameters():
        method._anchor[name] = method._anchor[name] + 0.01
        parameter.grad = torch.zeros_like(parameter)
    value = method.gradients(lambda batch: 0.0)
    assert value == pytest.approx(penalty.item(), rel=1e-4)
    for name, parameter in trainer.model.named_parameters():
        assert torch.allclose(parameter.grad, parameters[name].grad, rtol=1e-4, atol=1e-9)


def test_ewc_holds_weights_the_harder_the_stronger(tasks, tmp_path):
    """After two tasks, measured from where the first one ended, in the metric of the springs."""
    moved = []
    for strength in (1e-6, 1e2, 1e6):
        method = EWC(strength=strength)
        ends: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        whole = method.end_stage

        def end_stage(stream: Any, stage: int, method=method, ends=ends, whole=whole) -> None:
            ends.append(
                (dict(method._fisher), {n: p.detach().clone() for n, p in method._parameters().items()})
            )
            whole(stream, stage)

        method.end_stage = end_stage  # ty: ignore[invalid-assignment]
        trained(method, tasks[:2], tmp_path / f"{strength}", steps=10)
        (_, anchor), (fisher, end) = ends
        moved.append(sum(float((fisher[n] * (end[n] - anchor[n]).square()).sum()) for n in fisher))
    assert moved[0] > 2 * moved[1] > 4 * moved[2]


def test_agem_leaves_no_gradient_against_the_memory(tasks):
    stream = Stream(tasks, batch_size=6, sequence_length=24, seed=0)
    model = model_of()
    method = AGem(rows=4)
    method.attach(Situation(model, torch.optim.SGD(model.parameters(), lr=0.1), stream, 0))
    method.batch(stream, 0, 0.0)
    method.batch(stream, 1, 0.0)
    reference = [torch.randn_like(p) for p in model.parameters()]

    def backward(batch: Any) -> float:
        for parameter, gradient in zip(model.parameters(), reference, strict=True):
            parameter.grad = gradient.clone()
        return 0.0

    for against in (True, False):
        before = [(-1 if against else 1) * r + 0.3 * torch.randn_like(r) for r in reference]
        for parameter, gradient in zip(model.parameters(), before, strict=True):
            parameter.grad = gradient.clone()
        method.gradients(backward)
        after = [p.grad for p in model.parameters()]
        along = sum(float((a * r).sum()) for a, r in zip(after, reference, strict=True))  # ty: ignore[unsupported-operator]
        if against:
            assert abs(along) < 1e-2
        else:
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))  # ty: ignore[invalid-argument-type]


def test_lwf_holds_the_answers(tasks, tmp_path):
    def drift(strength: float) -> float:
        model = model_of()
        before = copy.deepcopy(model)
        method = LwF(strength=strength, from_start=True)
        trained(method, tasks[:2], tmp_path / f"{strength}", model=model, steps=8)
        ids = torch.randint(0, 255, (4, 24), generator=torch.Generator().manual_seed(0))
        said, now = (m(input_ids=ids).logits.detach().log_softmax(-1) for m in (before, model))
        return float((said.exp() * (said - now)).sum(-1).mean())

    assert drift(30.0) < 0.5 * drift(0.0)


def test_olora_keeps_away_from_earlier_subspaces(tasks, tmp_path):
    def overlap(strength: float) -> float:
        method = OLora(rank=2, strength=strength)
        seen: list[float] = []
        whole = method.end_stage

        def end_stage(stream: Any, stage: int) -> None:
            layers = [n for n in method.adapter.layers if n in method._past]
            seen.extend(
                float((method.adapter.of(n).A.detach() @ method._past[n].T).square().sum()) for n in layers
            )
            whole(stream, stage)

        method.end_stage = end_stage  # ty: ignore[invalid-assignment]
        trained(method, tasks, tmp_path / f"{strength}", steps=10, rate=0.03)
        return sum(seen)

    assert overlap(50.0) < 0.3 * overlap(0.0)


def test_osf_moves_nothing_within_the_kept_subspaces(tasks, tmp_path):
    method = OrthogonalSubspace(keep=0.5)
    model = model_of().double()
    seen: list[float] = []
    whole = method.end_stage

    def end_stage(stream: Any, stage: int) -> None:
        for name, parameter in method._matrices().items():
            change = parameter.detach() - method._begun[name]
            seen.append(float((method._left[name].T @ change).norm() / change.norm()))
            seen.append(float((change @ method._right[name]).norm() / change.norm()))
        whole(stream, stage)

    method.end_stage = end_stage  # ty: ignore[invalid-assignment]
    trained(method, tasks, tmp_path / "run", model=model)
    assert max(seen) < 1e-10


# ---- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["native", "llama", "gpt2"])
def test_a_saved_model_has_its_adapter_merged(family, tasks, tmp_path):
    from cambia.models.saved import load_model

    trainer = trained(SharedLora(rank=2), tasks, tmp_path / "run", model=model_of(family))
    loaded = load_model(tmp_path / "run" / "latest")
    ids = torch.randint(0, 255, (2, 24), generator=torch.Generator().manual_seed(0))
    trainer.model.eval()
    with torch.no_grad():
        mine, theirs = trainer.model(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_specialists_equal_training_on_each_task_alone(tasks, tmp_path):
    """Whatever came before: the same start, an optimizer that remembers nothing, the same rows."""
    method = FullPerTask()
    trainer = trained(method, tasks, tmp_path / "run")
    stream = Stream(tasks, batch_size=6, sequence_length=24, seed=0)
    model = model_of()
    step = Trainer(model, optimizer=AdamW(learning_rate=0.01), config=trainer.config).step
    for number in range(6):
        rate = 0.01 * trainer.config.schedule.factor(number, 6)
        step.optimizer.param_groups[0]["lr"] = step.optimizer.param_groups[1]["lr"] = rate
        step(stream.next_batch(2))
    with method.answering(2):
        assert all(
            torch.equal(p, q) for p, q in zip(trainer.model.parameters(), model.parameters(), strict=True)
        )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_equals_peft(tasks):
    """The same adapter on the same model, trained by the same steps."""
    peft = pytest.importorskip("peft")
    from cambia.nn.lora import LoraAdapter

    torch.manual_seed(0)
    ours, base = model_of("llama"), model_of("llama")
    ours.requires_grad_(False)
    adapter = LoraAdapter(ours, rank=3, alpha=6.0)
    adapter.reset(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=targets))
    for name in adapter.layers:
        layer = base.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(adapter.of(name).A)  # ty: ignore[not-subscriptable]
    optimizers = [
        torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)
        for module in (adapter, theirs)
    ]
    stream = Stream(tasks, batch_size=4, sequence_length=24, seed=0)
    for _ in range(5):
        batch = stream.next_batch(0)
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss = model(input_ids=batch.input_ids, labels=batch.targets, shift_labels=batch.targets).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(5.58, abs=1e-3)


# ---- bad input -----------------------------------------------------------------------------------


def test_a_method_that_needs_boundaries_is_refused_without(tasks, tmp_path):
    with pytest.raises(
        ConfigError, match=r"ewc must be told .* no boundaries \(naive, joint, replay, derpp, lora, experts\)"
    ):
        trained(EWC(), tasks, tmp_path / "run", boundaries=False)


def test_methods_that_decide_the_same_are_refused():
    with pytest.raises(ConfigError, match="replay and joint both choose the rows"):
        Methods([Replay(), Joint()])
    with pytest.raises(ConfigError, match="lora and full_per_task both set the weights"):
        Methods([SharedLora(), FullPerTask()])


@pytest.mark.parametrize("sealing", [Freeze(), ElementMasks()])
@pytest.mark.parametrize("setting", [SharedLora(), OrthogonalSubspace(), FullPerTask()])
def test_what_holds_weights_and_what_sets_them_are_refused_together(sealing, setting):
    with pytest.raises(ConfigError, match=r"holds weights that .* would set"):
        Methods([sealing, setting])


def test_a_second_stream_and_a_second_adapter_are_refused(tasks, tmp_path):
    model = model_of()
    method = SharedLora(rank=2)
    trainer = trained(method, tasks[:1], tmp_path / "run", model=model)
    with pytest.raises(ConfigError, match="make a new Trainer"):
        trainer.train(Stream(tasks[:1], batch_size=6, sequence_length=24, seed=0))
    with pytest.raises(ConfigError, match=r"merge_\(\)"):
        Trainer(model, method=SharedLora(rank=2))
    ids = torch.randint(0, 255, (2, 24), generator=torch.Generator().manual_seed(0))
    adapted = model(input_ids=ids).logits
    method.adapter.merge_()
    assert torch.allclose(model(input_ids=ids).logits, adapted, atol=1e-5)
    Trainer(model, method=SharedLora(rank=2))


def test_one_task_is_too_few(tasks, tmp_path):
    with pytest.raises(ConfigError, match="ewc works from one task to the next"):
        trained(EWC(), tasks[:1], tmp_path / "run")


def test_an_average_and_rewritten_weights_are_refused(tasks, tmp_path):
    with pytest.raises(ConfigError, match="average_decay"):
        trained(LoraPerTask(), tasks, tmp_path / "run", average_decay=0.9)


def test_an_optimizer_that_knows_nothing_of_the_adapter_is_refused():
    model = model_of()
    with pytest.raises(ConfigError, match="give the optimizer's settings"):
        Trainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), method=SharedLora(rank=2))


def test_freezing_nothing_is_refused(tasks, tmp_path):
    with pytest.raises(ConfigError, match="no parameter's name is like nothing"):
        trained(Freeze(names=["nothing"]), tasks, tmp_path / "run")


# ---- docs/methods.md -----------------------------------------------------------------------------


def test_the_page_shows_what_works(tasks, tmp_path):
    """Its file is an experiment, and its method of one's own trains and resumes like any other."""
    shown = blocks("docs/methods.md")
    (settings,) = [block.text for block in shown if block.language == "yaml"]
    experiment = experiment_from(yaml.safe_load(settings), source="docs/methods.md", flags={})
    assert [type(method) for method in experiment.methods] == [Replay, EWC]
    (own,) = [block.text for block in shown if "class PullBack" in block.text]
    names: dict[str, Any] = {}
    exec(compile(own, "docs/methods.md", "exec"), names)
    pulled = trained(names["PullBack"](share=0.5), tasks, tmp_path / "pulled")
    plain = trained(None, tasks, tmp_path / "plain")
    start = dict(model_of().named_parameters())

    def moved(trainer: Trainer) -> float:
        return sum(float((p - start[n]).detach().square().sum()) for n, p in trainer.model.named_parameters())

    assert moved(pulled) < 0.7 * moved(plain)

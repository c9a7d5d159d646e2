"""Growth of models that `torch.compile` has seen: it compiles anew, seldom, and computes what eager does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch._dynamo.testing import CompileCounterWithBackend

from cambia.errors import GrowthError
from cambia.growth import AddLayers, WidenFFN, grow, plan_growth
from tests.conftest import tiny
from tests.growth.test_callback import growth_of, rule, told, trainer
from tests.laws.examples import loss_of, relative_error

pytestmark = pytest.mark.filterwarnings(
    # torch's own, when inductor is imported for the first time.
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)
GROWTHS = [WidenFFN(add=4), AddLayers(add=1)]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps whether the last Trainer compiled
    yield
    torch.compiler.reset()


def gradients(model: Any, call: Any) -> tuple[float, list[torch.Tensor]]:
    loss = loss_of(call)
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return loss.item(), found


@pytest.mark.parametrize(
    ("family", "how", "backend"),
    [
        pytest.param("cambia", "wrapped", "aot_eager", marks=pytest.mark.slow),
        ("cambia", "in place", "eager"),
        pytest.param("llama", "wrapped", "aot_eager", marks=pytest.mark.slow),
        pytest.param("llama", "in place", "aot_eager", marks=pytest.mark.slow),
        pytest.param("llama", "wrapped", "inductor", marks=pytest.mark.slow),
        pytest.param("cambia", "in place", "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_grows(family: str, how: str, backend: str) -> None:
    """One compilation for each growth, and the loss and gradients of the eager model."""
    counted = CompileCounterWithBackend(backend)
    model, eager = (tiny(family, num_hidden_layers=1).train() for _ in range(2))
    compiled: Any = model
    if how == "wrapped":
        compiled = torch.compile(model, backend=counted)
    else:
        model.compile(backend=counted)
    gradients(model, compiled)
    assert counted.frame_count == 1
    for i, operator in enumerate(GROWTHS):
        event = grow(model, operator)
        grow(eager, operator)
        assert event.logit_error is not None and event.logit_error < 1e-5
        for _ in range(2):
            loss, found = gradients(model, compiled)
            expected_loss, expected = gradients(eager, eager)
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            assert max(map(relative_error, found, expected)) < 1e-5
        assert counted.frame_count == 2 + i, "the check compiles nothing, and a step compiles once"


def test_the_wrapper_is_refused_and_names_what_is_inside() -> None:
    compiled: Any = torch.compile(tiny(), backend="eager")
    for attempt in (grow, plan_growth):
        with pytest.raises(
            GrowthError, match=r"OptimizedModule is no model of transformers.*model\._orig_mod"
        ):
            attempt(compiled, WidenFFN(add=4))
    assert grow(compiled._orig_mod, WidenFFN(add=4)).done


def test_the_trainer_compiles_anew_after_growth(tmp_path: Path) -> None:
    """More growths than there may be recompilations of one function, and nothing falls back to eager."""
    counted = CompileCounterWithBackend("eager")
    rules = [rule(step) for step in (1, 2)]
    with torch._dynamo.config.patch(recompile_limit=2):
        running = trainer(tmp_path, rules, model=small(), torch_compile=True, max_steps=4)
        plugin: Any = running.accelerator.state.dynamo_plugin
        plugin.to_kwargs = lambda: {"backend": counted}
        running.train()
    assert len(growth_of(running).events) == 2
    assert counted.frame_count == 3, "once for the first shape and once for each growth"
    plain = trainer(tmp_path, rules, model=small(), max_steps=4)
    plain.train()
    assert list(told(running).values()) == pytest.approx(list(told(plain).values()), rel=1e-5)


def small() -> Any:
    return tiny("cambia", num_hidden_layers=1)

"""`cambia tune-decoding`: what comes out, how it goes on, who draws with it, and what is refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cambia.decoding import DecodingPolicy
from cambia.errors import ConfigError
from cambia.experiment.tune import reward_of
from cambia.models import LoraExperts
from tests.conftest import checkpoint
from tests.markdown import cambia
from tests.test_cli_learn import here

QUICK = (
    "--decoding.fit.prompts 8 --decoding.fit.prompt_tokens 8 --decoding.fit.new_tokens 8 --tokens 1536 "
    "--grid-points 2 --decoding.fit.search.population 4 --evaluation.max_bytes 400"
)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a tiny model, text, and a run whose decoding has learned."""
    folder = tmp_path_factory.mktemp("tune")
    checkpoint(folder / "base")
    draw = random.Random(3)
    words = ["oak", "elm", "ring", "bark", "leaf", "stands", "grows", "slowly", "by", "the", "river", "and"]
    texts = [" ".join(draw.choices(words, k=9)) for _ in range(150)]
    (folder / "trees.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        here(folder, patch)
        return folder, cambia(f"cambia tune-decoding base --data trees.jsonl --name one {QUICK}")


@pytest.fixture
def place(tuned, monkeypatch: pytest.MonkeyPatch) -> Path:
    here(tuned[0], monkeypatch)
    return tuned[0]


def test_it_ends_with_what_was_learned_beside_others(tuned) -> None:
    folder, said = tuned
    assert said.code == 0, said.err
    for name in ("learned", "T 1", "min-p 0.05", "greedy", "grid of 8", "Optuna (TPE)", "match.n_grams"):
        assert name in said.out, name
    summary = json.loads((folder / "runs/one/summary.json").read_text())
    rows = {row["name"]: row for row in summary["decoding"]["rows"]}
    assert rows["where it began"]["reward"] == rows["T 1"]["reward"], "the same prompts, the same noise"
    assert 0 < rows["learned"]["tokens"] <= 1536 and rows["learned"]["reward"] != rows["T 1"]["reward"]
    assert rows["T 1"]["nats_per_token"] > 4 and rows["greedy"]["nats_per_token"] is None
    updates = [json.loads(line) for line in (folder / "runs/one/decoding.jsonl").read_text().splitlines()]
    assert updates[-1]["tokens"] == rows["learned"]["tokens"] and updates[-1]["drift"]
    page = (folder / "runs/one/report.html").read_text()
    assert "Have the decoding parameters moved?" in page and "Side by side" in page


def test_the_model_stays_and_stock_transformers_draws_with_what_was_learned(tuned) -> None:
    folder, _ = tuned
    latest = folder / "runs/one/latest"
    policy = DecodingPolicy.from_json(latest / "inference_params.json")
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (folder / "base", latest))
    assert all(value.equal(before.state_dict()[name]) for name, value in after.state_dict().items())
    assert after.generation_config.temperature == pytest.approx(policy.parameters.temperature)
    assert after.generation_config.do_sample and after.generation_config.eos_token_id == 256


def test_generate_draws_as_was_learned(place: Path) -> None:
    own = cambia('cambia generate one --prompt "the oak" --max-new-tokens 8')
    given = cambia('cambia generate base --decoding one --prompt "the oak" --max-new-tokens 8')
    plain = cambia('cambia generate one --prompt "the oak" --max-new-tokens 8 --temperature 0.7 --top-p 0.9')
    assert own.code == given.code == plain.code == 0, own.err + given.err + plain.err
    assert own.out == given.out and "drawn with T" in own.out
    assert plain.out == cambia('cambia generate base --prompt "the oak" --max-new-tokens 8').out


def test_what_was_learned_goes_to_other_programs(place: Path) -> None:
    said = cambia("cambia export one vllm.json --to vllm")
    values = json.loads((place / "vllm.json").read_text())
    assert said.code == 0 and values["top_k"] == -1 and values["temperature"] > 0, said.err
    said = cambia("cambia export one openai.json --to openai")
    assert "left out: repetition" in said.out and "temperature" in said.out
    assert "cambia tune-decoding" in cambia("cambia export base none.json --to vllm").err
    assert "no scales of heads" in cambia("cambia export one folded --fold-heads").err

    policy = DecodingPolicy.from_json(place / "runs/one/latest/inference_params.json")
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    scaled = DecodingPolicy.of(model, policy.parameters, heads=True)
    assert scaled.head_weights is not None
    scaled.head_weights[0][0] = 0.5
    shutil.copytree(place / "base", place / "scaled")
    scaled.to_json(place / "scaled/inference_params.json")
    assert cambia("cambia export scaled folded --fold-heads").code == 0
    ids = torch.tensor([[3, 9, 27, 81]])
    with torch.no_grad(), scaled.heard(model):
        wanted = model(ids).logits
    folded = AutoModelForCausalLM.from_pretrained(place / "folded")
    torch.testing.assert_close(folded(ids).logits, wanted)


def test_a_finished_run_is_compared_again(place: Path) -> None:
    said = cambia("cambia tune-decoding --resume one --grid-points 0 --no-optuna")
    assert said.code == 0, said.err
    assert "learned" in said.out and "Optuna" not in said.out and "grid of" not in said.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("base", "text as it should be written"),
        ("base --data nowhere.txt", "nowhere.txt"),
        ("base --data trees.jsonl --reward nice", "known are match"),
        ("base --data trees.jsonl --reward match:3", "takes nothing behind a colon"),
        ("base --data trees.jsonl --reward 'much length:4'", "its weight"),
        ("base --data trees.jsonl --expert e1 --name e", "no experts"),
        (
            "base --data trees.jsonl --decoding.fit.new_tokens 4000 --name f",
            "lower prompt_tokens or new_tokens",
        ),
        (f"base --data trees.jsonl --reward pattern:QQQQ {QUICK} --name g", "nothing can be learned"),
        ("base --data trees.jsonl --by magic", "decoding.fit.by"),
        ("--resume one --by search", "leave out"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(place: Path, words: str, told: str) -> None:
    said = cambia(f"cambia tune-decoding {words}")
    assert said.code == 2 and told in said.err, said.err
    assert "Traceback" not in said.err


def test_rewards_are_named_in_a_word() -> None:
    assert reward_of("match") == {"type": "match"}
    assert reward_of("0.2 length:40") == {"type": "length", "target": 40, "weight": 0.2}
    assert reward_of("function:mine:good") == {"type": "function", "function": "mine:good"}
    assert reward_of("my_module:Mine") == {"type": "my_module:Mine"}
    assert reward_of(r"pattern:\d+") == {"type": "pattern", "pattern": r"\d+"}
    assert reward_of("0.2 pattern:hello  world") == {
        "type": "pattern",
        "pattern": "hello  world",
        "weight": 0.2,
    }
    assert reward_of("style:my notes.txt") == {"type": "style", "corpus": "my notes.txt"}
    assert reward_of("pattern:42") == {"type": "pattern", "pattern": "42"}
    with pytest.raises(ConfigError, match="your own"):
        reward_of("good")
    with pytest.raises(ConfigError, match="is its weight"):
        reward_of("much length:40")


# ---- experts, and two layers that learn ----------------------------------------------------------


def test_an_expert_has_parameters_of_its_own(place: Path) -> None:
    base = place / "with_experts"
    checkpoint(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    experts = LoraExperts(model)
    experts.add("trees")
    with torch.no_grad():
        for parameter in experts["trees"].parameters():
            parameter.add_(0.05)
    experts["trees"].seal()
    experts.save_pretrained(base / "experts")
    words = f"with_experts --data trees.jsonl --expert trees --name own {QUICK} --no-optuna"
    said = cambia(f"cambia tune-decoding {words}")
    assert said.code == 0, said.err
    tuned = AutoModelForCausalLM.from_pretrained(place / "runs/own/latest")
    alone = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(1, 9)[None]
    with experts.using("trees"):
        torch.testing.assert_close(tuned(ids).logits, experts.model(ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(tuned(ids).logits, alone(ids).logits, atol=1e-2), "the expert is in its weights"
    drawn = cambia('cambia generate with_experts --decoding trees=own --prompt "the oak" --max-new-tokens 4')
    assert drawn.code == 0 and "drawn with" in drawn.out, drawn.err
    wrong = cambia("cambia tune-decoding with_experts --data trees.jsonl --expert oaks --name other")
    assert wrong.code == 2 and "its experts are trees" in wrong.err


def test_weights_and_decoding_learn_in_turns(place: Path) -> None:
    draw = random.Random(4)
    pairs = []
    for _ in range(120):
        a, b = draw.randint(1, 60), draw.randint(1, 60)
        pairs.append({"input": f"{a} and {b}?", "output": f"{a + b} it is."})
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    sizes = "--model.hidden_size 16 --model.intermediate_size 24 --model.num_hidden_layers 1"
    little = (
        "--data.tasks.0.source.path pairs.jsonl --training.steps 8 --training.sequence_length 32 "
        "--decoding.engine_update_freq 2 --decoding.fit.new_tokens 8 --decoding.fit.prompt_tokens 16 "
        f"--decoding.fit.prompts 8 {sizes}"
    )
    said = cambia(f"cambia run dual_layer --name both {little} --training.neural_steps_per_batch 2")
    assert said.code == 0, said.err
    updates = (place / "runs/both/decoding.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in updates] == [2, 4, 6, 8]
    state = json.loads((place / "runs/both/latest/state.json").read_text())
    assert state["engine"]["updates"] == 4 and state["optimizer"]
    page = (place / "runs/both/report.html").read_text()
    assert "Is the loss falling?" in page and "Is the reward of decoding rising?" in page
    weights = cambia(f"cambia run dual_layer --name weights {little} --decoding.engine_update_freq 0")
    assert weights.code == 0 and not (place / "runs/weights/decoding.jsonl").exists(), weights.err
    none = cambia(f"cambia run dual_layer {little} --decoding null --training.neural_steps_per_batch 0")
    assert none.code == 2 and "nothing does" in none.err
    rules = "'[{when: {type: schedule, at_steps: [2]}, then: {type: add_layers, add: 1}}]'"
    grown = cambia(f"cambia run dual_layer {little} --decoding.layers true --growth.rules {rules}")
    assert grown.code == 2 and "have the model's shape" in grown.err

"""A policy learns a step at a time, goes on exactly after a restart, and padding changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cambia.data.tokenizers import BytesTokenizer, build_tokenizer
from cambia.decoding import DecodingParameters, DecodingPolicy
from cambia.decoding.fitting import DecodingFit
from cambia.decoding.learners import PolicyLearner, text_of
from cambia.decoding.likelihood import LikelihoodFit, mean_loss
from cambia.decoding.prompts import Prompts
from cambia.decoding.rewards import LengthReward, MatchReward
from cambia.decoding.rollouts import Rollouts, text_features
from cambia.decoding.score_function import ScoreFunction
from cambia.errors import ConfigError
from cambia.models.nested_state import put_in_tensors, take_out_tensors
from tests.decoding.test_fitting import TEXTS, Low, writer  # noqa: F401 (a fixture)

KINDS = {
    "search": DecodingFit(),
    "gradient": DecodingFit(by="gradient"),
    "likelihood": DecodingFit(by="likelihood", likelihood=LikelihoodFit(batch_size=4, look_steps=2)),
}


def learner(kind: str, model, tokenizer, *, frozen: bool = True) -> PolicyLearner:
    prompts = Prompts.of(TEXTS, tokenizer, prompt_tokens=8, new_tokens=12)
    policy = DecodingPolicy.of(model, layers=kind == "likelihood", context=kind == "gradient")
    rollouts = Rollouts(model, tokenizer, prompts, new_tokens=12, policy=policy, is_frozen=frozen)
    fit = KINDS[kind]
    fit.prompts = 8
    return fit.learner(rollouts, MatchReward(mauve_share=0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_learner_that_was_stopped_goes_on_as_if_it_had_not_been(kind, writer) -> None:  # noqa: F811
    whole = learner(kind, *writer)
    for _ in range(3):
        whole.step()
    tensors: dict[str, torch.Tensor] = {}
    kept = json.loads(json.dumps(take_out_tensors(whole.state_dict(), tensors)))  # as a checkpoint does
    wanted = [whole.step() for _ in range(2)]
    again = learner(kind, *writer)
    again.load_state_dict(put_in_tensors(kept, tensors))
    assert [again.step() for _ in range(2)] == wanted
    assert json.dumps(again.chosen.to_dict()) == json.dumps(whole.chosen.to_dict())
    assert wanted[-1].number == 5 and wanted[-1].tokens > 0 and wanted[-1].drift


def test_what_a_model_makes_of_texts_is_not_asked_of_one_that_is_trained(writer) -> None:  # noqa: F811
    model, tokenizer = writer
    prompts = Prompts.of(TEXTS, tokenizer, prompt_tokens=8, new_tokens=12)
    rollouts = Rollouts(model, tokenizer, prompts, new_tokens=12, is_frozen=False)
    with pytest.raises(ConfigError, match="mauve_share: 0"):
        DecodingFit(by="gradient").learner(rollouts, MatchReward()).step()
    DecodingFit(by="gradient", prompts=8).learner(rollouts, LengthReward(9)).step()


def test_what_a_model_makes_of_a_text_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(BytesTokenizer()).hf
    sizes = {
        "vocab_size": 264,
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 32,
        "eos_token_id": None,
    }
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()  # learned positions: a shift would show
    with torch.no_grad():
        together = text_features(model, tokenizer, ["a long text", "short", ""])
        alone = torch.cat([text_features(model, tokenizer, [text]) for text in ["a long text", "short", ""]])
    torch.testing.assert_close(together, alone)


def test_padding_of_prompts_changes_nothing(writer) -> None:  # noqa: F811
    model, tokenizer = writer
    rows = [list(tokenizer(text)["input_ids"]) for text in TEXTS[:4]]
    ragged = Prompts(
        [row[: 5 + i] for i, row in enumerate(rows)], [row[9 : 18 + i] for i, row in enumerate(rows)]
    )
    policy = DecodingPolicy(DecodingParameters(repetition_penalty=1.2, presence_penalty=0.3))
    rollouts = Rollouts(model, tokenizer, ragged, new_tokens=12)
    together = text_of(rollouts)
    alone = [text_of(rollouts, [i]) for i in range(4)]
    sums = [mean_loss(policy, model, text) * int(text.counted.sum()) for text in alone]
    assert mean_loss(policy, model, together) * int(together.counted.sum()) == pytest.approx(
        sum(sums), rel=1e-5
    )

    one = ScoreFunction(texts=2).learner(policy, model)
    ids, mask = ragged.batch(range(4))
    written = one.write(ids, 6, mask)
    whole = one._whole(mask, written)
    logs = one._written_again(written, ids.shape[1], whole)[0]
    for i in range(4):
        mine = written[2 * i : 2 * i + 2, ids.shape[1] - len(ragged.rows[i]) :]
        single = one._written_again(mine, len(ragged.rows[i]))[0]
        torch.testing.assert_close(logs[2 * i : 2 * i + 2], single, rtol=1e-4, atol=1e-4)


def test_low_is_learned_behind_prompts_of_any_length(writer) -> None:  # noqa: F811
    model, tokenizer = writer
    rows = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
    ragged = Prompts([row[: 4 + i % 5] for i, row in enumerate(rows)], [row[9:21] for row in rows])
    fit = DecodingFit(by="gradient", tokens=6000, prompts=16, new_tokens=12)
    fitted = fit.run(DecodingPolicy(), model, tokenizer, ragged, Low())
    assert fitted.policy.parameters.temperature < 0.95


def test_prompts_of_prepared_text(tmp_path) -> None:
    from cambia.data.prepare import prepare
    from cambia.data.sources import Splits
    from cambia.data.textfiles import FilesSource

    tokenizer = build_tokenizer(BytesTokenizer())
    lines = [f'{{"instruction": "square {n}", "input": "", "output": "it is {n * n}"}}' for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    fields = {"instruction_field": "instruction", "input_field": "input", "output_field": "output"}
    source = FilesSource(str(tmp_path / "rows.jsonl"), **fields)
    corpus = prepare(source, tokenizer, cache_dir=tmp_path / "cache", splits=Splits())
    prompts = Prompts.of_documents(corpus.splits["train"], prompt_tokens=200, new_tokens=20)
    assert len(prompts) == corpus.splits["train"].num_documents
    texts = {tokenizer.hf.decode(list(row), skip_special_tokens=True) for row in prompts.human}
    assert texts <= {f"it is {n * n}" for n in range(60)}
    assert all(row[-1] == tokenizer.eos_id for row in prompts.human)
    assert "square" in tokenizer.hf.decode(list(prompts.rows[0]))
    few = Prompts.of_documents(corpus.splits["train"], prompt_tokens=6, new_tokens=3, most=10)
    assert len(few) == 10 and {len(row) for row in few.rows} == {6}

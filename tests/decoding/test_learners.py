"""A policy learns a step at a time, goes on exactly after a restart, and padding changes nothing."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from cambia.data import TokenFile
from cambia.data.tokenizers import BytesTokenizer, build_tokenizer
from cambia.decoding import DecodingParameters, DecodingPolicy
from cambia.decoding.context_head import ContextHead
from cambia.decoding.fitting import DecodingFit
from cambia.decoding.learned import LearnedParameters
from cambia.decoding.learners import GradientLearner, PolicyLearner, text_of
from cambia.decoding.likelihood import LikelihoodFit, mean_loss, past_of
from cambia.decoding.odds import warped
from cambia.decoding.prompts import Prompts, parted
from cambia.decoding.rewards import LengthReward, MatchReward, Samples, Score
from cambia.decoding.rollouts import Rollouts, text_features
from cambia.decoding.score_function import LEARNED, ScoreFunction, soft_odds
from cambia.decoding.searching import CmaSearch, GridSearch, TpeSearch
from cambia.decoding.settings import DecodingConfig
from cambia.errors import ConfigError, MissingExtraError, RewardError
from cambia.models.nested_state import put_in_tensors, take_out_tensors
from cambia.training.engine import Engine
from cambia.training.settings import Progress
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


def test_features_are_those_of_a_model_that_does_not_drop_out() -> None:
    sizes = {"vocab_size": 264, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=None)).train()
    tokenizer = build_tokenizer(BytesTokenizer()).hf
    once, again = (text_features(model, tokenizer, ["a text"]) for _ in range(2))
    assert torch.equal(once, again) and model.training


class Breaks(LengthReward):
    """Not a number from the third round on."""

    def measure(self, samples: Samples) -> Score:
        found = super().measure(samples)
        self.asked = getattr(self, "asked", 0) + 1
        return found if self.asked <= 8 else Score(float("nan"), found.parts, found.each)


def test_a_reward_that_breaks_leaves_what_was_learned(writer) -> None:  # noqa: F811
    fit = DecodingFit(search=CmaSearch(population=4), prompts=8, prompt_tokens=8, new_tokens=12)
    with pytest.raises(RewardError, match="finite number") as stopped:
        fit.run(DecodingPolicy(), *writer, TEXTS, Breaks(40))
    kept = stopped.value.policy
    assert isinstance(kept, DecodingPolicy) and kept.parameters != DecodingParameters()


def test_a_grid_visits_every_point_whatever_its_tokens(writer) -> None:  # noqa: F811
    fit = DecodingFit(
        search=GridSearch(points=2), parameters=("temperature", "top_p"), prompts=8, prompt_tokens=8,
        new_tokens=12, tokens=10,
    )  # fmt: skip
    fit.search.population = 3
    assert fit.steps == 2
    assert len(fit.run(DecodingPolicy(), *writer, TEXTS, Low()).tried) == 4
    rollouts = Rollouts(*writer, Prompts.of(TEXTS, writer[1], prompt_tokens=8, new_tokens=12), new_tokens=12)
    one = fit.learner(rollouts, Low())
    engine, progress = Engine(one, 1), Progress(step=1)
    counted = [engine.step(progress, Mock(), Mock()) for _ in range(3)]
    assert counted[0] > 0 and counted[2] == 0 and one.finished


def test_without_the_package_gradients_learn_instead(writer, monkeypatch) -> None:  # noqa: F811
    rollouts = Rollouts(*writer, Prompts.of(TEXTS, writer[1], prompt_tokens=8, new_tokens=12), new_tokens=12)
    evolution = DecodingFit(search=CmaSearch())
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.warns(UserWarning, match="pip install"):
        one = evolution.learner(rollouts, Low())
    assert isinstance(one, GradientLearner)
    state = one.state_dict()
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="learned by a GradientLearner"):
        evolution.learner(rollouts, Low()).load_state_dict(state)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match="optuna"):
        DecodingFit(search=TpeSearch()).learner(rollouts, Low())


def test_a_part_that_cannot_be_learned_that_way_is_refused(writer) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="by likelihood"):
        DecodingConfig(layers=True).policy(writer[0])
    with pytest.raises(ConfigError, match="by gradient"):
        DecodingConfig(context=True, fit=DecodingFit(by="likelihood")).policy(writer[0])
    fit = DecodingFit(by="gradient", parameters=("frequency_penalty",), prompts=8)
    rollouts = Rollouts(*writer, Prompts.of(TEXTS, writer[1], prompt_tokens=8, new_tokens=12), new_tokens=12)
    assert set(fit.learner(rollouts, Low()).step().drift) == {"frequency_penalty"}


@given(
    documents=st.lists(st.integers(0, 6), min_size=4, max_size=60), share=st.sampled_from([0.25, 0.5, 0.75])
)
def test_parts_have_no_document_in_common_and_about_their_share(documents: list[int], share: float) -> None:
    first, second = parted(documents, share)
    assert sorted([*first, *second]) == list(range(len(documents)))
    assert len(first) >= int(share * len(documents) / 2)
    assert len(second) >= int((1 - share) * len(documents) / 2)
    if max(documents.count(number) for number in documents) <= len(documents) / 8:
        assert not {documents[i] for i in first} & {documents[i] for i in second}


def test_prompts_know_their_documents() -> None:
    file = TokenFile(np.arange(62, dtype=np.uint16), np.array([0, 41]), np.array([40, 20]))
    prompts = Prompts.of_documents(file, prompt_tokens=4, new_tokens=6)
    assert list(prompts.documents) == [0, 0, 0, 0, 1, 1]
    both = Prompts.joined([prompts, prompts])
    assert list(both.documents) == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]
    assert both.take([5, 11]).documents == [1, 3]


def test_everything_stands_where_the_odds_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another device, which has no numbers: two of them in one sum would be refused."""
    # Which tokens were seen, it cannot say either.
    monkeypatch.setattr("torch.fx.experimental._config.meta_nonzero_assume_all_nonzero", True)
    lines = LearnedParameters(DecodingParameters(top_p=0.9), LEARNED)
    head = ContextHead(8)
    logits, states = torch.empty(2, 5, 23, device="meta"), torch.empty(2, 5, 8, device="meta")
    ids, mask = (torch.ones(2, 9, dtype=torch.long, device="meta") for _ in range(2))
    given = lines.row_parameters(logits.device)
    temperature, top_p = head(states, given.temperature, given.top_p)
    past = past_of(ids, 23, 4, mask)
    for odds in (
        soft_odds(logits, replace(given, temperature=temperature, top_p=top_p), past),
        soft_odds(logits, given, past),
        warped(logits, replace(given, top_p=1.0), past),
    ):
        assert odds.is_meta and odds.requires_grad and odds.shape == logits.shape


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_learners_learn_on_a_device(kind: str, writer) -> None:  # noqa: F811
    model, tokenizer = writer
    update = learner(kind, copy.deepcopy(model).cuda(), tokenizer).step()
    assert update.number == 1 and update.tokens > 0


def test_padding_of_prompts_changes_nothing(writer) -> None:  # noqa: F811
    model, tokenizer = writer
    rows = [list(tokenizer(text)["input_ids"]) for text in TEXTS[:4]]
    ragged = Prompts(
        [row[: 5 + i] for i, row in enumerate(rows)],
        [row[9 : 18 + i] for i, row in enumerate(rows)],
        range(len(rows)),
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
    counts = torch.ones(8, 6)
    logs = one._written_again(written, ids.shape[1], counts, whole)[0]
    for i in range(4):
        mine = written[2 * i : 2 * i + 2, ids.shape[1] - len(ragged.rows[i]) :]
        single = one._written_again(mine, len(ragged.rows[i]), counts[:2])[0]
        torch.testing.assert_close(logs[2 * i : 2 * i + 2], single, rtol=1e-4, atol=1e-4)


def test_low_is_learned_behind_prompts_of_any_length(writer) -> None:  # noqa: F811
    model, tokenizer = writer
    rows = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
    ragged = Prompts(
        [row[: 4 + i % 5] for i, row in enumerate(rows)], [row[9:21] for row in rows], range(len(rows))
    )
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

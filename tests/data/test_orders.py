"""How tasks are laid out: each kind of stream, on text that is made here."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cambia.config import FieldError, Member, build, dump
from cambia.data import (
    SOURCES,
    STREAMS,
    CountingOrder,
    FieldFilter,
    FilesSource,
    GeneratedSource,
    GradualOrder,
    HfTokenizer,
    MixturesOrder,
    PermutedVocabularyOrder,
    PreparedCorpus,
    SequenceOrder,
    SkillsOrder,
    StationaryOrder,
    Stream,
    Task,
    TaskText,
    TokenFile,
    build_tokenizer,
    special_ids,
)
from cambia.data.prepare import prepare
from cambia.errors import ConfigError, DataError
from tests.markdown import blocks

SETTINGS = {"batch_size": 7, "sequence_length": 16, "seed": 3}


def made(*names):
    """Tasks with a little text each, for orders that do not look at it."""
    file = TokenFile(np.zeros(200, dtype=np.uint16), np.array([1]), np.array([198]))
    return [Task(name, PreparedCorpus(Path(name), {"train": file}, {})) for name in names]


def laid_out(order, *names, seed=0):
    """Names of the tasks, and of the stages."""
    tasks, stages = order.lay_out(made(*names), seed)
    assert all(len(stage.weights) == len(tasks) for stage in stages)
    return [task.name for task in tasks], [stage.name for stage in stages]


def texts(*names):
    return [TaskText(name, GeneratedSource("copy", seed=number)) for number, name in enumerate(names)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def opened(cache, byte_tokenizer):
    """The tasks and stages of an order, text and all."""

    def open_all(order, given, seed=3):
        special = special_ids(byte_tokenizer)
        tasks = [
            Task(text.name, prepare(text.source, byte_tokenizer, cache_dir=cache), special_ids=special)
            for text in order.expand(given)
        ]
        return order.lay_out(tasks, seed)

    return open_all


def skill_rows(path, count=240, ask="ask", say="say"):
    skills = ("sums", "c++", "poems")
    rows = [
        {"skill": skills[n % 3], ask: f"question {n} of {skills[n % 3]}", say: f"answer {n * n}"}
        for n in range(count)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def skills_order(path, **more):
    return SkillsOrder(path=str(path), instruction_field="ask", output_field="say", **more)


# ---- sequence ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (SequenceOrder(), "a b c"),
        (SequenceOrder(rounds=3), "a b c a b c a b c"),
        (SequenceOrder(block=2), "a a b b c c"),
        (SequenceOrder(rounds=2, block=2), "a a b b c c a a b b c c"),
        (SequenceOrder(order=["a", "b", "a", "c", "b"]), "a b a c b"),
        (SequenceOrder(order=["b", "a"], rounds=2, block=2), "b b a a b b a a"),
    ],
)
def test_a_sequence_is_as_it_was_asked_for(order, expected):
    assert laid_out(order, "a", "b", "c") == (["a", "b", "c"], expected.split())


def test_one_task_is_a_sequence():
    assert laid_out(SequenceOrder(), "a") == (["a"], ["a"])


@given(count=st.integers(1, 6), first=st.integers(0, 40))
def test_over_as_many_seeds_as_tasks_each_stands_once_at_each_place(count, first):
    names = "abcdef"[:count]
    found = [laid_out(SequenceOrder(order_by_seed=True), *names, seed=first + n) for n in range(count)]
    assert all(tasks == stages for tasks, stages in found)
    assert all(sorted(place) == list(names) for place in zip(*(stages for _, stages in found), strict=True))


def test_sequences_that_make_no_sense_are_refused_before_any_text_is_read():
    with pytest.raises(ConfigError, match="no task 'pyhton'; did you mean 'python'"):
        SequenceOrder(order=["english", "pyhton"]).expand(texts("english", "python"))
    with pytest.raises(ConfigError, match="its own name"):
        SequenceOrder().expand(texts("a", "a"))
    with pytest.raises(ConfigError, match="'\\+' in its name"):
        SequenceOrder().expand(texts("a+b"))
    with pytest.raises(ConfigError, match="order_by_seed: `order` names the sequence already"):
        SequenceOrder(order=["a"], order_by_seed=True)


# ---- mixtures, gradual, stationary ---------------------------------------------------------------


@given(count=st.integers(2, 7), domains=st.integers(1, 7), stages=st.integers(1, 25), seed=st.integers(0, 99))
def test_mixtures_draw_every_task_equally_often_up_to_one(count, domains, stages, seed):
    order = MixturesOrder(domains=domains, stages=stages)
    names = "abcdefg"[:count]
    if domains > count:
        with pytest.raises(ConfigError, match=f"mixes {domains} tasks, there are {count}"):
            order.expand(texts(*names))
        return
    tasks, found = order.lay_out(made(*names), seed)
    assert len(found) == stages and [task.name for task in tasks] == list(names)
    drawn: Counter[str] = Counter()
    for stage in found:
        mixed = stage.name.split("+")
        assert mixed == sorted(mixed) and len(set(mixed)) == domains
        assert all(
            weight == (1 / domains if name in mixed else 0)
            for name, weight in zip(names, stage.weights, strict=True)
        )
        drawn.update(mixed)
        times = [drawn[name] for name in names]
        assert max(times) - min(times) <= 1


def test_a_seed_decides_what_is_mixed():
    order = MixturesOrder(stages=20)
    assert laid_out(order, *"abcde", seed=1) == laid_out(order, *"abcde", seed=1)
    assert laid_out(order, *"abcde", seed=1) != laid_out(order, *"abcde", seed=2)


@pytest.mark.parametrize("overlap", [0.25, 0.5, 1.0])
def test_gradual_stages_pass_over_to_the_next_in_their_last_share(overlap):
    order = GradualOrder(overlap=overlap)
    tasks, stages = order.lay_out(made("a", "b", "c"), 0)
    assert not order.boundaries and [stage.name for stage in stages] == ["a", "b", "c"]
    for here, after in itertools.pairwise(stages):
        assert here.weights_at(0) == here.weights_at(1 - overlap) == here.weights
        middle = here.weights_at(1 - overlap / 2)
        assert middle == pytest.approx(tuple(np.add(here.weights, after.weights) / 2))
        assert here.weights_at(1) == after.weights_at(0)
    assert stages[-1].until is None
    one = Stream(tasks, stages, **SETTINGS, boundaries=order.boundaries)
    assert not one.boundaries


def test_a_stationary_stream_is_one_text_over_and_over():
    tasks, stages = StationaryOrder(stages=5).lay_out(made("a"), 0)
    assert [stage.name for stage in stages] == ["a"] * 5 and tasks[0].shuffle
    assert not StationaryOrder().boundaries
    with pytest.raises(ConfigError, match="stationary is made of one text"):
        StationaryOrder().expand(texts("a", "b"))


def test_a_contiguous_stream_keeps_the_order_of_the_text_across_stages(opened):
    tasks, stages = opened(StationaryOrder(order="contiguous"), texts("copy"))
    one = Stream(tasks, stages, **SETTINGS)
    rows = torch.cat([one.next_batch(stage).input_ids for stage in range(4) for _ in range(3)])
    text = tasks[0].file("train").tokens.astype(np.int64)
    begin = next(n for n in range(16) if (text[n : n + 16] == rows[0].numpy()).all())
    assert rows.flatten().tolist() == text[begin : begin + rows.numel()].tolist()


@pytest.mark.parametrize("order", [MixturesOrder(domains=1), GradualOrder()])
def test_too_few_tasks_are_refused(order):
    with pytest.raises(ConfigError, match="2 tasks or more, there are 1: name more"):
        order.expand(texts("a"))
    with pytest.raises(ConfigError, match="2 tasks or more"):
        order.lay_out(made("a"), 0)


# ---- permuted vocabulary -------------------------------------------------------------------------


def permutations(tasks):
    return [task.permutation for task in tasks]


@pytest.mark.parametrize("mode", ["unique", "repeat", "drift"])
def test_permutations_are_bijections_that_leave_special_ids_alone(opened, byte_tokenizer, mode):
    order = PermutedVocabularyOrder(tasks=5, mode=mode, period=2)
    tasks, stages = opened(order, texts("copy"))
    assert [stage.name for stage in stages] == [task.name for task in tasks]
    for permutation in permutations(tasks):
        assert sorted(permutation.tolist()) == list(range(257))
        assert permutation[256] == 256 == byte_tokenizer.eos_id
    again, _ = opened(order, texts("copy"))
    assert np.array_equal(permutations(again), permutations(tasks))
    other, _ = opened(order, texts("copy"), seed=4)
    assert not np.array_equal(permutations(other), permutations(tasks))


def test_each_unique_permutation_is_another(opened):
    tasks, _ = opened(PermutedVocabularyOrder(tasks=5), texts("copy"))
    assert [task.name for task in tasks] == ["perm0", "perm1", "perm2", "perm3", "perm4"]
    for one, other in itertools.combinations(permutations(tasks), 2):
        assert (one != other).mean() > 0.9


def test_repeated_permutations_come_back_with_text_of_their_own(opened):
    tasks, _ = opened(PermutedVocabularyOrder(tasks=6, mode="repeat", period=2), texts("copy"))
    assert [task.name for task in tasks] == ["perm0", "perm1", "perm0.2", "perm1.2", "perm0.3", "perm1.3"]
    for number, task in enumerate(tasks):
        assert np.array_equal(task.permutation, tasks[number % 2].permutation)
    assert not np.array_equal(tasks[0].permutation, tasks[1].permutation)
    assert not np.array_equal(tasks[0].file("train").tokens[:200], tasks[2].file("train").tokens[:200])


@pytest.mark.parametrize("swaps", [0, 1, 20])
def test_drift_moves_few_ids_at_a_time(opened, swaps):
    tasks, _ = opened(PermutedVocabularyOrder(tasks=4, mode="drift", swaps=swaps), texts("copy"))
    assert np.array_equal(tasks[0].permutation, np.arange(257))
    for one, other in itertools.pairwise(permutations(tasks)):
        assert (0 < (one != other).sum() <= 2 * swaps) or swaps == 0


def documents(file):
    ends = np.append(file.starts[1:], file.num_tokens) - 1
    ids = file.ids(np.arange(file.num_tokens))
    return [tuple(ids[start:end].tolist()) for start, end in zip(file.starts, ends, strict=True)]


def undone(task, split):
    """A split's documents with the permutation taken back."""
    inverse = np.argsort(task.permutation)
    return [tuple(inverse[list(document)].tolist()) for document in documents(task.file(split))]


def test_chunks_share_no_document_and_no_validation_text_is_trained_on(opened):
    tasks, _ = opened(PermutedVocabularyOrder(tasks=4), texts("copy"))
    corpus = tasks[0].corpus
    shares = [undone(task, "train") for task in tasks]
    whole, _ = opened(SequenceOrder(), texts("copy"))
    assert list(itertools.chain(*shares)) == documents(whole[0].file("train"))
    for one, other in itertools.combinations(shares, 2):
        assert not set(one) & set(other)
    for task in tasks:
        held_out = {*undone(task, "valid"), *undone(task, "test")}
        assert held_out == {*documents(corpus.splits["valid"]), *documents(corpus.splits["test"])}
        assert not held_out & set(itertools.chain(*shares))
        assert task.file("valid").num_bytes == corpus.splits["valid"].num_bytes


def test_without_chunks_each_task_trains_on_all_of_the_text(opened):
    tasks, _ = opened(PermutedVocabularyOrder(tasks=3, chunks=False), texts("copy"))
    assert undone(tasks[0], "train") == undone(tasks[2], "train")


def test_nothing_is_copied_out_of_the_memory_map(opened):
    tasks, _ = opened(PermutedVocabularyOrder(tasks=3), texts("copy"))
    for task in tasks:
        tokens = task.file("train").tokens
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16


def test_corpora_that_cannot_be_permuted_are_refused(opened, byte_tokenizer, cache):
    order = PermutedVocabularyOrder(tasks=2)
    with pytest.raises(
        ConfigError, match=r"permuted_vocabulary is made of one text, and data\.tasks names 2"
    ):
        order.expand(texts("a", "b"))
    with pytest.raises(ConfigError, match=r"which ids are special.*special_ids=special_ids\(tokenizer\)"):
        order.lay_out([Task("a", prepare(texts("a")[0].source, byte_tokenizer, cache_dir=cache))], 0)
    with pytest.raises(ConfigError, match="training documents for 100000 tasks: give more text"):
        opened(PermutedVocabularyOrder(tasks=100_000), texts("copy"))


def test_special_ids_are_those_that_mean_no_text(byte_tokenizer, tmp_path):
    assert special_ids(byte_tokenizer) == (256,)
    hf = build_tokenizer_copy(byte_tokenizer, tmp_path)
    hf.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|user|>"]})
    hf.add_tokens(["growing"])  # a word, and no special one
    hf.save_pretrained(tmp_path / "more")
    tokenizer = build_tokenizer(HfTokenizer(path=str(tmp_path / "more")))
    assert special_ids(tokenizer) == (256, 257, 258)


def build_tokenizer_copy(tokenizer, folder):
    tokenizer.save(folder / "same")
    return build_tokenizer(HfTokenizer(path=str(folder / "same"))).hf


# ---- orders that bring their own tasks -----------------------------------------------------------


def test_each_skill_of_a_file_is_a_task(tmp_path, opened, byte_tokenizer):
    tasks, stages = opened(skills_order(skill_rows(tmp_path / "skills.jsonl")), [])
    names = [task.name for task in tasks]
    assert names == ["sums", "cpp", "poems"] == [stage.name for stage in stages]
    for task, skill in zip(tasks, ("sums", "c++", "poems"), strict=True):
        read = [
            byte_tokenizer.decode(list(document))
            for split in ("train", "valid", "test")
            for document in documents(task.file(split))
        ]
        assert len(read) == 80 and all(f"of {skill}\nanswer" in text for text in read)
        file = task.file("train")
        trained = file.ids(np.flatnonzero(file.mask))
        assert "question" not in byte_tokenizer.decode(trained)
        assert byte_tokenizer.decode(trained).count("answer ") == file.num_documents


def test_rows_without_a_skill_are_counted_and_named(tmp_path):
    path = skill_rows(tmp_path / "skills.jsonl", 9)
    with path.open("a") as file:
        for row in ({"ask": "a", "say": "b"}, {"ask": "a", "say": "b", "skill": " "}, {"skill": ["x"]}, []):
            file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"4 of 13 rows have no skill.*the first is .*skills.jsonl line 10"):
        skills_order(path).expand([])
    with pytest.raises(DataError, match=r"13 of 13 rows.*skill_field"):
        skills_order(path, skill_field="Skill").expand([])


def test_skills_that_are_no_tasks_are_refused(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"skill": "sums", "ask": "a", "say": "b"}\n')
    with pytest.raises(
        DataError, match=r"the field 'skill' names 1 skills in 1 rows \(sums\); expected at least 2"
    ):
        skills_order(path).expand([])
    with pytest.raises(ConfigError, match=r"data\.tasks names 'a' beside them"):
        skills_order(path).expand(texts("a"))
    with pytest.raises(FieldError, match="path: missing"):
        SkillsOrder()
    (tmp_path / "prose.txt").write_text("no rows")
    with pytest.raises(DataError, match=r"prose.txt has no rows with fields; expected .jsonl"):
        skills_order(tmp_path / "prose.txt").expand([])
    both = tmp_path / "both.jsonl"
    both.write_text("".join(f'{{"skill": "{skill}", "ask": "a", "say": "b"}}\n' for skill in ("c+", "cp")))
    with pytest.raises(ConfigError, match="its own name"):
        skills_order(both).expand([])


def test_counting_has_one_task_for_each_step(opened):
    order = CountingOrder(skills=[2, -1], size_bytes=30_000)
    tasks, stages = opened(order, [])
    assert [task.name for task in tasks] == ["up_2", "down_1"] == [stage.name for stage in stages]
    for task, step in zip(tasks, (2, -1), strict=True):
        text = bytes(documents(task.file("valid"))[0]).decode()
        first, second = text.splitlines()[0].split()[:2]
        assert int(second) - int(first) == step
    for wrong in ([1], [1, 0], [1, 1], []):
        with pytest.raises(FieldError, match="skills: expected two steps or more"):
            CountingOrder(skills=wrong)
    with pytest.raises(ConfigError, match="makes its own tasks"):
        CountingOrder().expand(texts("a"))


def test_a_task_without_text_is_refused(tmp_path, byte_tokenizer):
    path = skill_rows(tmp_path / "skills.jsonl")
    nobody = FilesSource(
        str(path), instruction_field="ask", output_field="say", filters=[FieldFilter("skill", "juggling")]
    )
    with pytest.raises(DataError, match="no text to train on"):
        prepare(nobody, byte_tokenizer, cache_dir=tmp_path / "cache")


# ---- every kind ----------------------------------------------------------------------------------


def examples(tmp_path):
    """One order of each kind and the tasks it is given."""
    skills = skill_rows(tmp_path / "skills.jsonl")
    return {
        "sequence": (SequenceOrder(order=["b", "a", "b", "c"], block=2), texts("a", "b", "c")),
        "mixtures": (MixturesOrder(domains=2, stages=6), texts("a", "b", "c")),
        "gradual": (GradualOrder(overlap=0.7), texts("a", "b", "c")),
        "stationary": (StationaryOrder(order="contiguous"), texts("a")),
        "permuted_vocabulary": (
            PermutedVocabularyOrder(tasks=4, mode="repeat", period=3),
            texts("a"),
        ),
        "skills": (skills_order(skills), []),
        "counting": (CountingOrder(size_bytes=30_000), []),
    }


@pytest.mark.parametrize("kind", STREAMS)
def test_going_on_gives_the_batches_that_would_have_come(kind, tmp_path, opened):
    order, given = examples(tmp_path)[kind]

    def fresh():
        return Stream(*opened(order, given), **SETTINGS, boundaries=order.boundaries)

    whole = fresh()
    plan = [(stage, step / 7) for stage in range(len(whole.stages)) for step in range(7)]
    expected = [whole.next_batch(stage, at=at) for stage, at in plan]
    assert len({batch.input_ids.numpy().tobytes() for batch in expected}) > len(plan) / 2
    for stop in (0, 5, 12, len(plan) - 1):
        first, second = fresh(), fresh()
        for stage, at in plan[:stop]:
            first.next_batch(stage, at=at)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for (stage, at), batch in zip(plan[stop:], expected[stop:], strict=True):
            resumed = second.next_batch(stage, at=at)
            assert torch.equal(resumed.input_ids, batch.input_ids)
            assert torch.equal(resumed.targets, batch.targets)
            assert (resumed.num_bytes, resumed.source) == (batch.num_bytes, batch.source)


@pytest.mark.parametrize("kind", STREAMS)
def test_settings_come_back_from_yaml(kind, tmp_path):
    order, _ = examples(tmp_path)[kind]
    member = Member(STREAMS, "stream", default="sequence")
    tree = yaml.safe_load(yaml.safe_dump(member.dump(order)))
    assert tree["type"] == kind and member.parse(tree) == order
    assert member.parse({"boundaries": True, **dump(SequenceOrder())}) == SequenceOrder()


@pytest.mark.parametrize(
    ("order", "setting", "value"),
    [
        (SequenceOrder, "rounds", 0),
        (SequenceOrder, "block", -1),
        (MixturesOrder, "domains", 0),
        (MixturesOrder, "stages", 0),
        (GradualOrder, "overlap", 0),
        (GradualOrder, "overlap", 1.1),
        (StationaryOrder, "stages", 0),
        (StationaryOrder, "order", "sorted"),
        (PermutedVocabularyOrder, "tasks", 1),
        (PermutedVocabularyOrder, "mode", "random"),
        (PermutedVocabularyOrder, "period", 0),
        (PermutedVocabularyOrder, "swaps", -1),
        (CountingOrder, "difficulty", 4),
        (CountingOrder, "skills", [1, 0]),
    ],
)
def test_settings_out_of_range_are_refused_at_their_place(order, setting, value):
    with pytest.raises(FieldError) as refused:
        build(order, {setting: value})
    assert refused.value.path == (setting,)


# ---- docs/streams.md -----------------------------------------------------------------------------


def test_the_page_shows_every_kind_and_each_of_its_blocks_gives_batches(tmp_path, monkeypatch, opened):
    page = [yaml.safe_load(block.text) for block in blocks("docs/streams.md") if block.language == "yaml"]
    assert {tree["data"]["stream"]["type"] for tree in page} == {*STREAMS}
    skill_rows(tmp_path / "skills.jsonl", ask="instruction", say="output")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAMBIA_DATA", raising=False)
    for tree in page:
        assert {*tree} == {"data", "training"} and {*tree["data"]} <= {"tasks", "stream"}
        order = Member(STREAMS, "stream").parse(tree["data"]["stream"])
        given = []
        for task in tree["data"].get("tasks", []):
            source = Member(SOURCES, "source").parse(task["source"])
            given.append(TaskText(task["name"], dataclasses.replace(source, limit_bytes=600_000)))
        one = Stream(*opened(order, given), **SETTINGS, boundaries=order.boundaries)
        assert one.next_batch(len(one.stages) - 1).input_ids.shape == (7, 16)


def test_the_order_of_ones_own_on_the_page_goes_there_and_back():
    (block,) = [block for block in blocks("docs/streams.md") if block.language == "python"]
    names: dict[str, object] = {"__name__": "my_module"}
    exec(compile(block.text, "docs/streams.md", "exec"), names)
    order = names["ThereAndBack"]()
    assert laid_out(order, "a", "b") == (["a", "b"], ["a", "b", "b", "a"])

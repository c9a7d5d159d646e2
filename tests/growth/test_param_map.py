"""Parameter maps: where every entry of a grown tensor comes from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cambia.nn.param_map import NEW, AxisMap, Fill, ParamMap, TensorMap, lineages


@st.composite
def axis_maps(draw: st.DrawFn, size: int) -> AxisMap:
    """Any order, repetition and scale of old positions, with new ones in between."""
    index = draw(st.lists(st.integers(NEW, size - 1), min_size=1, max_size=7))
    scale = draw(
        st.none() | st.lists(st.sampled_from([0.25, 1.0, 2.0]), min_size=len(index), max_size=len(index))
    )
    return AxisMap(torch.tensor(index), None if scale is None else torch.tensor(scale, dtype=torch.float64))


@given(data=st.data(), power=st.sampled_from([-2, -1, 0, 1]))
def test_carrying_is_what_an_entry_by_entry_reading_says(data: st.DataObject, power: int) -> None:
    old = torch.arange(1.0, 13.0).view(3, 4)
    axes = {dim: data.draw(axis_maps(old.shape[dim])) for dim in data.draw(st.sets(st.integers(0, 1)))}
    tensor_map = TensorMap("w", axes)
    carried = tensor_map.carry(old, power=power, new=-7.0)
    both = [axes.get(dim) or AxisMap(torch.arange(old.shape[dim])) for dim in (0, 1)]
    assert carried.shape == tuple(len(axis.index) for axis in both)
    for i, row in enumerate(both[0].index.tolist()):
        for j, column in enumerate(both[1].index.tolist()):
            factors = [1.0 if a.scale is None else a.scale[k].item() for a, k in ((both[0], i), (both[1], j))]
            expected = -7.0 if NEW in (row, column) else old[row, column] * (factors[0] * factors[1]) ** power
            assert carried[i, j] == expected


@given(data=st.data())
def test_several_steps_are_carried_one_after_the_other(data: st.DataObject) -> None:
    old = torch.arange(1.0, 5.0)
    steps, sizes = [], [4]
    for _ in range(3):
        axis = data.draw(axis_maps(sizes[-1]))
        sizes.append(len(axis.index))
        steps.append(ParamMap({"w": TensorMap("w", {0: axis})}))
    lineage = lineages(steps, ["w"])["w"]
    expected, is_new = old, torch.zeros(4, dtype=torch.bool)
    for step in steps:
        expected = step.tensors["w"].carry(expected, power=1)
        is_new = step.tensors["w"].carry(is_new.float(), power=0, new=1.0).bool()
    assert lineage.inherits and not lineage.is_same
    assert torch.equal(lineage.carry(old, power=1)[~is_new], expected[~is_new])
    assert torch.equal(lineage.new_mask(old), is_new)


def test_values_keep_the_old_and_draw_the_new() -> None:
    old = torch.randn(3, 5)
    tensor_map = TensorMap("w", {0: AxisMap.lengthened(3, 6)}, fill=Fill.normal(0.5))
    values = tensor_map.values(old, seed=1)
    assert torch.equal(values[:3], old)
    assert torch.equal(values, tensor_map.values(old, seed=1))
    assert not torch.equal(values[3:], tensor_map.values(old, seed=2)[3:])
    assert torch.equal(
        TensorMap("w", {0: AxisMap.lengthened(3, 6)}, fill=Fill.ones()).values(old, seed=1)[3:],
        torch.ones(3, 5),
    )
    assert not TensorMap("w", {0: AxisMap.lengthened(3, 6)}).values(old, seed=1)[3:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_values_keep_their_dtype_and_never_share_memory(dtype: torch.dtype) -> None:
    old = torch.randn(3, 5).to(dtype)
    for tensor_map in (
        TensorMap("w", {1: AxisMap.lengthened(5, 8)}, fill=Fill.normal(1.0)),
        TensorMap("w", inherits=False),
    ):
        values = tensor_map.values(old, seed=0)
        assert values.dtype == dtype
        assert torch.equal(values[:, :5], old)
        values.zero_()
        assert old.any()


@given(scale=st.floats(0.01, 100))
def test_normal_values_are_as_large_as_the_old_ones(scale: float) -> None:
    old = torch.randn(64, 64) * scale
    drawn = Fill.normal(0.3).draw((256, 64), like=old, seed=0)
    assert drawn.pow(2).mean().sqrt().item() == pytest.approx(old.pow(2).mean().sqrt().item(), rel=0.05)


@pytest.mark.parametrize("like", [None, torch.zeros(4, 4), torch.empty(0, 4)], ids=["none", "zeros", "empty"])
def test_where_the_old_values_say_nothing_the_given_size_is_used(like: torch.Tensor | None) -> None:
    drawn = Fill.normal(0.3).draw((256, 64), like=like, seed=0)
    assert drawn.std().item() == pytest.approx(0.3, rel=0.05)


def test_a_new_tensor_has_no_origin_and_is_new_throughout() -> None:
    steps = [
        ParamMap({"old": TensorMap("old")}),
        ParamMap({"old": TensorMap("old"), "born": TensorMap(None, shape=(2, 3), sibling="old")}),
        ParamMap(
            {
                "old": TensorMap("old"),
                "born": TensorMap("born", {0: AxisMap.lengthened(2, 4)}, fill=Fill.ones()),
                "copy": TensorMap("born", inherits=False, sibling="born"),
            }
        ),
    ]
    found = lineages(steps, ["old", "born", "copy"])
    assert found["old"].is_same and found["old"].inherits and found["old"].sibling == "old"
    assert found["born"].origin is None and not found["born"].inherits
    assert torch.equal(found["born"].values(None, seed=0), torch.cat([torch.zeros(2, 3), torch.ones(2, 3)]))
    assert found["born"].new_mask(torch.empty(4, 3)).all()
    assert found["copy"].new_mask(torch.empty(2, 3)).all()


def test_a_sibling_is_called_by_its_name_before_all_steps() -> None:
    """The second step interposes: what it calls "b" is what was called "a" at first."""
    steps = [
        ParamMap({"a": TensorMap(None, shape=(1,), sibling="a"), "b": TensorMap("a")}),
        ParamMap(
            {
                "a": TensorMap("a"),
                "b": TensorMap("b"),
                "c": TensorMap(None, shape=(1,), sibling="b"),
                "d": TensorMap(None, shape=(1,), sibling="a"),
            }
        ),
    ]
    found = lineages(steps, ["a", "b", "c", "d"])
    assert {name: lineage.sibling for name, lineage in found.items()} == {
        "a": "a",
        "b": "a",
        "c": "a",
        "d": "a",
    }
    assert {name: lineage.origin for name, lineage in found.items()} == {
        "a": None,
        "b": "a",
        "c": None,
        "d": None,
    }


def test_random_values_differ_by_name() -> None:
    fill = Fill.normal(1.0)
    steps = [ParamMap({name: TensorMap(None, fill=fill, shape=(8,)) for name in ("one", "two")})]
    one, two = (lineage.values(None, seed=0) for lineage in lineages(steps, ["one", "two"]).values())
    assert not torch.equal(one, two)

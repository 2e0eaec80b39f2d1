"""The arithmetic all dense growth rests on: what a grown axis holds, what expansion keeps of weights and moments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growkit.growth.expand import expand, expand_moments
from growkit.growth.state import Moments
from growkit.models.axes import NAMES, NEW, AnyAxis, Axis, Concat, Product, index_map

Placements = dict[str, list[int]]
GrownShapes = tuple[tuple[AnyAxis, ...], tuple[AnyAxis, ...], Placements]
# Sums of at most a few thousand float64 terms, each with a handful of roundings.
TOLERANCE = 1e-12


@st.composite
def factors(draw: st.DrawFn, most: int = 5) -> tuple[Axis, Axis, list[int]]:
    """A named axis before and after growth, and what it holds: the old indices in any order, some of them cloned."""
    name = draw(st.sampled_from(NAMES))
    old = draw(st.integers(1, most))
    new = old + draw(st.integers(0, 3))
    more = draw(st.lists(st.integers(NEW, old - 1), min_size=new - old, max_size=new - old))
    held = draw(st.permutations([*range(old), *more])) if new != old else list(range(old))
    return Axis(name, old), Axis(name, new), list(held)


@st.composite
def grown_axes(draw: st.DrawFn) -> tuple[AnyAxis, AnyAxis, Placements | None]:
    """(old, new, placement) of every structure: an Axis, a Product, or a Concat of those.

    A name that occurs twice grows alike, as heads do in q and in o.
    """
    pool = {old.name: (old, new, places) for old, new, places in draw(st.lists(factors(), min_size=1, max_size=4))}

    def pick() -> tuple[Axis, Axis]:
        old, new, _ = pool[draw(st.sampled_from(sorted(pool)))]
        return old, new

    def part() -> tuple[Axis | Product, Axis | Product]:
        if draw(st.booleans()):
            return pick()
        pairs = [pick() for _ in range(draw(st.integers(1, 3)))]
        return Product(tuple(old for old, _ in pairs)), Product(tuple(new for _, new in pairs))

    placed = draw(st.sets(st.sampled_from(sorted(pool))))
    placement = {name: pool[name][2] for name in placed} or None
    if draw(st.booleans()):
        return (*part(), placement)
    parts = [part() for _ in range(draw(st.integers(1, 3)))]
    return Concat(tuple(old for old, _ in parts)), Concat(tuple(new for _, new in parts)), placement


def held(axis_old: Axis, axis_new: Axis, placement: Placements | None, index: int) -> int:
    if placement and axis_old.name in placement and axis_old.size != axis_new.size:
        return placement[axis_old.name][index]
    return index if index < axis_old.size else NEW


def expected(old: AnyAxis, new: AnyAxis, placement: Placements | None) -> list[int]:
    """The map by coordinates: take an index apart, look each coordinate up, put it together in the smaller shape."""
    if isinstance(old, Axis) and isinstance(new, Axis):
        return [held(old, new, placement, i) for i in range(new.size)]
    if isinstance(old, Product) and isinstance(new, Product):
        shape = tuple(axis.size for axis in old.axes)
        numbers = torch.arange(math.prod(shape)).view(shape)
        result = []
        for coordinates in itertools.product(*(range(axis.size) for axis in new.axes)):
            found = tuple(held(a, b, placement, i) for a, b, i in zip(old.axes, new.axes, coordinates))
            result.append(NEW if NEW in found else int(numbers[found]))
        return result
    assert isinstance(old, Concat) and isinstance(new, Concat)
    result, start = [], 0
    for a, b in zip(old.parts, new.parts):
        result += [NEW if i == NEW else start + i for i in expected(a, b, placement)]
        start += a.size
    return result


@given(grown_axes())
def test_index_map(axes: tuple[AnyAxis, AnyAxis, Placements | None]) -> None:
    old, new, placement = axes
    indices = index_map(old, new, placement)
    assert len(indices) == new.size
    assert set(indices) - {NEW} == set(range(old.size)), "an index is lost"
    assert indices == expected(old, new, placement)
    if placement is None:
        assert [i for i in indices if i != NEW] == list(range(old.size)), "once each, in order"
        if old == new:
            assert indices == list(range(old.size))


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_growing_twice_is_growing_once(sizes: list[int]) -> None:
    axes = [Product((Axis("heads", n), Axis("head_dim", n + 1))) for n in sorted(sizes)]
    chained = list(range(axes[0].size))
    for before, after in itertools.pairwise(axes):
        chained = [NEW if i == NEW else chained[i] for i in index_map(before, after)]
    assert chained == index_map(axes[0], axes[-1])


def test_by_hand() -> None:
    heads = Product((Axis("heads", 2), Axis("head_dim", 2)))
    wider = Product((Axis("heads", 3), Axis("head_dim", 4)))
    assert index_map(heads, wider) == [0, 1, -1, -1, 2, 3, -1, -1, -1, -1, -1, -1]
    assert index_map(heads, wider, {"heads": [1, -1, 0]}) == [2, 3, -1, -1, -1, -1, -1, -1, 0, 1, -1, -1]
    assert index_map(heads, wider, {"heads": [1, 0, 1]}) == [2, 3, -1, -1, 0, 1, -1, -1, 2, 3, -1, -1]
    parts = Product((Axis("parts", 2), Axis("embed", 3)))
    assert index_map(Axis("embed", 2), parts) == [0, 1, -1, -1, -1, -1]  # which had one part
    gate_up = Concat((Axis("mlp", 2), Axis("mlp", 2)))
    assert index_map(gate_up, Concat((Axis("mlp", 3), Axis("mlp", 3)))) == [0, 1, -1, 2, 3, -1]
    assert (heads.size, gate_up.size, Concat((heads, Axis("mlp", 3))).size) == (4, 4, 7)
    assert Concat((heads, Axis("mlp", 3))).names == {"heads", "head_dim", "mlp"}


@pytest.mark.parametrize(
    ("old", "new", "placement"),
    [
        (Axis("mlp", 3), Axis("mlp", 2), None),  # smaller
        (Axis("mlp", 2), Axis("embed", 3), None),  # another axis
        (Axis("mlp", 2), Axis("mlp", 4), {"mlp": [0, 1, 2, -1]}),  # one that was not there
        (Axis("mlp", 2), Axis("mlp", 4), {"mlp": [0, 1, -1]}),  # one place is left out
        (Axis("mlp", 2), Axis("mlp", 4), {"mlp": [1, 1, -1, -1]}),  # an old one is lost
        (Axis("mlp", 2), Axis("mlp", 4), {"mlp": [0, 1, -2, -1]}),  # before the start
        (Axis("mlp", 2), Concat((Axis("mlp", 2),)), None),  # another structure
        (Axis("mlp", 2), Product((Axis("parts", 2), Axis("embed", 2))), None),  # which has not the axis
    ],
)
def test_what_makes_no_sense_is_refused(old: AnyAxis, new: AnyAxis, placement: Placements | None) -> None:
    with pytest.raises(AssertionError):
        index_map(old, new, placement)


def _name(factor: tuple[Axis, Axis, list[int]]) -> str:
    return factor[0].name


@st.composite
def grown_shapes(draw: st.DrawFn) -> GrownShapes:
    """One to three dimensions of different names, some of them products with a ``state`` axis."""
    names = st.lists(factors(most=4).filter(lambda f: f[0].name != "state"), min_size=1, max_size=3, unique_by=_name)
    dims = draw(names)
    inner = [(Axis("state", 2), Axis("state", 2 + draw(st.integers(0, 1)))) for _ in dims]
    products = [draw(st.booleans()) for _ in dims]
    old = tuple(Product((a, x)) if p else a for (a, _, _), (x, _), p in zip(dims, inner, products))
    new = tuple(Product((b, y)) if p else b for (_, b, _), (_, y), p in zip(dims, inner, products))
    return old, new, {a.name: places for a, _, places in dims}


def sizes(axes: tuple[AnyAxis, ...]) -> tuple[int, ...]:
    return tuple(axis.size for axis in axes)


def laid_out(
    tensor: torch.Tensor, old: tuple[AnyAxis, ...], new: tuple[AnyAxis, ...], placement: Placements
) -> torch.Tensor:
    """Entry by entry; NaN where nothing old is held."""
    maps = [expected(a, b, placement) for a, b in zip(old, new)]
    result = torch.full(sizes(new), torch.nan, dtype=tensor.dtype)
    for place in itertools.product(*(range(len(m)) for m in maps)):
        found = tuple(m[i] for m, i in zip(maps, place))
        if NEW not in found:
            result[place] = tensor[found]
    return result


@given(grown_shapes(), st.integers(0, 99))
def test_expand_keeps_the_old_bits_and_touches_nothing_else(shape: GrownShapes, seed: int) -> None:
    old_axes, new_axes, placement = shape
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(sizes(old_axes), generator=generator)
    into = torch.full(sizes(new_axes), torch.nan)
    result = expand(old, old_axes, into, new_axes, placement)
    assert torch.equal(result.nan_to_num(9.0), laid_out(old, old_axes, new_axes, placement).nan_to_num(9.0))


@given(grown_shapes(), st.integers(0, 99), st.sampled_from([1.0, 0.5, 2.0, 0.3]))
def test_expand_moments(shape: GrownShapes, seed: int, gradient: float) -> None:
    """exp_avg goes with the gradient and exp_avg_sq with its square; new entries have no direction yet and the old
    ones' mean size; the step is carried; the input stays as it was."""
    old_axes, new_axes, placement = shape
    generator = torch.Generator().manual_seed(seed)
    exp_avg = torch.randn(sizes(old_axes), generator=generator, dtype=torch.float64)
    exp_avg_sq = torch.rand(sizes(old_axes), generator=generator, dtype=torch.float64) + 0.1
    old = Moments(exp_avg, exp_avg_sq, 123.0)
    copies = exp_avg.clone(), exp_avg_sq.clone()
    now = expand_moments(old, old_axes, new_axes, gradient=gradient, placement=placement)
    assert now.step == old.step
    first, second = (laid_out(t, old_axes, new_axes, placement) for t in (exp_avg, exp_avg_sq))
    is_new = first.isnan()
    torch.testing.assert_close(now.exp_avg[~is_new], gradient * first[~is_new], rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(now.exp_avg_sq[~is_new], gradient**2 * second[~is_new], rtol=TOLERANCE, atol=0)
    assert not now.exp_avg[is_new].any()
    if is_new.any():
        fresh = now.exp_avg_sq[is_new]
        assert (fresh == fresh[0]).all()
        assert math.isclose(float(fresh[0]), float(now.exp_avg_sq[~is_new].mean()), rel_tol=TOLERANCE)
    assert torch.equal(old.exp_avg, copies[0]) and torch.equal(old.exp_avg_sq, copies[1])

"""The arithmetic all dense growth rests on: where old indices go, and what expansion keeps of weights and moments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growkit.growth.expand import expand, expand_moments
from growkit.growth.state import Moments
from growkit.models.axes import NAMES, AnyAxis, Axis, Concat, Product, index_map

Placements = dict[str, list[int]]
GrownShapes = tuple[tuple[AnyAxis, ...], tuple[AnyAxis, ...], Placements]
# Sums of at most a few thousand float64 terms, each with a handful of roundings.
TOLERANCE = 1e-12


@st.composite
def factors(draw: st.DrawFn, most: int = 5) -> tuple[Axis, Axis, list[int]]:
    """A named axis before and after growth, and where its indices go: anywhere, in any order."""
    name = draw(st.sampled_from(NAMES))
    old = draw(st.integers(1, most))
    new = old + draw(st.integers(0, 3))
    places = draw(st.permutations(range(new)))[:old] if new != old else list(range(old))
    return Axis(name, old), Axis(name, new), list(places)


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


def position(axis_old: Axis, axis_new: Axis, placement: Placements | None, index: int) -> int:
    if placement and axis_old.name in placement and axis_old.size != axis_new.size:
        return placement[axis_old.name][index]
    return index


def expected(old: AnyAxis, new: AnyAxis, placement: Placements | None) -> list[int]:
    """The map by coordinates: take an index apart, move each coordinate, put it together in the larger shape."""
    if isinstance(old, Axis) and isinstance(new, Axis):
        return [position(old, new, placement, i) for i in range(old.size)]
    if isinstance(old, Product) and isinstance(new, Product):
        shape = tuple(axis.size for axis in new.axes)
        numbers = torch.arange(math.prod(shape)).view(shape)
        result = []
        for coordinates in itertools.product(*(range(axis.size) for axis in old.axes)):
            moved = tuple(position(a, b, placement, i) for a, b, i in zip(old.axes, new.axes, coordinates))
            result.append(int(numbers[moved]))
        return result
    assert isinstance(old, Concat) and isinstance(new, Concat)
    result, start = [], 0
    for a, b in zip(old.parts, new.parts):
        result += [start + i for i in expected(a, b, placement)]
        start += b.size
    return result


@given(grown_axes())
def test_index_map(axes: tuple[AnyAxis, AnyAxis, Placements | None]) -> None:
    old, new, placement = axes
    indices = index_map(old, new, placement)
    assert len(indices) == old.size
    assert len(set(indices)) == len(indices), "two indices in one place"
    assert min(indices) >= 0 and max(indices) < new.size
    assert indices == expected(old, new, placement)
    if placement is None:
        assert indices == sorted(indices), "order is kept"
        if old == new:
            assert indices == list(range(old.size))


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_growing_twice_is_growing_once(sizes: list[int]) -> None:
    axes = [Product((Axis("heads", n), Axis("head_dim", n + 1))) for n in sorted(sizes)]
    chained = list(range(axes[0].size))
    for before, after in itertools.pairwise(axes):
        step = index_map(before, after)
        chained = [step[i] for i in chained]
    assert chained == index_map(axes[0], axes[-1])


def test_by_hand() -> None:
    heads = Product((Axis("heads", 2), Axis("head_dim", 2)))
    wider = Product((Axis("heads", 3), Axis("head_dim", 4)))
    assert index_map(heads, wider) == [0, 1, 4, 5]
    assert index_map(heads, wider, {"heads": [2, 0]}) == [8, 9, 0, 1]
    gate_up = Concat((Axis("mlp", 2), Axis("mlp", 2)))
    assert index_map(gate_up, Concat((Axis("mlp", 5), Axis("mlp", 5)))) == [0, 1, 5, 6]
    assert (heads.size, gate_up.size, Concat((heads, Axis("mlp", 3))).size) == (4, 4, 7)
    assert Concat((heads, Axis("mlp", 3))).names == {"heads", "head_dim", "mlp"}


@pytest.mark.parametrize(
    ("old", "new", "placement"),
    [
        (Axis("mlp", 3), Axis("mlp", 2), None),  # smaller
        (Axis("mlp", 2), Axis("embed", 3), None),  # another axis
        (Axis("mlp", 2), Axis("mlp", 4), {"mlp": [1, 4]}),  # beyond the end
        (Axis("mlp", 2), Axis("mlp", 4), {"mlp": [1]}),  # one left out
        (Axis("mlp", 2), Axis("mlp", 4), {"mlp": [1, 1]}),  # two in one place
        (Axis("mlp", 2), Axis("mlp", 4), {"mlp": [0, -1]}),  # before the start
        (Axis("mlp", 2), Product((Axis("mlp", 2),)), None),  # another structure
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


def taken_back(
    tensor: torch.Tensor, old: tuple[AnyAxis, ...], new: tuple[AnyAxis, ...], placement: Placements
) -> torch.Tensor:
    for dim, (a, b) in enumerate(zip(old, new)):
        tensor = tensor.index_select(dim, torch.tensor(index_map(a, b, placement)))
    return tensor


@given(grown_shapes(), st.integers(0, 99))
def test_expand_keeps_the_old_bits_and_touches_nothing_else(shape: GrownShapes, seed: int) -> None:
    old_axes, new_axes, placement = shape
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(sizes(old_axes), generator=generator)
    into = torch.full(sizes(new_axes), torch.nan)
    result = expand(old, old_axes, into, new_axes, placement)
    assert torch.equal(taken_back(result, old_axes, new_axes, placement), old)
    assert int(result.isnan().sum()) == result.numel() - old.numel()


@given(grown_shapes(), st.integers(0, 99), st.sampled_from([1.0, 0.5, 2.0, 0.3]))
def test_expand_moments(shape: GrownShapes, seed: int, scale: float) -> None:
    """weight × exp_avg and weight² × exp_avg_sq are conserved where the weight was multiplied by ``scale``; new entries
    have no direction yet and the old ones' mean size; the step is carried; the input stays as it was."""
    old_axes, new_axes, placement = shape
    generator = torch.Generator().manual_seed(seed)
    weight, exp_avg = (torch.randn(sizes(old_axes), generator=generator, dtype=torch.float64) for _ in range(2))
    exp_avg_sq = torch.rand(sizes(old_axes), generator=generator, dtype=torch.float64) + 0.1
    old = Moments(exp_avg, exp_avg_sq, 123.0)
    copies = exp_avg.clone(), exp_avg_sq.clone()
    now = expand_moments(old, old_axes, new_axes, scale=scale, placement=placement)
    assert now.step == old.step
    first, second = (taken_back(t, old_axes, new_axes, placement) for t in (now.exp_avg, now.exp_avg_sq))
    torch.testing.assert_close(weight * scale * first, weight * exp_avg, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close((weight * scale) ** 2 * second, weight**2 * exp_avg_sq, rtol=TOLERANCE, atol=0)
    is_new = torch.isnan(expand(exp_avg, old_axes, torch.full(sizes(new_axes), torch.nan), new_axes, placement))
    assert not now.exp_avg[is_new].any()
    if is_new.any():
        fresh = now.exp_avg_sq[is_new]
        assert (fresh == fresh[0]).all()
        assert math.isclose(float(fresh[0]), float(second.mean()), rel_tol=TOLERANCE)
    assert torch.equal(old.exp_avg, copies[0]) and torch.equal(old.exp_avg_sq, copies[1])
    if scale == 1.0:
        assert torch.equal(first, exp_avg) and torch.equal(second, exp_avg_sq)

"""The products that LoHa and LoKr are turned into, against elementwise and Kronecker products formed in full."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterctl.registry.domain.conversion import Method
from adapterctl.registry.domain.lycoris import LycorisModule
from adapterctl.registry.merging.lycoris import Parts, Product, cut, exact, norm, parts_of, rounding

#: Of float64: sums of at most some hundred products.
EXACT = 1e-13
#: The cut finds singular values as roots of eigenvalues: half of float64, of the largest one.
CUT = 1e-7

SIZES = st.integers(1, 7)


def draw(seed: int, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape) for name, shape in shapes.items()}


def parts(method: Method, tensors: Mapping[str, np.ndarray], kernel: tuple[int, ...] = (), *, leads: bool = False):
    module = LycorisModule("m", 1.0, {}, 0, (1, *kernel), leads)
    return parts_of(module, method, tensors)


def off(made: Product, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(made.b @ made.a - expected).max() / max(np.abs(expected).max(), 1e-300))


def check_every_cut(found: Parts, expected: np.ndarray) -> None:
    sigma = np.linalg.svd(expected, compute_uv=False)
    for rank in range(1, found.rank):
        made, lost = cut(found, rank)
        best = float(np.linalg.norm(sigma[rank:]))
        assert made.rank == rank
        assert np.linalg.norm(made.b @ made.a - expected) == pytest.approx(best, abs=CUT * sigma[0])
        assert lost == pytest.approx(best, abs=CUT * sigma[0])


@given(seed=st.integers(0, 2**32), rows=SIZES, columns=SIZES, r=SIZES)
def test_loha_is_an_elementwise_product_of_two_products(seed, rows, columns, r):
    t = draw(seed, w1_a=(rows, r), w1_b=(r, columns), w2_a=(rows, r), w2_b=(r, columns))
    expected = (t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])

    found = parts("loha", t)

    assert exact(found).rank == found.rank <= min(r * r, rows, columns)
    assert off(exact(found), expected) <= EXACT
    check_every_cut(found, expected)


@given(seed=st.integers(0, 2**32), rows=SIZES, channels=SIZES, r=st.integers(1, 3), h=SIZES, w=SIZES)
def test_loha_with_core_tensors_is_the_sum_over_their_axes(seed, rows, channels, r, h, w):
    shapes = {"w1_a": (r, rows), "w1_b": (r, channels), "t1": (r, r, h, w)}
    t = draw(seed, **shapes, w2_a=(r, rows), w2_b=(r, channels), t2=(r, r, h, w))
    one, two = (np.einsum("ijhw,ip,jq->pqhw", t[f"t{n}"], t[f"w{n}_a"], t[f"w{n}_b"]) for n in "12")

    found = parts("loha", t, (h, w))

    assert off(exact(found), (one * two).reshape(rows, -1)) <= EXACT


@given(seed=st.integers(0, 2**32), a=SIZES, b=SIZES, c=SIZES, d=SIZES, r=st.integers(1, 9), first=st.booleans())
def test_lokr_is_a_kronecker_product_of_whole_or_split_factors(seed, a, b, c, d, r, first):
    one = {"w1": (a, c)} if first else {"w1_a": (a, r), "w1_b": (r, c)}
    for two in ({"w2": (b, d)}, {"w2_a": (b, r), "w2_b": (r, d)}):
        t = draw(seed, **one, **two)
        w1 = t["w1"] if first else t["w1_a"] @ t["w1_b"]
        w2 = t["w2"] if "w2" in t else t["w2_a"] @ t["w2_b"]

        found = parts("lokr", t)

        assert exact(found).rank == found.rank <= min(a, c) * min(b, d)
        assert off(exact(found), np.kron(w1, w2)) <= EXACT
        check_every_cut(found, np.kron(w1, w2))


@given(seed=st.integers(0, 2**32), a=SIZES, b=SIZES, c=SIZES, d=SIZES, k=SIZES)
def test_where_w2_leads_its_rows_and_channels_come_first_and_the_kernel_last(seed, a, b, c, d, k):
    t = draw(seed, w1=(a, c), w2=(b, d, k))
    expected = np.einsum("ac,bdk->badck", t["w1"], t["w2"]).reshape(a * b, -1)

    found = parts("lokr", t, (k,), leads=True)

    assert off(exact(found), expected) <= EXACT
    check_every_cut(found, expected)


def test_a_whole_factor_that_lacks_rank_is_not_given_more():
    random = np.random.default_rng(0)
    w1 = random.normal(size=(6, 2)) @ random.normal(size=(2, 5))
    t = {"w1": w1, "w2": random.normal(size=(4, 3))}

    found = parts("lokr", t)

    assert found.rank == 2 * 3
    assert off(exact(found), np.kron(w1, t["w2"])) <= EXACT


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_a_delta_of_zeros_stays_zeros_exactly_and_cut(method: Method):
    shapes = {"loha": {"w1_a": (6, 2), "w1_b": (2, 5), "w2_a": (6, 2), "w2_b": (2, 5)}, "lokr": {"w1": (3, 2)}}
    tensors = draw(0, **shapes[method])
    tensors |= {"w2_b": np.zeros((2, 5))} if method == "loha" else {"w2": np.zeros((4, 3))}

    found = parts(method, tensors)

    assert norm(exact(found)) == 0
    if found.rank > 1:
        made, lost = cut(found, 1)
        assert (norm(made), lost) == (0, 0)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_float32_holds_every_product_of_two_values_of_16_bits(dtype: str):
    t = draw(1, w1_a=(9, 2), w1_b=(2, 8), w2_a=(9, 2), w2_b=(2, 8), w1=(3, 2), w2=(4, 5))
    narrow = {slot: Product(np.ones((1, 1)), values).stored(dtype).read().a for slot, values in t.items()}

    loha = exact(parts("loha", {slot: narrow[slot] for slot in ("w1_a", "w1_b", "w2_a", "w2_b")}))
    lokr = exact(parts("lokr", {slot: narrow[slot] for slot in ("w1", "w2")}))

    assert [rounding(each, each.stored("F32").read()) for each in (loha, lokr)] == [0, 0]
    assert rounding(loha, loha.stored(dtype).read()) > 0


@given(seed=st.integers(0, 2**32), rows=SIZES, columns=SIZES, r=SIZES, scale=st.sampled_from([1e-12, 1.0, 1e12]))
def test_rounding_is_the_distance_that_the_dense_products_have(seed, rows, columns, r, scale):
    t = draw(seed, b=(rows, r), a=(r, columns))
    whole = Product(t["b"] * scale, t["a"])
    stored = whole.stored("BF16").read()

    expected = float(np.linalg.norm(stored.b @ stored.a - whole.b @ whole.a))

    # the dense difference cancels, so it is the less exact of the two
    assert rounding(whole, stored) == pytest.approx(expected, rel=1e-6, abs=1e-13 * norm(whole))


def test_a_factor_is_rounded_once_and_not_by_way_of_float32():
    above_a_tie = np.full((1, 1), 1 + 2.0**-8 + 2.0**-40)

    stored = Product(above_a_tie, above_a_tie).stored("BF16")

    assert stored.b[0, 0] == stored.a[0, 0] == 0x3F81, "1.0 is the even neighbour of the tie that float32 would make"

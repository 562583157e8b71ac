"""The deltas of LoHa and LoKr as products B·A: exact in float64, or cut to a rank by the exact truncated SVD.

LoHa's delta is an elementwise product of two products of low rank, which is one product of rank r₁·r₂:
(B₁A₁) ∘ (B₂A₂) = (B₁ • B₂)(A₁ * A₂), with every product of a column of B₁ and one of B₂ as a column (face-splitting
product), and of a row of A₁ and one of A₂ as a row (Slyusar 1999; Kolda & Bader 2009, https://doi.org/10.1137/07070111X,
§2.6, as Khatri-Rao products). LoKr's is a Kronecker product: (B₁A₁) ⊗ (B₂A₂) = (B₁ ⊗ B₂)(A₁ ⊗ A₂), the mixed-product
property, and its singular values are all products of one of either factor (Van Loan 2000,
https://doi.org/10.1016/S0377-0427(00)00393-9, §2).

Nothing here is rounded but by float64 itself. Values of 16 bits even have products that float32 holds exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..domain.adapter import KEY_PREFIX
from ..domain.conversion import Method
from ..domain.errors import InvalidAdapter, Problem, Refused
from ..domain.lycoris import LycorisModule
from .core import truncate
from .grams import Array, Block, Grams, gram_in_blocks
from .tensors import STORED, TensorReader, TensorWriter, check_finite, round_once, widen

Indices = NDArray[np.intp]

#: Raised when the same files give another output.
REVISION = 1
#: Of a value. LoHa's core tensors make products of six, whose squares are multiplied once more when a delta is cut.
LARGEST = 1e15
#: Share of a delta that float16 or float32 may cost, where products become smaller than they hold; as for a merge.
MOST_LOST = 2.0**-7


@dataclass(frozen=True, slots=True)
class Product:
    """b @ a, with b (rows, rank) and a (rank, columns), both float64."""

    b: Array
    a: Array

    @property
    def rank(self) -> int:
        return len(self.a)

    def times(self, scale: float) -> Product:
        """On one side, so that a value is rounded once."""
        return self if scale == 1 else Product(self.b * scale, self.a)

    def stored(self, dtype: str) -> Stored:
        """Both factors as they are stored in a safetensors dtype; too large values become infinite."""
        b, a = np.empty(self.b.shape, STORED[dtype]), np.empty(self.a.shape, STORED[dtype])
        round_once(self.b, dtype, b)
        round_once(self.a, dtype, a)
        return Stored(b, a, dtype)

    def grams(self) -> Grams:
        return Grams(gram_in_blocks(self.a), gram_in_blocks(self.b.T), np.ones(self.rank), (Block(0, 0, self.rank),))


@dataclass(frozen=True, slots=True)
class Stored:
    """A product's factors as they stand in a file of this dtype."""

    b: NDArray[Any]
    a: NDArray[Any]
    dtype: str

    def read(self) -> Product:
        wide = Product(np.empty(self.b.shape), np.empty(self.a.shape))
        widen(self.b, self.dtype, wide.b)
        widen(self.a, self.dtype, wide.a)
        return wide


@dataclass(frozen=True, slots=True)
class Parts:
    """The two products of low rank that a delta is made of. `window` is the size of a kernel that stands last in A₂."""

    method: Method
    first: Product
    second: Product
    window: int = 1
    w2_leads: bool = False

    @property
    def rank(self) -> int:
        """That of the exact delta; of a Hadamard product at most the shorter side, to which it is written out then."""
        product = self.first.rank * self.second.rank
        return product if self.method == "lokr" else min(product, len(self.first.b), len(self.first.a.T))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Frobenius norms for one module: of its exact delta, of what the cut left out, of what rounding changed."""

    norm: float
    cut: float
    rounding: float


def load_parts(module: LycorisModule, method: Method, reader: TensorReader) -> Parts:
    """Raises `InvalidAdapter` for a value that is not finite or too large, `Corrupt` for a file that ends too early."""
    values = {}
    for slot, entry in module.tensors.items():
        values[slot] = reader.read(entry)
        check_finite(entry, values[slot].size - int(np.count_nonzero(np.isfinite(values[slot]))))
        largest = float(np.abs(values[slot]).max())
        if largest > LARGEST:
            message = f"{entry.key} holds a value of size {largest:.3g}, at most {LARGEST:.0g} is accepted"
            raise InvalidAdapter(message, problems=[Problem("too_large", message)])
    return parts_of(module, method, values)


def write_module(module: LycorisModule, parts: Parts, rank: int, dtype: str, writer: TensorWriter) -> Outcome:
    """Write A and B of a module at `rank`: exact where its delta needs no more, filled with zeros beyond.

    Raises `Refused` where a value is too large for `dtype`, or values are so small that much of the delta is lost.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is refused below
        found, lost = (exact(parts), 0.0) if parts.rank <= rank else cut(parts, rank)
        made = found.times(module.scaling)
        stored = made.stored(dtype)
        off, size = rounding(made, stored.read()), norm(made)
    if not math.isfinite(off + size):
        raise Refused(f"{module.name} has values that {dtype} cannot hold", hint="write it with --dtype f32 or f64")
    if dtype != "BF16" and off > MOST_LOST * size:  # that has the range of float32, and its loss is its few bits
        raise Refused(
            f"{module.name} has values so small that {dtype} loses {off / size:.1%} of its delta",
            hint=f"write it with --dtype {'f32 or bf16' if dtype == 'F16' else 'f64'}",
        )
    (a_key, _, _), (b_key, _, _) = lora_tensors(module, rank, dtype)
    # rows beyond the module's own rank stay the zeros that the writer reserved
    writer.write(a_key, stored.a)
    writer.write(b_key, np.pad(stored.b, ((0, 0), (0, rank - made.rank))))
    lost *= abs(module.scaling)
    return Outcome(math.hypot(size, lost), lost, off)


def lora_tensors(module: LycorisModule, rank: int, dtype: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Key, dtype and shape of lora_A and lora_B of a module."""
    stem = f"{KEY_PREFIX}{module.name}"
    return [
        (f"{stem}.lora_A.weight", dtype, (rank, *module.in_shape)),
        (f"{stem}.lora_B.weight", dtype, (module.d_out, rank, *(1 for _ in module.in_shape[1:]))),
    ]


def parts_of(module: LycorisModule, method: Method, tensors: Mapping[str, NDArray[np.floating]]) -> Parts:
    """`tensors` are those of the module, by their short names."""
    wide = {slot: np.asarray(values, np.float64) for slot, values in tensors.items()}
    first, second = _factor(wide, "1"), _factor(wide, "2")
    return Parts(method, first, second, int(np.prod(module.in_shape[1:])), module.w2_leads)


def exact(parts: Parts) -> Product:
    """The whole delta, without its scaling, at `parts.rank`."""
    one, two = parts.first, parts.second
    if parts.method == "lokr":
        every = np.indices((one.rank, two.rank)).reshape(2, -1)
        return _kron(parts, one, two, every[0], every[1])
    if one.rank * two.rank > parts.rank:
        return _beside_identity((one.b @ one.a) * (two.b @ two.a))
    b = (one.b[:, :, None] * two.b[:, None, :]).reshape(len(one.b), -1)
    a = (one.a[:, None, :] * two.a[None, :, :]).reshape(-1, one.a.shape[1])
    return Product(b, a)


def cut(parts: Parts, rank: int) -> tuple[Product, float]:
    """The best approximation of this rank, below `parts.rank`, and the norm of what it leaves out.

    Source: Eckart & Young 1936, https://doi.org/10.1007/BF02288367
    """
    if parts.method == "loha":
        found, sigma = _decomposed(exact(parts), rank)
        return found, float(np.linalg.norm(sigma[rank:]))
    (one, of_one), (two, of_two) = (_decomposed(each, each.rank) for each in (parts.first, parts.second))
    sigma = np.outer(of_one, of_two).ravel()
    order = np.argsort(-sigma, kind="stable")
    kept = order[:rank]
    return _kron(parts, one, two, kept // two.rank, kept % two.rank), float(np.linalg.norm(sigma[order[rank:]]))


def rounding(whole: Product, stored: Product) -> float:
    """||stored - whole||, from the differences of the factors, so that nothing cancels: 0 where they are equal.

    NaN where a stored value is not finite.
    """
    pairs = ((stored.b - whole.b, stored.a), (whole.b, stored.a - whole.a))
    changed = [Product(b, a) for b, a in pairs if b.any() and a.any()]
    if not changed:
        return 0.0
    return norm(Product(np.concatenate([p.b for p in changed], axis=1), np.concatenate([p.a for p in changed])))


def norm(product: Product) -> float:
    """||b @ a||, from the Grams; b @ a is never formed."""
    grams = product.grams()
    squared = float(np.sum(grams.a * grams.b))
    return 0.0 if squared < 0 else math.sqrt(squared)  # rounding may leave less than nothing; NaN stays


def _factor(tensors: Mapping[str, Array], which: str) -> Product:
    """W1 or W2 as a product whose rank is no larger than it has to be; a kernel is folded into its columns."""
    if (whole := tensors.get(f"w{which}")) is not None:
        return _split(whole.reshape(len(whole), -1))
    b, a = tensors[f"w{which}_a"], tensors[f"w{which}_b"]
    if (core := tensors.get(f"t{which}")) is not None:
        # PEFT's make_weight_cp: W[p, q, h, w] = Σ core[i, j, h, w] b[i, p] a[j, q]
        b, a = b.T, np.einsum("ijhw,jq->iqhw", core, a).reshape(len(core), -1)
    return _split(b @ a) if b.shape[1] > min(len(b), a.shape[1]) else Product(b, a)


def _split(whole: Array) -> Product:
    """A matrix as a product, by its SVD where its rank is less than its shorter side.

    Singular values below what float64 leaves of the largest (the rule of `numpy.linalg.matrix_rank`) are none.
    """
    u, sigma, vt = np.linalg.svd(whole, full_matrices=False)
    count = max(1, int(np.sum(sigma > sigma[0] * max(whole.shape) * np.finfo(np.float64).eps)))
    if count == len(sigma):
        return _beside_identity(whole)
    root = np.sqrt(sigma[:count])
    return Product(u[:, :count] * root, root[:, None] * vt[:count])


def _beside_identity(whole: Array) -> Product:
    """A matrix times the identity of its shorter side, so that nothing is rounded."""
    rows, columns = whole.shape
    return Product(np.eye(rows), whole) if rows <= columns else Product(whole, np.eye(columns))


def _decomposed(product: Product, rank: int) -> tuple[Product, Array]:
    """The `rank` strongest singular directions, roots of the values on both sides; and all values, largest first."""
    maps = truncate(product.grams(), rank)
    return Product(product.b @ maps.b, maps.a @ product.a), maps.spectrum


def _kron(parts: Parts, one: Product, two: Product, i: Indices, j: Indices) -> Product:
    """Columns i[k] of B₁ and j[k] of B₂ as column k, and rows of A₁ and A₂ alike, in the order of PEFT's layout.

    PEFT's make_kron expands W1 by the axes of a kernel only where W2 has four. A W2 of three axes meets a W1 of two in
    torch.kron, which pairs (rows, columns) of W1 with (channels, kernel) of W2; the result is then read in another
    shape. What was trained is that product, so it is kept: see `LycorisModule`.
    """
    if not parts.w2_leads:
        b = one.b[:, None, i] * two.b[None, :, j]
        a = one.a[i][:, :, None] * two.a[j][:, None, :]
    else:
        b = two.b[:, None, j] * one.b[None, :, i]
        a = two.a[j].reshape(len(j), -1, 1, parts.window) * one.a[i][:, None, :, None]
    return Product(b.reshape(-1, len(i)), a.reshape(len(i), -1))

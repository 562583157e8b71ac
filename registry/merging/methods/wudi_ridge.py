"""The delta that answers each parent's own inputs as that parent does, in closed form and with a ridge."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from ..core import canonical
from ..grams import Grams, Maps
from ..method import merge_method


@merge_method(
    "wudi_ridge",
    form="grams",
    rev=1,
    exact=False,
    when="parents of different tasks read the same inputs (high row overlap) and their sum goes too far there",
    cost="O(d R²) + O(R³)",
    paper="WUDI-Merging, https://arxiv.org/abs/2503.08099",
    breaks=("identity", "monotone", "full_rank"),
)
def wudi_ridge(grams: Grams, *, rank: int, ridge: Annotated[float, (1e-6, 1.0)] = 1e-2) -> Maps:
    """Find D that minimises Σ ‖(D - Dᵢ) Dᵢᵀ‖² / ‖Dᵢ‖², whose rows stand for the inputs of task i.

    Args:
        grams: of the weighted parents.
        rank: of the output.
        ridge: share of the largest eigenvalue that is added to the system; less makes D grow where parents overlap.

    D = (Σ Dᵢ Cᵢ) (Σ Cᵢ + λ I)⁻¹ with Cᵢ = Dᵢᵀ Dᵢ / ‖Dᵢ‖². The paper minimises by gradient steps from the sum; the ridge
    takes the place of stopping early. In singular vectors U, V and values σ of the parents side by side, with
    K = diag(σ² / ‖σᵢ‖²): D = U diag(σ) K (λ I + V Vᵀ K)⁻¹ V, of which only R × R matrices are formed.
    """
    parents = canonical(grams)
    weights = np.zeros_like(parents.sigma)
    for block in parents.grams.blocks:
        squares = parents.sigma[block.start : block.stop] ** 2
        weights[block.start : block.stop] = squares / squares.sum()
    root = np.sqrt(weights)
    system = root[:, None] * parents.grams.a * root
    size = float(np.linalg.eigvalsh(system)[-1]) if len(root) else 0.0
    # (λ I + G K)⁻¹ = K^(-1/2) (λ I + K^(1/2) G K^(1/2))⁻¹ K^(1/2), and the K before it takes K^(-1/2) away
    solved = np.linalg.solve(ridge * size * np.eye(len(root)) + system, np.diag(root))
    return parents.product(rank, (parents.sigma * root)[:, None] * solved)

"""GradMax (arXiv 2201.05125): of all incoming weights of hidden units whose outgoing weights are zero, those that make
the gradient of the outgoing weights largest."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from growkit.growth.observe import Seen

# Where no gradient comes back (a layer under a mask that is at 0), no weights are better than those that were drawn.
ROUNDS = 30  # of the power iteration; the gradient has then settled to a few per mille


def readers(seen: Seen, drawn: Tensor) -> Tensor:
    """Incoming weights (units, in) of new GELU units, each as long as its row of ``drawn``.

    With zero outgoing weights the gradient is Σ_t g_t gelu(w·x_t), and gelu is linear near zero: of one unit it is
    largest for the first right singular vector of M = Σ_t g_t x_tᵀ, of several for the first ones (section 3.2). A
    vector and its negative are two units to a GELU; where there are more units than that, the draws, seen through M.
    """
    import torch

    assert seen.gradients is not None
    if not seen.gradients.any():
        return drawn
    matrix = seen.gradients.T.float() @ seen.inputs.float()
    _, strength, directions = torch.linalg.svd(matrix, full_matrices=False)
    chosen = torch.cat((directions, -directions))[: len(drawn)].to(drawn.dtype)
    rest = drawn[len(chosen) :].float() @ directions.T * strength @ directions
    return _as_long_as(torch.cat((chosen, rest.to(drawn.dtype))), drawn)


def gated_readers(seen: Seen, gates: Tensor, drawn: Tensor) -> Tensor:
    """The same for the up rows (units, in) of new SwiGLU units with the given ``gates`` (units, in): of a unit with the
    gate a, the first right singular vector of Σ_t silu(a·x_t) g_t x_tᵀ, by power iteration from its row of ``drawn``.
    """
    import torch

    assert seen.gradients is not None
    if not seen.gradients.any():
        return drawn
    x_TD, g_TE, u = seen.inputs.float(), seen.gradients.float(), drawn.float()
    g_TE = g_TE / g_TE.norm()  # of a mean over many tokens each is tiny, and its square enters every round
    open_TU = torch.nn.functional.silu(x_TD @ gates.float().T)
    for _ in range(ROUNDS):
        gradient_EU = g_TE.T @ (x_TD @ u.T * open_TU)
        u = ((g_TE @ gradient_EU) * open_TU).T @ x_TD
        u = u / u.norm(dim=1, keepdim=True)
    return _as_long_as(u.to(drawn.dtype), drawn)


def _as_long_as(rows: Tensor, drawn: Tensor) -> Tensor:
    return rows * (drawn.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True))

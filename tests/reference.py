"""Oracles that share no code with the package."""

import numpy as np
import torch


def relative_error(ours: torch.Tensor, reference: torch.Tensor, start: torch.Tensor) -> float:
    """``||W - W_ref|| / ||W_ref - W_0||``: the error as a share of the distance travelled."""
    ours, reference, start = (t.detach().double() for t in (ours, reference, start))
    return float((ours - reference).norm() / (reference - start).norm())


def newton_schulz_fp64(matrix: torch.Tensor, triples: list[tuple[float, float, float]]) -> np.ndarray:
    """The iteration of equation (2), by the singular values: U p(...p(S / ||S||)) V^T in float64."""
    u, s, vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt

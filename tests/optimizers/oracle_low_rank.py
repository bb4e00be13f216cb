"""Slow float64 NumPy transcriptions of GaLore, Fira, Apollo and of Alice's further options, one matrix at a time.

As in `oracle.py`, no code is shared with the package and letters are those of arXiv 2502.07752. `like` of `step`
gives another solver's basis, from which only the signs of singular vectors are adopted.
"""

import numpy as np

from tests.optimizers import oracle
from tests.optimizers.oracle import _Matrix, limit
from tests.optimizers.oracle_full_rank import correction


def turn_square(matrix, square):
    """With square="columns" a square matrix is transposed, as the published codes of GaLore, Fira and Apollo do."""
    assert square in ("rows", "columns")
    if square == "columns" and matrix.m == matrix.n:
        matrix.transposed = True
        matrix._W = matrix._W.T.copy()


class GaLore(_Matrix):
    """Algorithm 8, with the back-projection that it forgets to print."""

    def __init__(
        self,
        W,
        *,
        betas=(0.9, 0.999),
        r=128,
        K=200,
        alpha=0.25,
        eps=1e-6,
        bias_correction=True,
        update_times="zero_based",
        square="columns",
        weight_decay=0.0,
    ):
        super().__init__(W)
        turn_square(self, square)
        assert r <= self.m
        self.beta1, self.beta2 = betas
        self.r, self.K, self.alpha, self.eps = r, K, alpha, eps
        self.bias_correction, self.update_times = bias_correction, update_times
        self.weight_decay = weight_decay
        self.U = None
        self.m_t, self.v_t = np.zeros((r, self.n)), np.zeros((r, self.n))

    def is_refresh(self):
        if self.update_times == "printed":
            return self.t == 1 or self.t % self.K == 0
        assert self.update_times == "zero_based"
        return (self.t - 1) % self.K == 0

    def new_basis(self, G, like):
        """The top r left singular vectors."""
        U = np.linalg.svd(G)[0][:, : self.r]
        if like is not None:
            U = U * np.where(np.sum(U * like["U"], axis=0) < 0, -1.0, 1.0)
        return U

    def adam(self, sigma):
        """omega without bias correction, and the correction c_t."""
        self.m_t = self.beta1 * self.m_t + (1 - self.beta1) * sigma
        self.v_t = self.beta2 * self.v_t + (1 - self.beta2) * sigma**2
        c = correction(self.t, self.beta1, self.beta2) if self.bias_correction else 1.0
        return self.m_t / (np.sqrt(self.v_t) + self.eps), c

    def direction(self, G, like=None):
        if self.is_refresh():
            self.U = self.new_basis(G, like)
        sigma = self.U.T @ G
        omega, c = self.adam(sigma)
        return self.assemble(G, sigma, omega, c)

    def assemble(self, G, sigma, omega, c):
        return c * self.U @ omega


class Fira(GaLore):
    """GaLore's update, scaled, plus the limited residual, unscaled. residual="scaled" is the published code's."""

    def __init__(self, W, *, alpha=0.25, gamma=1.01, residual="exact", **rest):
        super().__init__(W, alpha=1.0, **rest)
        self.low_rank_scale, self.gamma, self.residual = alpha, gamma, residual

    def assemble(self, G, sigma, omega, c):
        kept = {"exact": 1.0, "scaled": self.low_rank_scale}[self.residual]
        S = G - kept * self.U @ self.U.T @ G
        for i in range(self.n):
            S[:, i] *= np.linalg.norm(omega[:, i]) / (np.linalg.norm(sigma[:, i]) + 1e-8)
        S, self.phi, eta = limit(S, self.phi, self.gamma)
        self.etas.append(eta)
        return c * (self.low_rank_scale * self.U @ omega + S)


class Apollo(GaLore):
    """Algorithm 9: the gradient itself, scaled by what Adam does to its projection.

    `drawn(step, m, r)` gives the standard normal numbers [m, r] of a random projection; step is that of the update.
    """

    def __init__(
        self, W, *, alpha=1.0, gamma=None, projection="gaussian", scaling="columns", drawn=None, ratio_eps=0.0, **rest
    ):
        super().__init__(W, alpha=alpha, **rest)
        self.projection, self.scaling, self.gamma, self.drawn = projection, scaling, gamma, drawn
        self.ratio_eps = ratio_eps

    def new_basis(self, G, like):
        if self.projection == "svd":
            return super().new_basis(G, like)
        return self.drawn(self.t, self.m, self.r) / np.sqrt(self.r)

    def assemble(self, G, sigma, omega, c):
        if self.scaling == "tensor":
            S = G * np.linalg.norm(omega) / (np.linalg.norm(sigma) + self.ratio_eps)
        else:
            S = G.copy()
            for i in range(self.n):
                S[:, i] *= np.linalg.norm(omega[:, i]) / (np.linalg.norm(sigma[:, i]) + self.ratio_eps)
        S, self.phi, eta = limit(S, self.phi, self.gamma)
        self.etas.append(eta)
        return c * S


class Alice(oracle.Alice):
    """Alice with bias correction, and with either side of a square matrix projected.

    The correction c_t multiplies the whole direction, compensation included, as in the published code of Fira.
    """

    def __init__(self, W, *, bias_correction=False, square="rows", **rest):
        super().__init__(W, **rest)
        turn_square(self, square)
        self.bias_correction = bias_correction

    def direction(self, G, draws=None, signs_of=None):
        D = super().direction(G, draws, signs_of)
        return correction(self.t, self.beta1, self.beta2) * D if self.bias_correction else D

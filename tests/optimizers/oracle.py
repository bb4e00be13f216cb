"""Slow float64 NumPy transcription of RACS, Alice and Alice-0 (arXiv 2502.07752), one matrix at a time.

It exists to be compared with the package, so it shares no code with it and takes the obvious way everywhere:
explicit m x m matrices, complete QR, full eigendecompositions. Letters are the paper's. Random draws are not
made here: they are handed in (class `Draws`), so that both sides see the same ones.
"""

import numpy as np


def evd(M, r):
    """EVD(M, r): the top r eigenvectors of a symmetric matrix, eigenvalues descending."""
    _, vectors = np.linalg.eigh((M + M.T) / 2)
    return vectors[:, ::-1][:, :r]


def qr_complement(U):
    """QR(U): the m - r columns which complete the orthonormal U (columns r+1..m of the complete QR)."""
    full, _ = np.linalg.qr(U, mode="complete")
    return full[:, U.shape[1] :]


def subspace_iteration(A, U_init, steps=1):
    """Algorithm 10. The printed last line returns EVD(V), r x r; the Ritz rotation U EVD(V) is meant."""
    U = U_init
    for _ in range(steps):
        H = A @ U
        U, _ = np.linalg.qr(H)
    V = U.T @ A @ U
    return U @ evd(V, V.shape[0])


def limit(X, phi, gamma):
    """Norm-growth limiter: (eta X, ||eta X||, eta); gamma = None switches it off."""
    norm = np.linalg.norm(X)
    eta = 1.0
    if gamma is not None and phi > 0:
        eta = gamma / max(norm / phi, gamma)
    return eta * X, eta * norm, eta


class Draws:
    """Replays logged random draws in order, and insists that each one is the draw the algorithm asks for.

    Each entry is ("columns", total, count, indices) or ("gaussian", rows, count, matrix).
    """

    def __init__(self, log):
        self.log = log
        self.used = 0

    def take(self, kind, size, count):
        assert self.used < len(self.log), f"the package did not draw {kind}({size}, {count})"
        entry = self.log[self.used]
        assert entry[:3] == (kind, size, count), f"expected {(kind, size, count)}, the package drew {entry[:3]}"
        self.used += 1
        return entry[3]

    def columns(self, total, count):
        return self.take("columns", total, count)

    def gaussian(self, rows, count):
        return self.take("gaussian", rows, count)


class _Matrix:
    """A weight with the paper's orientation m <= n; a square matrix is not transposed."""

    def __init__(self, W):
        W = np.array(W, dtype=np.float64)
        self.transposed = W.shape[0] > W.shape[1]
        self._W = W.T.copy() if self.transposed else W
        self.m, self.n = self._W.shape
        self.t = 0
        self.phi = 0.0
        self.etas = []  # what the limiter did, so that a test can see that it acted

    @property
    def W(self):
        return self._W.T if self.transposed else self._W

    def step(self, G, lr, **injected):
        G = np.asarray(G, dtype=np.float64)
        G = G.T if self.transposed else G
        self.t += 1
        direction = self.direction(G, **injected)
        self._W = self._W * (1 - lr * self.weight_decay)
        self._W = self._W - lr * self.alpha * direction


class RACS(_Matrix):
    """Algorithm 1."""

    def __init__(self, W, *, beta=0.9, alpha=0.05, gamma=1.01, iterations=5, eps=1e-30, weight_decay=0.0):
        super().__init__(W)
        self.beta, self.alpha, self.gamma = beta, alpha, gamma
        self.iterations, self.eps, self.weight_decay = iterations, eps, weight_decay
        self.s = np.zeros(self.n)
        self.q = np.zeros(self.m)

    def direction(self, G):
        beta, eps = self.beta, self.eps
        # ||s||^2 is of the fourth order in G and would fall below eps: tiny gradients are rescaled (section 0).
        c = np.max(np.abs(G)) if 0 < np.sqrt(np.mean(G**2)) < 1e-8 else 1.0
        G_full, G = G, G / c
        q_hat = np.ones(self.m)
        for _ in range(self.iterations):
            s_hat = np.array([np.sum(q_hat * G[:, j] ** 2) for j in range(self.n)])  # Diag(G^T Q G)
            s_hat = s_hat / max(np.sum(q_hat**2), eps)
            q_hat = np.array([np.sum(s_hat * G[i, :] ** 2) for i in range(self.m)])  # Diag(G S G^T)
            q_hat = q_hat / max(np.sum(s_hat**2), eps)
        self.s = beta * self.s + (1 - beta) * s_hat * c**2
        self.q = beta * self.q + (1 - beta) * q_hat
        Q = np.diag(np.maximum(self.q, eps) ** -0.5)
        S = np.diag(np.maximum(self.s, eps) ** -0.5)
        G_tilde, self.phi, eta = limit(Q @ G_full @ S, self.phi, self.gamma)
        self.etas.append(eta)
        return G_tilde


class Alice(_Matrix):
    """Algorithm 4 with the variants of section 8; tracking=False is Alice-0.

    `step` takes `draws` (a `Draws`) and, when the sign rule is off, `signs_of`: a basis whose column signs are
    adopted for the eigenvectors, since an eigenvector's sign is the solver's choice.
    """

    def __init__(
        self,
        W,
        *,
        betas=(0.9, 0.9, 0.999),
        r=128,
        l=40,
        K=200,
        alpha=0.3,
        alpha_c=0.4,
        gamma=1.01,
        eps=1e-8,
        weight_decay=0.0,
        tracking=True,
        switching="complement",
        compensation="optimal",
        initial_basis="evd",
        tracking_basis="printed",
        update_times="printed",
        fix_signs=True,
    ):
        super().__init__(W)
        assert l <= r <= self.m
        self.beta1, self.beta2, self.beta3 = betas
        if not tracking:
            self.beta3 = 0.0
        self.r, self.l, self.K = r, l, K
        self.alpha, self.alpha_c, self.gamma, self.eps = alpha, alpha_c, gamma, eps
        self.weight_decay = weight_decay
        self.tracking, self.switching, self.compensation = tracking, switching, compensation
        self.initial_basis, self.tracking_basis = initial_basis, tracking_basis
        self.update_times, self.fix_signs = update_times, fix_signs
        if r == self.m:  # there is no complement to switch to or to compensate for
            self.compensation = "none"
            if switching in ("complement", "full_basis"):
                self.switching = "none"
        self.U = np.zeros((self.m, r))
        self.Q = np.zeros((r, r))  # the paper's Q tilde
        self.m_t = np.zeros((r, self.n))
        self.v_t = np.zeros((r, self.n))
        self.p = np.zeros(self.n)

    def is_refresh(self):
        if self.update_times == "printed":
            return self.t == 1 or self.t % self.K == 0
        assert self.update_times == "zero_based"
        return (self.t - 1) % self.K == 0

    def ritz(self, Q, draws):
        """U' of Algorithm 2, line 1; at t = 1 it depends on what U_0 is taken to be."""
        if self.t > 1:
            return subspace_iteration(Q, self.U)
        if self.initial_basis == "evd":
            return evd(Q, self.r)  # Q = (1 - beta3) G_1 G_1^T here
        if self.initial_basis == "gaussian":
            U_0, _ = np.linalg.qr(draws.gaussian(self.m, self.r))
            return subspace_iteration(Q, U_0)
        assert self.initial_basis == "zeros"
        return subspace_iteration(Q, np.zeros((self.m, self.r)))

    def switch(self, Q, draws):
        """Algorithm 2 and its variants: (U, which columns are eigenvectors, hence free in sign)."""
        m, r, l = self.m, self.r, self.l
        if self.switching == "none":
            return evd(Q, r), [True] * r

        U_prime = self.ritz(Q, draws)
        leading = [U_prime[:, j] for j in range(l)]
        U_c = qr_complement(U_prime)

        if self.switching == "complement":
            if m - r < r - l:  # the complement is too small: keep the next Ritz vectors as well
                leading = [U_prime[:, j] for j in range(2 * r - m)]
            picked = draws.columns(m - r, r - len(leading)) if len(leading) < r else []
            drawn = [U_c[:, j] for j in picked]
            free = [True] * len(leading) + [False] * len(drawn)
        elif self.switching == "full_basis":
            pool = [U_prime[:, j] for j in range(l, r)] + [U_c[:, j] for j in range(m - r)]
            picked = draws.columns(m - l, r - l) if l < r else []
            drawn = [pool[j] for j in picked]
            free = [True] * l + [j < r - l for j in picked]
        elif self.switching == "gaussian_mix":
            N = draws.gaussian(m, r - l) if l < r else np.zeros((m, 0))
            drawn = [N[:, j] / np.linalg.norm(N[:, j]) for j in range(r - l)]
            free = [True] * l + [False] * (r - l)
        else:
            assert self.switching == "gaussian"
            N = draws.gaussian(m, r)
            leading = []
            drawn = [N[:, j] / np.linalg.norm(N[:, j]) for j in range(r)]
            free = [False] * r
        return np.stack(leading + drawn, axis=1), free

    def refresh(self, G, draws, signs_of):
        U_prev = self.U
        Q = self.beta3 * U_prev @ self.Q @ U_prev.T + (1 - self.beta3) * G @ G.T
        U, free = self.switch(Q, draws)
        for j in range(self.r):
            if self.fix_signs:
                flip = self.t > 1 and U[:, j] @ U_prev[:, j] < 0
            else:
                flip = signs_of is not None and free[j] and U[:, j] @ signs_of[:, j] < 0
            if flip:
                U[:, j] = -U[:, j]
        if self.tracking_basis == "rotated":
            R = U.T @ U_prev
            self.Q = R @ self.Q @ R.T
        else:
            assert self.tracking_basis == "printed"
        self.U = U

    def compensate(self, G, sigma, omega):
        """The term added to U omega: Algorithm 3 times alpha_c, or Fira's residual, or Fira+."""
        U, m, r = self.U, self.m, self.r
        if self.compensation == "none":
            return np.zeros_like(G)
        residual = G - U @ U.T @ G

        if self.compensation == "optimal":
            energy = np.ones(m) @ G**2 - np.ones(r) @ (U.T @ G) ** 2
            if self.switching in (
                "gaussian",
                "gaussian_mix",
            ):  # U is not orthonormal, and the difference may be negative
                energy = np.ones(m) @ residual**2
            self.p = self.beta1 * self.p + (1 - self.beta1) * energy
            scales = 1 / (np.sqrt(np.maximum(self.p, 0)) + self.eps)
            C = np.sqrt(m - r) * residual @ np.diag(scales)
            C, self.phi, eta = limit(C, self.phi, self.gamma)
            self.etas.append(eta)
            return self.alpha_c * C

        scales = [np.linalg.norm(omega[:, i]) / (np.linalg.norm(sigma[:, i]) + self.eps) for i in range(self.n)]
        S, self.phi, eta = limit(residual @ np.diag(scales), self.phi, self.gamma)
        self.etas.append(eta)
        if self.compensation == "fira":
            return S
        assert self.compensation == "fira_plus"
        return self.alpha_c * S * np.linalg.norm(U @ omega) / np.linalg.norm(S)

    def direction(self, G, draws=None, signs_of=None):
        if self.is_refresh():
            self.refresh(G, draws, signs_of)
        sigma = self.U.T @ G
        if self.tracking:
            self.Q = self.beta3 * self.Q + (1 - self.beta3) * sigma @ sigma.T
        self.m_t = self.beta1 * self.m_t + (1 - self.beta1) * sigma
        self.v_t = self.beta2 * self.v_t + (1 - self.beta2) * sigma**2
        omega = self.m_t / (np.sqrt(self.v_t) + self.eps)
        return self.U @ omega + self.compensate(G, sigma, omega)


class EigenAdam(_Matrix):
    """Algorithm 7, except that momentum is accumulated in the rotated coordinates, as Alice does.

    U_f is refreshed at every step (K = 1) and follows the same sign rule as Alice.
    """

    def __init__(self, W, *, betas=(0.9, 0.9, 0.999), alpha=1.0, eps=1e-8, weight_decay=0.0):
        super().__init__(W)
        self.beta1, self.beta2, self.beta3 = betas
        self.alpha, self.eps, self.weight_decay = alpha, eps, weight_decay
        self.Q = np.zeros((self.m, self.m))
        self.U = np.zeros((self.m, self.m))
        self.m_t = np.zeros((self.m, self.n))
        self.v_t = np.zeros((self.m, self.n))

    def direction(self, G):
        self.Q = self.beta3 * self.Q + (1 - self.beta3) * G @ G.T
        U = evd(self.Q, self.m).copy()
        for j in range(self.m):
            if self.t > 1 and U[:, j] @ self.U[:, j] < 0:
                U[:, j] = -U[:, j]
        self.U = U
        sigma = U.T @ G
        self.m_t = self.beta1 * self.m_t + (1 - self.beta1) * sigma
        self.v_t = self.beta2 * self.v_t + (1 - self.beta2) * sigma**2
        return U @ (self.m_t / (np.sqrt(self.v_t) + self.eps))

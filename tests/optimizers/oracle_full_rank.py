"""Slow float64 NumPy transcriptions of the full-rank relatives of RACS and Alice, one matrix at a time.

As in `oracle.py`, no code is shared with the package, letters are those of arXiv 2502.07752, and the obvious way is
taken: singular value decompositions, loops, explicit square matrices.

An eigenvector is defined up to its sign, and a basis of a degenerate eigenspace up to a rotation. Where a trajectory
depends on that choice, `step` takes `like`, a mapping from state letters to another solver's bases; of these only
the undetermined part is adopted, and only after a check that it is a solution.
"""

import numpy as np

from tests.optimizers.oracle import _Matrix

QUINTIC = (3.4445, -4.7750, 2.0315)


def adopt(values, vectors, like, degenerate=1e-11, tolerance=1e-7):
    """Eigenvectors with the free choices made as in `like`: signs, and bases of degenerate eigenspaces.

    Args:
        values: eigenvalues, descending.
        vectors: the eigenvectors as columns.
        like: another solver's eigenvectors in the same order, or None to keep `vectors`.
        degenerate: neighbours closer than this times the largest eigenvalue share an eigenspace.
        tolerance: of the check that `like` spans the same eigenspaces.
    """
    if like is None:
        return vectors
    assert np.linalg.norm(like.T @ like - np.eye(like.shape[1])) < 1e-12 * like.shape[0], "not orthonormal"
    chosen = vectors.copy()
    start = 0
    for end in range(1, len(values) + 1):
        if end < len(values) and values[end - 1] - values[end] <= degenerate * values[0]:
            continue
        mine, theirs = vectors[:, start:end], like[:, start:end]
        if end - start == 1:
            chosen[:, start] = mine[:, 0] * np.sign(mine[:, 0] @ theirs[:, 0])
        else:
            assert np.linalg.norm(mine @ mine.T - theirs @ theirs.T) < tolerance, "another eigenspace"
            chosen[:, start:end] = theirs
        start = end
    return chosen


def eigenbasis(M, like=None):
    """EVD(M): all eigenvectors of a symmetric matrix, eigenvalues descending."""
    values, vectors = np.linalg.eigh((M + M.T) / 2)
    return adopt(values[::-1], vectors[:, ::-1], like)


def matrix_power(M, exponent):
    """M^exponent of a symmetric positive definite matrix."""
    values, vectors = np.linalg.eigh((M + M.T) / 2)
    return vectors @ np.diag(values**exponent) @ vectors.T


def polar(G):
    """(G G^T)^(-1/2) G, with the pseudo-inverse where G G^T is singular."""
    left, values, right = np.linalg.svd(G, full_matrices=False)
    kept = values > 1e-12 * values[0]
    return left[:, kept] @ right[kept]


def newton_schulz(G, iterations=5):
    """(G G^T)^(-1/2) G by the coupled iteration of appendix B.8."""
    A = G @ G.T
    identity = np.eye(A.shape[0])
    norm = np.sqrt(np.sum(A**2))
    Y, Z = A / norm, identity
    for _ in range(iterations):
        factor = 3 * identity - Z @ Y
        Y, Z = Y @ factor / 2, factor @ Z / 2
    return Z @ G / np.sqrt(norm)


def quintic(G, iterations=5, eps=1e-7):
    """Newton-Schulz of the reference implementation of Muon: an odd polynomial of degree 5, repeated."""
    a, b, c = QUINTIC
    X = G / max(np.linalg.norm(G), eps)
    for _ in range(iterations):
        A = X @ X.T
        X = a * X + b * A @ X + c * A @ A @ X
    return X


def whiten(G, solver, iterations):
    return {"evd": polar, "newton_schulz": lambda X: newton_schulz(X, iterations)}[solver](G)


def correction(t, beta1, beta2):
    """c_t, which turns m / sqrt(v) into the ratio of the unbiased averages."""
    return np.sqrt(1 - beta2**t) / (1 - beta1**t)


class _Full(_Matrix):
    alpha = 1.0
    orient = True

    def __init__(self, W, weight_decay=0.0):
        super().__init__(W)
        if self.transposed and not self.orient:
            self.transposed, self._W, self.m, self.n = False, self._W.T.copy(), self.n, self.m
        self.weight_decay = weight_decay

    def zeros(self, *shape):
        return np.zeros(shape)

    def average(self, old, new, beta):
        return beta * old + (1 - beta) * new

    def is_update(self, K, rule):
        return self.t == 1 or self.t % K == 0 if rule == "printed" else (self.t - 1) % K == 0


class Normalization(_Full):
    """Section 1, S x I_m: sqrt(m) G Diag_v(||g_j||^2)^(-1/2)."""

    def direction(self, G, like=None):
        columns = [np.sqrt(self.m) * G[:, j] / np.sqrt(np.sum(G[:, j] ** 2)) for j in range(self.n)]
        return np.stack(columns, axis=1)


class Whitening(_Full):
    """Section 1, I_n x M: sqrt(n) (G G^T)^(-1/2) G."""

    def __init__(self, W, *, solver="newton_schulz", iterations=5, **rest):
        super().__init__(W, **rest)
        self.solver, self.iterations = solver, iterations

    def direction(self, G, like=None):
        return np.sqrt(self.n) * whiten(G, self.solver, self.iterations)


class SWAN(Whitening):
    """Appendix B.7: every row standardised, then whitened, without sqrt(n)."""

    def direction(self, G, like=None):
        rows = []
        for i in range(self.m):
            mean = np.sum(G[i]) / self.n
            rows.append((G[i] - mean) / np.sqrt(np.sum((G[i] - mean) ** 2) / self.n))
        return whiten(np.stack(rows), self.solver, self.iterations)


class Muon(_Full):
    """Appendix B.9 (nesterov=False, "newton_schulz", "none"), and the reference implementation (the defaults)."""

    def __init__(
        self,
        W,
        *,
        momentum=0.95,
        nesterov=True,
        orthogonalization="quintic",
        ns_steps=5,
        adjust_lr_fn="original",
        eps=1e-7,
        **rest,
    ):
        super().__init__(W, **rest)
        self.momentum, self.nesterov, self.eps = momentum, nesterov, eps
        self.orthogonalization, self.ns_steps, self.adjust_lr_fn = orthogonalization, ns_steps, adjust_lr_fn
        self.m_t = self.zeros(self.m, self.n)

    def direction(self, G, like=None):
        self.m_t = self.average(self.m_t, G, self.momentum)
        X = self.average(G, self.m_t, 1 - self.momentum) if self.nesterov else self.m_t
        if self.orthogonalization == "quintic":
            X = quintic(X, self.ns_steps, self.eps)
        else:
            X = whiten(X, self.orthogonalization, self.ns_steps)
        rows, columns = (self.n, self.m) if self.transposed else (self.m, self.n)
        factors = {
            "original": np.sqrt(max(1, rows / columns)),
            "match_rms_adamw": 0.2 * np.sqrt(max(rows, columns)),
            "none": 1,
        }
        return factors[self.adjust_lr_fn] * X


def trusted(W, update):
    """phi(||W||) update / ||update||_F with phi(x) = x; the factor is 1 where the weight vanishes."""
    norm = np.linalg.norm(W)
    return (norm if norm > 0 else 1.0) * update / np.linalg.norm(update)


class LARS(_Full):
    """Appendix B.10."""

    orient = False

    def __init__(self, W, *, momentum=0.9, **rest):
        super().__init__(W, **rest)
        self.momentum = momentum
        self.m_t = self.zeros(self.m, self.n)

    def direction(self, G, like=None):
        self.m_t = self.average(self.m_t, G, self.momentum)
        return trusted(self._W, self.m_t)


class LAMB(_Full):
    """Appendix E.5: the normalisation of Lars, applied to Adam's update (You et al. 2020, Algorithm 2)."""

    orient = False

    def __init__(self, W, *, betas=(0.9, 0.999), eps=1e-6, bias_correction=True, **rest):
        super().__init__(W, **rest)
        self.betas, self.eps, self.bias_correction = betas, eps, bias_correction
        self.m_t, self.v_t = self.zeros(self.m, self.n), self.zeros(self.m, self.n)

    def direction(self, G, like=None):
        self.m_t = self.average(self.m_t, G, self.betas[0])
        self.v_t = self.average(self.v_t, G**2, self.betas[1])
        m_hat, v_hat = self.m_t, self.v_t
        if self.bias_correction:
            m_hat, v_hat = m_hat / (1 - self.betas[0] ** self.t), v_hat / (1 - self.betas[1] ** self.t)
        return trusted(self._W, m_hat / (np.sqrt(v_hat) + self.eps))


class Shampoo(_Full):
    """Algorithm 5; with beta the averages of later versions, with power=0.5 the root that belongs to
    L x R / Trace(L) (Morwani et al. 2024). With momentum the average of the gradients is preconditioned, as in SOAP;
    L and R see the gradients themselves."""

    def __init__(
        self,
        W,
        *,
        power=0.25,
        beta=None,
        eps=1e-6,
        update_interval=1,
        update_times="printed",
        momentum=0.0,
        **rest,
    ):
        super().__init__(W, **rest)
        self.momentum, self.m_t = momentum, self.zeros(self.m, self.n)
        self.power, self.beta, self.K, self.update_times = power, beta, update_interval, update_times
        self.L, self.R = eps * np.eye(self.m), eps * np.eye(self.n)

    def direction(self, G, like=None):
        if self.beta is None:
            self.L, self.R = self.L + G @ G.T, self.R + G.T @ G
        else:
            self.L = self.average(self.L, G @ G.T, self.beta)
            self.R = self.average(self.R, G.T @ G, self.beta)
        if self.is_update(self.K, self.update_times):
            self.L_root, self.R_root = matrix_power(self.L, -self.power), matrix_power(self.R, -self.power)
            if self.power == 0.5:
                self.L_root = np.sqrt(np.trace(self.L)) * self.L_root
        self.m_t = self.average(self.m_t, G, self.momentum)
        return self.L_root @ self.m_t @ self.R_root


class EigenAdam(_Full):
    """Algorithm 7: momentum is kept in the original space."""

    def __init__(
        self,
        W,
        *,
        betas=(0.9, 0.9, 0.999),
        update_interval=200,
        update_times="printed",
        bias_correction=False,
        eps=1e-8,
        **rest,
    ):
        super().__init__(W, **rest)
        self.betas, self.eps, self.bias_correction = betas, eps, bias_correction
        self.K, self.update_times = update_interval, update_times
        self.Q, self.U = self.zeros(self.m, self.m), None
        self.m_t, self.v_t = self.zeros(self.m, self.n), self.zeros(self.m, self.n)

    def direction(self, G, like=None):
        beta1, beta2, beta3 = self.betas
        self.Q = self.average(self.Q, G @ G.T, beta3)
        self.m_t = self.average(self.m_t, G, beta1)
        if self.is_update(self.K, self.update_times):
            self.U = eigenbasis(self.Q, like["U"] if like else None)
        m_rotated = self.U.T @ self.m_t
        self.v_t = self.average(self.v_t, (self.U.T @ G) ** 2, beta2)
        c = correction(self.t, beta1, beta2) if self.bias_correction else 1.0
        return c * self.U @ (m_rotated / (np.sqrt(self.v_t) + self.eps))


class SOAP(_Full):
    """Algorithm 6."""

    def __init__(
        self,
        W,
        *,
        betas=(0.9, 0.9, 0.999),
        update_interval=200,
        update_times="printed",
        bias_correction=False,
        eps=1e-8,
        **rest,
    ):
        super().__init__(W, **rest)
        self.betas, self.eps, self.bias_correction = betas, eps, bias_correction
        self.K, self.update_times = update_interval, update_times
        self.L, self.R = self.zeros(self.m, self.m), self.zeros(self.n, self.n)
        self.U_L, self.U_R = None, None
        self.m_t = self.zeros(self.m, self.n)
        self.start_second_moment()

    def start_second_moment(self):
        self.v_t = self.zeros(self.m, self.n)

    def second_moment(self, G_rotated):
        """The divisor of the rotated momentum."""
        self.v_t = self.average(self.v_t, G_rotated**2, self.betas[1])
        return np.sqrt(self.v_t) + self.eps

    def accumulate(self, G):
        self.L = self.average(self.L, G @ G.T, self.betas[2])
        self.R = self.average(self.R, G.T @ G, self.betas[2])

    def take_bases(self, like):
        self.U_L = eigenbasis(self.L, like["U_L"] if like else None)
        self.U_R = eigenbasis(self.R, like["U_R"] if like else None)

    def adam(self, G, t, bias_correction):
        self.m_t = self.average(self.m_t, G, self.betas[0])
        m_rotated = self.U_L.T @ self.m_t @ self.U_R
        omega = m_rotated / self.second_moment(self.U_L.T @ G @ self.U_R)
        c = correction(t, *self.betas[:2]) if bias_correction else 1.0
        return c * self.U_L @ omega @ self.U_R.T

    def direction(self, G, like=None):
        self.accumulate(G)
        if self.is_update(self.K, self.update_times):
            self.take_bases(like)
        return self.adam(G, self.t, self.bias_correction)


class SOAPPublished(SOAP):
    """SOAP as published with arXiv 2409.11321.

    The first step only finds the bases. After every later step L and R are averaged, and after each K-th of these
    steps the bases make one power step from the columns sorted by their estimated eigenvalues; v is sorted along.
    """

    def direction(self, G, like=None):
        updates = self.t - 1
        if updates == 0:
            self.accumulate(G)
            self.take_bases(like)
            return np.zeros_like(G)
        D = self.adam(G, updates, True)
        self.accumulate(G)
        if updates % self.K == 0:
            self.U_L, rows = self.power_step(self.L, self.U_L)
            self.U_R, columns = self.power_step(self.R, self.U_R)
            self.sort_second_moment(rows, columns)
        return D

    def power_step(self, M, U):
        estimates = np.array([U[:, j] @ M @ U[:, j] for j in range(U.shape[1])])
        order = np.argsort(-estimates)
        return np.linalg.qr(M @ U[:, order])[0], order

    def sort_second_moment(self, rows, columns):
        self.v_t = self.v_t[rows, :][:, columns]


class SOAPFactored(SOAP):
    """Adafactor in Shampoo's eigenspace: as SOAP, with the second moment a c^T / sum(a)."""

    def start_second_moment(self):
        self.a, self.c = self.zeros(self.m), self.zeros(self.n)

    def second_moment(self, G_rotated):
        self.a = self.average(self.a, np.sum(G_rotated**2, axis=1), self.betas[1])
        self.c = self.average(self.c, np.sum(G_rotated**2, axis=0), self.betas[1])
        V = np.outer(self.a, self.c) / np.sum(self.a)
        return np.sqrt(V) + self.eps


class SOAPFactoredPublished(SOAPFactored, SOAPPublished):
    """The factored second moment in SOAP's published scheme; a and c are sorted as v is."""

    def sort_second_moment(self, rows, columns):
        self.a, self.c = self.a[rows], self.c[columns]

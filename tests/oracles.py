"""Independent oracles: 4-bit Shampoo in plain numpy float64, written from the equations alone.

Source: Wang, Zhou, Li, Huang, "4-bit Shampoo for Memory-Efficient Network Training", NeurIPS 2024, arXiv 2405.18144,
called "the paper" below.
Nothing here imports the library. Arithmetic is float64; what the paper stores in float32 (block scales, eigenvalues,
the diagonal of the roots) is rounded to float32 when it is stored. Code tables are float64 values.
"""

import math

import numpy as np

# ---------------------------------------------------------------------------------------------------- quantizer


def f32(x):
    """`x` as it comes back from a float32 store."""
    return np.asarray(x, dtype=np.float32).astype(np.float64)


def linear2(bits):
    """Linear-2 table (paper, section 2.2 and App. C), ascending.

    R(j) = -(-1 + 2j/(2^b - 1))^2 for j < 2^(b-1) - 1, 0 at j = 2^(b-1) - 1, +(-1 + 2j/(2^b - 1))^2 above.
    """
    top = 2**bits - 1
    zero = 2 ** (bits - 1) - 1
    table = []
    for j in range(top + 1):
        square = (2 * j - top) ** 2 / top**2
        table.append(-square if j < zero else 0.0 if j == zero else square)
    return np.array(table)


def dynamic_tree(bits):
    """Dynamic tree table (paper, App. C), ascending.

    {0, 1} and +-q_k 10^-E with bits = 2 + E + F, q_k = (p_k + p_(k+1)) / 2, p_j = 0.9 j / 2^F + 0.1, 0 <= k < 2^F.
    """
    table = [0.0, 1.0]
    for E in range(bits - 1):
        count = 2 ** (bits - 2 - E)
        p = [0.9 * j / count + 0.1 for j in range(count + 1)]
        for k in range(count):
            q = (p[k] + p[k + 1]) / 2 * 10.0**-E
            table += [q, -q]
    return np.array(sorted(table))


def nearest(x, table):
    """Codes I(x) = argmin_j |x - R(j)| (paper, section 2.2); a tie goes to the lower code."""
    return np.argmin(np.abs(np.asarray(x, dtype=np.float64)[..., None] - table), axis=-1)


def quantize_rows(x, table, block=64):
    """D(Q(x)): block-wise absmax quantization along the rows of a matrix (paper, section 2.2), dequantized.

    A block never crosses a row and the last one of a row may be short. One float32 absmax per block; a block of zeros
    gives zeros.
    """
    x = np.asarray(x, dtype=np.float64)
    out = np.zeros_like(x)
    for start in range(0, x.shape[1], block):
        part = x[:, start : start + block]
        scale = f32(np.abs(part).max(axis=1, keepdims=True))
        codes = nearest(part / np.where(scale > 0, scale, 1.0), table)
        out[:, start : start + block] = np.where(scale > 0, table[codes] * scale, 0.0)
    return out


# ---------------------------------------------------------------------------------------------- 4-bit Shampoo


def bjorck(V, steps):
    """Orthogonal rectification, `steps` times V <- 1.5 V - 0.5 V V^T V (paper, Eq. 2)."""
    for _ in range(steps):
        V = 1.5 * V - 0.5 * V @ (V.T @ V)
    return V


def qr_iteration(A, V):
    """P = QR(A V) once, the paper's warm-started "randomized SVD" (App. B, Eq. 4), with diag(P^T A P).

    Signs are those of LAPACK's Householder QR, left as they are: linear-2 is not symmetric, so a sign changes codes.
    """
    P, _ = np.linalg.qr(A @ V)
    return P, np.diag(P.T @ A @ P)


def preconditioner_update(eigenvalues, rows, M, beta=0.95, t1=1):
    """Algorithm 1 (PU) on dequantized state: new (eigenvalues, eigenvectors as ROWS), not yet stored.

    `rows` is D(Q(V^T)): row i is eigenvector i, because every eigenvector is quantized on its own.
    A = beta V Lambda V^T + (1 - beta) M with V rectified t1 times.
    """
    V = bjorck(rows.T, t1)
    A = beta * (V * eigenvalues) @ V.T + (1 - beta) * M
    P, new_eigenvalues = qr_iteration(A, V)
    return new_eigenvalues, P.T


def inverse_root_update(eigenvalues, rows, eps=1e-6, t2=4):
    """Algorithm 2 (PIRU) on dequantized state: V (Lambda + max(lambda) eps I)^(-1/4) V^T, V rectified t2 times."""
    V = bjorck(rows.T, t2)
    return (V * (eigenvalues + eigenvalues.max() * eps) ** -0.25) @ V.T


def store_root(root, store):
    """Lines 4 and 5 of Algorithm 2 and back: float32 diagonal a, and D(Q(root - Diag(a))) with a zero diagonal.

    The off-diagonal square is stored row by row, so what comes back is slightly unsymmetric.
    """
    a = np.diag(root)
    return np.diag(f32(a)) + store(root - np.diag(a))


class EigenFactor:
    """Compressed state of one side in Algorithm 3: eigenvalues, eigenvectors (rows), inverse 4th root."""

    def __init__(self, order, store, *, beta, eps, t1, t2):
        self.store, self.beta, self.eps, self.t1, self.t2 = store, beta, eps, t1, t2
        self.eigenvalues = f32(np.full(order, eps))
        self.rows = store(np.eye(order))
        self.root = store_root(np.eye(order), store)

    def update(self, M):
        eigenvalues, rows = preconditioner_update(self.eigenvalues, self.rows, M, self.beta, self.t1)
        self.eigenvalues, self.rows = f32(eigenvalues), self.store(rows)

    def refresh(self):
        self.root = store_root(inverse_root_update(self.eigenvalues, self.rows, self.eps, self.t2), self.store)


class DenseFactor:
    """State of one side in Algorithm 4, nothing rounded: L and (L + lambda_max eps I)^(-1/4), the root by eigh."""

    def __init__(self, order, *, beta, eps):
        self.beta, self.eps = beta, eps
        self.statistic = eps * np.eye(order)
        self.root = np.eye(order)

    def update(self, M):
        self.statistic = self.beta * self.statistic + (1 - self.beta) * M

    def refresh(self):
        self.root = inverse_root(self.statistic, 4, self.eps)


def chunks(size, max_dim):
    """ceil(size / max_dim) equal chunks as (slice, nominal length); the last slice may be shorter (no padding here)."""
    length = math.ceil(size / math.ceil(size / max_dim))
    return [(slice(i, min(i + length, size)), length) for i in range(0, size, length)]


def shampoo_4bit(
    param,
    grads,
    *,
    base,
    lr,
    T1,
    T2,
    beta=0.95,
    eps=1e-6,
    t1=1,
    t2=4,
    block=64,
    bits=4,
    betas=(0.9, 0.999),
    adam_eps=1e-8,
    weight_decay=0.0,
    momentum=0.9,
    max_dim=1200,
    min_quant_size=4096,
):
    """Algorithm 3 of the paper (Algorithm 4 for bits=32) on one parameter: list of the parameter after each step.

    For t = 1, 2, ...: if t % T1 == 0, PU on both sides with G G^T and G^T G; if t % T2 == 0, PIRU on both sides;
    Ghat = Lhat G Rhat with the roots as dequantized, scaled to ||G||_F (exact ratio, zeros stay zeros), and then the
    base optimizer F, "adamw" or "sgd", on the result.

    The parameter loses its dimensions of size 1 and is seen as (first, rest); with rank <= 1, F alone. Sides above
    `max_dim` are cut into equal chunks, each block has its own factors, and the ratio is taken on the whole parameter.
    A factor of order n with n * n < min_quant_size follows the same algorithm with its matrices kept in float32
    (paper, App. G). Other `bits` than 4 and 32 are linear-2 tables of that many bits.
    """
    param = np.array(param, dtype=np.float64)
    shape = tuple(d for d in param.shape if d > 1)
    matrix_shape = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else None

    def quantize(x):
        return quantize_rows(x, linear2(bits), block)

    def factor(part, length):
        order = part.stop - part.start
        if bits == 32:
            return DenseFactor(order, beta=beta, eps=eps)
        store = quantize if length * length >= min_quant_size else f32
        return EigenFactor(order, store, beta=beta, eps=eps, t1=t1, t2=t2)

    blocks = []
    if matrix_shape:
        for row, row_length in chunks(matrix_shape[0], max_dim):
            for column, column_length in chunks(matrix_shape[1], max_dim):
                blocks.append((row, column, factor(row, row_length), factor(column, column_length)))

    base_step = {"adamw": AdamW(lr, betas, adam_eps, weight_decay), "sgd": SGD(lr, momentum, weight_decay)}[base]
    history = []
    for t, grad in enumerate(grads, start=1):
        grad = np.asarray(grad, dtype=np.float64)
        if matrix_shape:
            G = grad.reshape(matrix_shape)
            Ghat = np.zeros_like(G)
            for row, column, left, right in blocks:
                part = G[row, column]
                if t % T1 == 0:
                    left.update(part @ part.T)
                    right.update(part.T @ part)
                if t % T2 == 0:
                    left.refresh()
                    right.refresh()
                Ghat[row, column] = left.root @ part @ right.root
            norm = np.linalg.norm(Ghat)
            if norm > 0:
                Ghat = Ghat * (np.linalg.norm(G) / norm)
            grad = Ghat.reshape(param.shape)
        param = base_step(param, grad)
        history.append(param)
    return history


class AdamW:
    """AdamW with decoupled decay and bias correction, as torch.optim.AdamW."""

    def __init__(self, lr, betas, eps, weight_decay):
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.t, self.m, self.v = 0, 0.0, 0.0

    def __call__(self, param, grad):
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * grad
        self.v = b2 * self.v + (1 - b2) * grad**2
        m = self.m / (1 - b1**self.t)
        v = self.v / (1 - b2**self.t)
        return param * (1 - self.lr * self.weight_decay) - self.lr * m / (np.sqrt(v) + self.eps)


class SGD:
    """SGD with momentum, no dampening, decay added to the (preconditioned) gradient, as torch.optim.SGD."""

    def __init__(self, lr, momentum, weight_decay):
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.buffer = 0.0

    def __call__(self, param, grad):
        self.buffer = self.momentum * self.buffer + grad + self.weight_decay * param
        return param - self.lr * self.buffer


# ---------------------------------------------------------------------------------- roots, errors, test matrices


def inverse_root(A, p=4, eps=0.0, clamp=False):
    """A^(-1/p) of a symmetric A by eigh: (A + lambda_max eps I)^(-1/p), as in Algorithms 2 and 4.

    With clamp=True the eigenvalues are max(lambda, eps lambda_max) instead of lambda + eps lambda_max.
    """
    lam, V = np.linalg.eigh(np.asarray(A, dtype=np.float64))
    lam = np.maximum(lam, eps * lam.max()) if clamp else lam + eps * lam.max()
    return (V * lam ** (-1.0 / p)) @ V.T


def root_error(A, Ahat_root, p=4, eps=0.0):
    """(NRE, AE) of an approximate A^(-1/p) (paper, section 3.1 and Table 1), F the exact and H the approximate root.

    NRE = ||F - H||_F / ||F||_F; AE = angle between F and H as vectors, in degrees.
    """
    F, H = inverse_root(A, p, eps), np.asarray(Ahat_root, dtype=np.float64)
    nre = np.linalg.norm(F - H) / np.linalg.norm(F)
    cosine = np.sum(F * H) / (np.linalg.norm(F) * np.linalg.norm(H))
    return float(nre), float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))


def random_orthogonal(order, rng):
    """Q of the QR of a Gaussian matrix."""
    return np.linalg.qr(rng.standard_normal((order, order)))[0]


def paper_matrix(order=1200, large=1150, ratio=1000.0, seed=0):
    """(A, U, lam) with A = U Diag(lam) U^T: the synthetic matrix A2 of the paper's Table 1.

    U random orthogonal, `large` eigenvalues equal to 1 and the rest to 1 / ratio. The paper says "two distinct
    eigenvalues" only; ratio 1000 with 1150 of 1200 large reproduces its linear-2 and dynamic tree rows.
    """
    U = random_orthogonal(order, np.random.default_rng(seed))
    lam = np.where(np.arange(order) < large, 1.0, 1.0 / ratio)
    return (U * lam) @ U.T, U, lam


def ema_root_stream(order=384, columns=96, updates=100, condition=3e4, beta=0.95, eps=1e-6, p=4, seed=0):
    """Yields (M_t, A_t, X_t) for t = 1 .. updates: noisy statistics, their exact average, its exact root.

    M_t = G G^T with G = C^(1/2) Z / sqrt(columns), Z Gaussian [order, columns], C of log-spaced spectrum 1 ..
    1 / condition in a random basis; A_t is the mean of M_1 .. M_t with weights beta^age;
    X_t = V max(lambda, eps lambda_max)^(-1/p) V^T.
    """
    rng = np.random.default_rng(seed)
    U = random_orthogonal(order, rng)
    half = (U * np.sqrt(np.geomspace(1.0, 1.0 / condition, order))) @ U.T
    total, weights = 0.0, 0.0
    for _ in range(updates):
        G = half @ rng.standard_normal((order, columns)) / np.sqrt(columns)
        M = G @ G.T
        total, weights = beta * total + M, beta * weights + 1
        A = total / weights
        yield M, A, inverse_root(A, p, eps, clamp=True)

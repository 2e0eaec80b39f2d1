"""The scan's kernels in Triton. Launched by ``triton``, which has the meaning of every argument's shape.

A program has one sequence, ``BD`` channels and a span of tokens. Its states are a tile (BN, BD) in registers; forward,
channels are along the lanes of a warp, so that a sum over states stays in a thread. It goes through its tokens one by
one: no parallel scan along L, which costs three times the instructions.

Legend: L tokens, N states, BN the power of two from N on, U tokens of an unrolled chunk, K tokens between kept states.
Decays are powers of two: A comes multiplied by log₂e, which saves a product for every state of every token.
"""

# No postponed annotations here: Triton reads them.
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def inverse(x):
    """1/x for x in [1, 3]: a division minds numbers that are very large or small, which costs as much again."""
    r = tl.rsqrt(x)
    return r * r


@triton.jit
def softplus(x):
    """log(1 + eˣ) = max(x, 0) + 2 artanh(e/(2 + e)), e = e^−|x|. To a few roundings also where it is small, which
    log(1 + e) is not; above 20 it is x."""
    e = exp(-tl.abs(x))
    r = e * inverse(2 + e)  # at most 1/3
    s = r * r
    # Chebyshev's fit of artanh(r)/r in r² for r ≤ 1/3: relative error 1.6e-8, a quarter of a rounding.
    p = 1.0 + s * (0.33333320 + s * (0.20003780 + s * (0.14118310 + s * 0.13425749)))
    return tl.where(x > 0, x, 0.0) + 2 * r * p


@triton.jit
def sigmoid(x):
    e = exp(-tl.abs(x))
    r = inverse(1 + e)
    return tl.where(x < 0, e * r, r)


@triton.jit
def row(rows, at):
    """Numbers in float32. What lies beyond the end is not masked but read from the last place: a lane that has nothing
    to do does what its neighbour does, and does not write."""
    return tl.load(rows + at).to(tl.float32)


@triton.jit
def vector(rows, n, N: tl.constexpr):
    """A token's B or C; zero for states that there are not."""
    if n.shape[0] == N:
        found = tl.load(rows + n)
    else:
        found = tl.load(rows + n, mask=n < N, other=0.0)
    return found


@triton.jit
def advanced(h, A2, delta, u, B):
    return tl.exp2(delta[None, :] * A2) * h + u[None, :] * B[:, None]


@triton.jit
def place(L, channels, span, BD: tl.constexpr):
    """Block of channels, sequence, span, spans, first and last token of this program."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, BD)
    spans = tl.cdiv(L, span)
    s = (pid // blocks) % spans
    begin = s * span
    return (pid % blocks).to(tl.int32), pid // (blocks * spans), s, spans, begin, tl.minimum(begin + span, L)


@triton.jit
def lanes(block, channels, N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """This program's channels, those of them that it reads, its states."""
    d = block * BD + tl.arange(0, BD)
    return d, tl.minimum(d, channels - 1), tl.arange(0, BN)


@triton.jit
def decays(A, n, d, channels, N: tl.constexpr):
    """A log₂e, (BN, BD)"""
    mask = (n < N)[:, None] & (d < channels)[None, :]
    return tl.load(A + n[:, None] * channels + d[None, :], mask=mask, other=0.0) * LOG2E


@triton.jit
def state_at(row, n, d, channels, N: tl.constexpr):
    """Offsets into rows of states (…, N, D), and their mask."""
    return (row * N + n[:, None]) * channels + d[None, :], (n < N)[:, None] & (d < channels)[None, :]


@triton.jit
def forward_token(h, A2, x, dt, z, B, C, y, starts, bias, skip, d, at, n, channels, N: tl.constexpr):
    """One token: its row of y is written, the state after it returned."""
    delta = softplus(row(dt, at) + bias)
    x_row = row(x, at)
    if starts is not None:  # a state that is not finite would outlast a product with 0
        h = tl.where(tl.load(starts) != 0, 0.0, h)
    h = advanced(h, A2, delta, delta * x_row, vector(B, n, N))
    out = tl.sum(h * vector(C, n, N)[:, None], 0) + skip * x_row
    if z is not None:
        z_row = row(z, at)
        out *= z_row * sigmoid(z_row)
    tl.store(y + d, out.to(y.dtype.element_ty), mask=d < channels)
    return h


@triton.jit
def forward_kernel(
    x, dt, z, B, C, A, D, bias, first, starts, y, last, kept,
    x_b, x_t, dt_b, dt_t, z_b, z_t, L, channels, span,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, U: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    block, b, s, spans, begin, end = place(L, channels, span, BD)
    d, at, n = lanes(block, channels, N, BN, BD)
    A2 = decays(A, n, d, channels, N)
    skip = row(D, at)
    raw_bias = tl.zeros([BD], tl.float32) if bias is None else row(bias, at)
    if first is None:
        h = tl.zeros([BN, BD], tl.float32)
    else:
        to, mask = state_at(b * spans + s, n, d, channels, N)
        h = tl.load(first + to, mask=mask, other=0.0)
    x += b * x_b + begin * x_t
    dt += b * dt_b + begin * dt_t
    B += (b * L + begin) * N
    C += (b * L + begin) * N
    y += (b * L + begin) * channels
    if z is not None:
        z += b * z_b + begin * z_t
    if starts is not None:
        starts += b * L + begin
    for block_start in range(begin, end, K):
        if kept is not None:
            to, mask = state_at(b * tl.cdiv(L, K) + block_start // K, n, d, channels, N)
            tl.store(kept + to, h, mask=mask)
        tokens = tl.minimum(K, end - block_start).to(tl.int32)
        for _ in range(tokens // U):
            for _k in tl.static_range(U):
                h = forward_token(h, A2, x, dt, z, B, C, y, starts, raw_bias, skip, d, at, n, channels, N)
                x += x_t
                dt += dt_t
                B += N
                C += N
                y += channels
                if z is not None:
                    z += z_t
                if starts is not None:
                    starts += 1
        for _ in range(tokens % U):
            h = forward_token(h, A2, x, dt, z, B, C, y, starts, raw_bias, skip, d, at, n, channels, N)
            x += x_t
            dt += dt_t
            B += N
            C += N
            y += channels
            if z is not None:
                z += z_t
            if starts is not None:
                starts += 1
    if s == spans - 1:
        to, mask = state_at(b, n, d, channels, N)
        tl.store(last + to, h, mask=mask)


@triton.jit
def ends_kernel(
    x, dt, B, A, bias, starts, ends, sums,
    x_b, x_t, dt_b, dt_t, L, channels, span,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """The state after each span if the one before it were zero, and the span's sum of Δ."""
    block, b, s, spans, begin, end = place(L, channels, span, BD)
    d, at, n = lanes(block, channels, N, BN, BD)
    A2 = decays(A, n, d, channels, N)
    raw_bias = tl.zeros([BD], tl.float32) if bias is None else row(bias, at)
    h, total = tl.zeros([BN, BD], tl.float32), tl.zeros([BD], tl.float32)
    x += b * x_b + begin * x_t
    dt += b * dt_b + begin * dt_t
    B += (b * L + begin) * N
    if starts is not None:
        starts += b * L + begin
    tokens = (end - begin).to(tl.int32)
    for i in range(0, tokens, U):
        for k in tl.static_range(U):
            t = tl.minimum(i + k, tokens - 1).to(tl.int64)
            delta = tl.where(i + k < tokens, softplus(row(dt + t * dt_t, at) + raw_bias), 0.0)
            if starts is not None:
                h = tl.where((tl.load(starts + t) != 0) & (i + k < tokens), 0.0, h)
            h = advanced(h, A2, delta, delta * row(x + t * x_t, at), vector(B + t * N, n, N))
            total += delta
    to, mask = state_at(b * spans + s, n, d, channels, N)
    tl.store(ends + to, h, mask=mask)
    tl.store(sums + (b * spans + s) * channels + d, total, mask=d < channels)


@triton.jit
def carry_kernel(
    A, sums, local, first, resets, carried, channels, spans,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Hands a state on over the spans, or, ``BACK``, its gradient from the last to the first: what goes into each span
    is written to ``carried``, what comes out of it is that times its decay plus ``local``."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, BD)
    block, b = (pid % blocks).to(tl.int32), pid // blocks
    d, at, n = lanes(block, channels, N, BN, BD)
    A2 = decays(A, n, d, channels, N)
    if first is None:
        h = tl.zeros([BN, BD], tl.float32)
    else:
        to, mask = state_at(b, n, d, channels, N)
        h = tl.load(first + to, mask=mask, other=0.0)
    for i in range(spans):
        part = b * spans + (spans - 1 - i if BACK else i)
        to, mask = state_at(part, n, d, channels, N)
        tl.store(carried + to, h, mask=mask)
        if resets is not None:
            h = tl.where(tl.load(resets + part) != 0, 0.0, h)
        h = tl.exp2(row(sums + part * channels, at)[None, :] * A2) * h
        h += tl.load(local + to, mask=mask, other=0.0)


@triton.jit
def output_gradient(dy, dy_at, z, z_at, live):
    """Gradient of y before the gate, and what its own value is multiplied by to give the gradient of z."""
    ds = tl.where(live, row(dy, dy_at), 0.0)
    d_gate = ds
    if z is not None:  # no early return: what follows one is compiled all the same
        z_row = row(z, z_at)
        gate = sigmoid(z_row)
        d_gate = ds * gate * (1 + z_row * (1 - gate))
        ds = ds * z_row * gate
    return ds, d_gate


@triton.jit
def back_ends_kernel(
    dt, z, C, A, bias, starts, dy, ends, sums,
    dt_b, dt_t, z_b, z_t, dy_b, dy_t, L, channels, span,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before each span if that of the one after it were zero, and the span's sum of Δ."""
    block, b, s, spans, begin, end = place(L, channels, span, BD)
    d, at, n = lanes(block, channels, N, BN, BD)
    A2 = decays(A, n, d, channels, N)
    raw_bias = tl.zeros([BD], tl.float32) if bias is None else row(bias, at)
    dh, total = tl.zeros([BN, BD], tl.float32), tl.zeros([BD], tl.float32)
    dt += b * dt_b + begin * dt_t
    dy += b * dy_b + begin * dy_t
    C += (b * L + begin) * N
    if z is not None:
        z += b * z_b + begin * z_t
    if starts is not None:
        starts += b * L + begin
    tokens = (end - begin).to(tl.int32)
    for i in range(0, tokens, U):
        for k in tl.static_range(U):
            live = i + k < tokens
            t = tl.maximum(tokens - 1 - i - k, 0).to(tl.int64)
            delta = tl.where(live, softplus(row(dt + t * dt_t, at) + raw_bias), 0.0)
            ds, _ = output_gradient(dy + t * dy_t, at, None if z is None else z + t * z_t, at, live)
            dh = tl.exp2(delta[None, :] * A2) * (dh + vector(C + t * N, n, N)[:, None] * ds[None, :])
            if starts is not None:
                dh = tl.where((tl.load(starts + t) != 0) & live, 0.0, dh)
            total += delta
    to, mask = state_at(b * spans + s, n, d, channels, N)
    tl.store(ends + to, dh, mask=mask)
    tl.store(sums + (b * spans + s) * channels + d, total, mask=d < channels)


@triton.jit
def backward_kernel(
    x, dt, z, B, C, A, D, bias, starts, kept, after, dy, scratch,
    dx, d_dt, dz, dB, dC, dA, dD, d_bias, dh0,
    x_b, x_t, dt_b, dt_t, z_b, z_t, dy_b, dy_t, L, channels, span, sequences,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, U: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Goes back through blocks of K tokens: states before each chunk of U are made again from the one that forward
    kept, and put aside in ``scratch``; then, chunk by chunk from the last, its states are made again in registers.
    Within a block 32 bits count its tokens' numbers (``triton._rows_dense``): 64 take three instructions a state more.
    """
    block, b, s, spans, begin, end = place(L, channels, span, BD)
    d, at, n = lanes(block, channels, N, BN, BD)
    A2 = decays(A, n, d, channels, N)
    skip = row(D, at)
    raw_bias = tl.zeros([BD], tl.float32) if bias is None else row(bias, at)
    scratch += tl.program_id(0).to(tl.int64) * ((K // U) * BN * BD)
    aside = scratch + n[:, None] * BD + tl.arange(0, BD)[None, :]
    to, mask = state_at(b * spans + s, n, d, channels, N)
    dh = tl.load(after + to, mask=mask, other=0.0)  # of the state after the token at hand
    sum_A = tl.zeros([BN, BD], tl.float32)
    sum_D, sum_bias = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    blocks_of_K = tl.cdiv((end - begin).to(tl.int32), K)
    for back in range(blocks_of_K):
        t0 = begin + (blocks_of_K - 1 - back) * K
        tokens = tl.minimum(K, end - t0).to(tl.int32)
        chunks = tl.cdiv(tokens, U)
        xs, dts, Bs, Cs = x + b * x_b + t0 * x_t, dt + b * dt_b + t0 * dt_t, B + (b * L + t0) * N, C + (b * L + t0) * N
        dys, zs = dy + b * dy_b + t0 * dy_t, None if z is None else z + b * z_b + t0 * z_t
        new_row, new_vector = (b * L + t0) * channels, ((block * sequences + b) * L + t0) * N
        to, mask = state_at(b * tl.cdiv(L, K) + t0 // K, n, d, channels, N)
        h = tl.load(kept + to, mask=mask, other=0.0)
        for j in range(chunks - 1):
            tl.store(aside + j * (BN * BD), h)
            for k in tl.static_range(U):
                t = tl.minimum(j * U + k, tokens - 1)
                delta = softplus(row(dts, t * dt_t + at) + raw_bias)
                if starts is not None:
                    h = tl.where(tl.load(starts + b * L + t0 + t) != 0, 0.0, h)
                h = advanced(h, A2, delta, delta * row(xs, t * x_t + at), vector(Bs + t * N, n, N))
        tl.store(aside + (chunks - 1) * (BN * BD), h)
        tl.debug_barrier()
        for j_back in range(chunks):
            j = chunks - 1 - j_back
            h = tl.load(aside + j * (BN * BD))
            before = ()
            for k in tl.static_range(U):
                t = tl.minimum(j * U + k, tokens - 1)
                live = j * U + k < tokens
                delta = tl.where(live, softplus(row(dts, t * dt_t + at) + raw_bias), 0.0)
                before = before + (h,)  # what the token before left, if it is of another document too
                if starts is not None:
                    h = tl.where((tl.load(starts + b * L + t0 + t) != 0) & live, 0.0, h)
                h = advanced(h, A2, delta, delta * row(xs, t * x_t + at), vector(Bs + t * N, n, N))
            for k_back in tl.static_range(U):
                i = j * U + (U - 1 - k_back)
                t = tl.minimum(i, tokens - 1)
                live = i < tokens
                out = t * channels + d
                writes = d < tl.where(live, channels, 0)
                writes_n = n < tl.where(live, N, 0)
                raw = row(dts, t * dt_t + at) + raw_bias
                delta = tl.where(live, softplus(raw), 0.0)
                x_row, B_row, C_row = row(xs, t * x_t + at), vector(Bs + t * N, n, N), vector(Cs + t * N, n, N)
                ds, d_gate = output_gradient(dys, t * dy_t + at, zs, t * z_t + at, writes)
                if z is not None:
                    read = tl.sum(h * C_row[:, None], 0) + skip * x_row
                    tl.store(dz + new_row + out, (d_gate * read).to(dz.dtype.element_ty), mask=writes)
                tl.store(dC + new_vector + (t * N + n), tl.sum(h * ds[None, :], 1), mask=writes_n)
                dh += C_row[:, None] * ds[None, :]
                tl.store(dB + new_vector + (t * N + n), tl.sum(dh * (delta * x_row)[None, :], 1), mask=writes_n)
                du = tl.sum(dh * B_row[:, None], 0)
                h = before[U - 1 - k_back]
                dh *= tl.exp2(delta[None, :] * A2)
                of_power = dh * h  # gradient of Δ A
                if starts is not None:
                    start = (tl.load(starts + b * L + t0 + t) != 0) & live
                    # A gradient that is not finite would outlast a product with 0, too.
                    of_power = tl.where(start, 0.0, of_power)
                    dh = tl.where(start, 0.0, dh)
                sum_A += of_power * delta[None, :]
                d_raw = tl.where(live, (tl.sum(of_power * A2, 0) * LN2 + du * x_row) * sigmoid(raw), 0.0)
                sum_bias += d_raw
                sum_D += ds * x_row
                tl.store(d_dt + new_row + out, d_raw.to(d_dt.dtype.element_ty), mask=writes)
                tl.store(dx + new_row + out, (du * delta + ds * skip).to(dx.dtype.element_ty), mask=writes)
        tl.debug_barrier()
    to, mask = state_at(b * spans + s, n, d, channels, N)
    tl.store(dA + to, sum_A, mask=mask)
    to = (b * spans + s) * channels + d
    tl.store(dD + to, sum_D, mask=d < channels)
    if d_bias is not None:
        tl.store(d_bias + to, sum_bias, mask=d < channels)
    if dh0 is not None:
        if s == 0:
            to0, mask = state_at(b, n, d, channels, N)
            tl.store(dh0 + to0, dh, mask=mask)

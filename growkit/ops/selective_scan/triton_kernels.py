"""The scan's kernels in Triton. Launched by ``triton``, which has the meaning of every argument's shape.

A program has one sequence, ``BD`` channels and a span of tokens. Its states are a tile (BN, BD) in registers, channels
along the lanes of a warp, so that a sum over states stays in a thread. It goes through its tokens one by one: no
parallel scan along L, which costs three times the instructions.

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
def softplus(x):
    """log(1 + eˣ) = max(x, 0) + 2 artanh(e/(2 + e)), e = e^−|x|. To a few roundings also where it is small, which
    log(1 + e) is not; above 20 it is x."""
    e = exp(-tl.abs(x))
    r = e / (2 + e)  # at most 1/3
    s = r * r
    # Chebyshev's fit of artanh(r)/r in r² for r ≤ 1/3: relative error 1.6e-8, a quarter of a rounding.
    p = 1.0 + s * (0.33333320 + s * (0.20003780 + s * (0.14118310 + s * 0.13425749)))
    return tl.where(x > 0, x, 0.0) + 2 * r * p


@triton.jit
def sigmoid(x):
    e = exp(-tl.abs(x))
    r = 1 / (1 + e)
    return tl.where(x < 0, e * r, r)


@triton.jit
def wide_row(rows, at, mask):
    """A row of numbers in float32; zero where it is masked."""
    return tl.load(rows + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def time_step(dt, d, mask, bias):
    """Δ before and after its softplus; what is masked has a Δ of zero, over which a state stays as it is."""
    raw = tl.load(dt + d, mask=mask, other=float("-inf")).to(tl.float32) + bias
    return raw, softplus(raw)


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
def up_to(live, index, size):
    """Mask of the indices below ``size``, none of them unless ``live``."""
    return index < tl.where(live, size, 0)


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
def forward_token(h, A2, x, dt, z, B, C, y, starts, bias, skip, d, n, mask_d, mask_n):
    """One token: its row of y is written, the state after it returned."""
    _, delta = time_step(dt, d, mask_d, bias)
    x_row = wide_row(x, d, mask_d)
    B_row, C_row = wide_row(B, n, mask_n), wide_row(C, n, mask_n)
    if starts is not None:  # a state that is not finite would outlast a product with 0
        h = tl.where(tl.load(starts) != 0, 0.0, h)
    h = advanced(h, A2, delta, delta * x_row, B_row)
    out = tl.sum(h * C_row[:, None], 0) + skip * x_row
    if z is not None:
        z_row = wide_row(z, d, mask_d)
        out *= z_row * sigmoid(z_row)
    tl.store(y + d, out.to(y.dtype.element_ty), mask=mask_d)
    return h


@triton.jit
def forward_kernel(
    x, dt, z, B, C, A, D, bias, first, starts, y, last, kept,
    x_b, x_t, dt_b, dt_t, z_b, z_t, B_b, B_t, C_b, C_t, L, channels, span,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, U: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    block, b, s, spans, begin, end = place(L, channels, span, BD)
    d, n = block * BD + tl.arange(0, BD), tl.arange(0, BN)
    mask_d, mask_n = d < channels, n < N
    A2 = decays(A, n, d, channels, N)
    skip = wide_row(D, d, mask_d)
    raw_bias = tl.zeros([BD], tl.float32) if bias is None else wide_row(bias, d, mask_d)
    if first is None:
        h = tl.zeros([BN, BD], tl.float32)
    else:
        at, mask = state_at(b * spans + s, n, d, channels, N)
        h = tl.load(first + at, mask=mask, other=0.0)
    x += b * x_b + begin * x_t
    dt += b * dt_b + begin * dt_t
    B += b * B_b + begin * B_t
    C += b * C_b + begin * C_t
    y += (b * L + begin) * channels
    if z is not None:
        z += b * z_b + begin * z_t
    if starts is not None:
        starts += b * L + begin
    for block_start in range(begin, end, K):
        if kept is not None:
            at, mask = state_at(b * tl.cdiv(L, K) + block_start // K, n, d, channels, N)
            tl.store(kept + at, h, mask=mask)
        tokens = tl.minimum(K, end - block_start).to(tl.int32)
        for _ in range(tokens // U):
            for _k in tl.static_range(U):
                h = forward_token(h, A2, x, dt, z, B, C, y, starts, raw_bias, skip, d, n, mask_d, mask_n)
                x += x_t
                dt += dt_t
                B += B_t
                C += C_t
                y += channels
                if z is not None:
                    z += z_t
                if starts is not None:
                    starts += 1
        for _ in range(tokens % U):
            h = forward_token(h, A2, x, dt, z, B, C, y, starts, raw_bias, skip, d, n, mask_d, mask_n)
            x += x_t
            dt += dt_t
            B += B_t
            C += C_t
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
    x_b, x_t, dt_b, dt_t, B_b, B_t, L, channels, span,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """The state after each span if the one before it were zero, and the span's sum of Δ."""
    block, b, s, spans, begin, end = place(L, channels, span, BD)
    d, n = block * BD + tl.arange(0, BD), tl.arange(0, BN)
    mask_d = d < channels
    A2 = decays(A, n, d, channels, N)
    raw_bias = tl.zeros([BD], tl.float32) if bias is None else wide_row(bias, d, mask_d)
    h, total = tl.zeros([BN, BD], tl.float32), tl.zeros([BD], tl.float32)
    x += b * x_b + begin * x_t
    dt += b * dt_b + begin * dt_t
    B += b * B_b + begin * B_t
    if starts is not None:
        starts += b * L + begin
    for t in range(0, (end - begin).to(tl.int32), U):
        for k in tl.static_range(U):
            live = begin + t + k < end
            _, delta = time_step(dt, d, up_to(live, d, channels), raw_bias)
            x_row, B_row = wide_row(x, d, up_to(live, d, channels)), wide_row(B, n, up_to(live, n, N))
            if starts is not None:
                h = tl.where(tl.load(starts, mask=live, other=0) != 0, 0.0, h)
                starts += 1
            h = advanced(h, A2, delta, delta * x_row, B_row)
            total += delta
            x += x_t
            dt += dt_t
            B += B_t
    at, mask = state_at(b * spans + s, n, d, channels, N)
    tl.store(ends + at, h, mask=mask)
    tl.store(sums + (b * spans + s) * channels + d, total, mask=mask_d)


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
    d, n = block * BD + tl.arange(0, BD), tl.arange(0, BN)
    A2 = decays(A, n, d, channels, N)
    if first is None:
        h = tl.zeros([BN, BD], tl.float32)
    else:
        at, mask = state_at(b, n, d, channels, N)
        h = tl.load(first + at, mask=mask, other=0.0)
    for i in range(spans):
        row = b * spans + (spans - 1 - i if BACK else i)
        at, mask = state_at(row, n, d, channels, N)
        tl.store(carried + at, h, mask=mask)
        if resets is not None:
            h = tl.where(tl.load(resets + row) != 0, 0.0, h)
        h = tl.exp2(wide_row(sums, row * channels + d, d < channels)[None, :] * A2) * h
        h += tl.load(local + at, mask=mask, other=0.0)


@triton.jit
def output_gradient(dy, z, d, mask):
    """Gradient of y before the gate, and what its own value is multiplied by to give the gradient of z."""
    ds = wide_row(dy, d, mask)
    if z is None:
        return ds, ds
    z_row = wide_row(z, d, mask)
    gate = sigmoid(z_row)
    return ds * z_row * gate, ds * gate * (1 + z_row * (1 - gate))


@triton.jit
def back_ends_kernel(
    dt, z, C, A, bias, starts, dy, ends, sums,
    dt_b, dt_t, z_b, z_t, C_b, C_t, dy_b, dy_t, L, channels, span,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before each span if that of the one after it were zero, and the span's sum of Δ."""
    block, b, s, spans, begin, end = place(L, channels, span, BD)
    d, n = block * BD + tl.arange(0, BD), tl.arange(0, BN)
    mask_d = d < channels
    A2 = decays(A, n, d, channels, N)
    raw_bias = tl.zeros([BD], tl.float32) if bias is None else wide_row(bias, d, mask_d)
    dh, total = tl.zeros([BN, BD], tl.float32), tl.zeros([BD], tl.float32)
    for i in range(0, (end - begin).to(tl.int32), U):
        for k in tl.static_range(U):
            t = end - 1 - i - k
            live = t >= begin
            _, delta = time_step(dt + b * dt_b + t * dt_t, d, up_to(live, d, channels), raw_bias)
            z_t_row = None if z is None else z + b * z_b + t * z_t
            ds, _ = output_gradient(dy + b * dy_b + t * dy_t, z_t_row, d, up_to(live, d, channels))
            C_row = wide_row(C + b * C_b + t * C_t, n, up_to(live, n, N))
            dh = tl.exp2(delta[None, :] * A2) * (dh + C_row[:, None] * ds[None, :])
            if starts is not None:
                dh = tl.where(tl.load(starts + b * L + t, mask=live, other=0) != 0, 0.0, dh)
            total += delta
    at, mask = state_at(b * spans + s, n, d, channels, N)
    tl.store(ends + at, dh, mask=mask)
    tl.store(sums + (b * spans + s) * channels + d, total, mask=mask_d)


@triton.jit
def backward_kernel(
    x, dt, z, B, C, A, D, bias, starts, kept, after, dy, scratch,
    dx, d_dt, dz, dB, dC, dA, dD, d_bias, dh0,
    x_b, x_t, dt_b, dt_t, z_b, z_t, B_b, B_t, C_b, C_t, dy_b, dy_t, L, channels, span, sequences,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, U: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Goes back through blocks of K tokens: states before each chunk of U are made again from the one that forward
    kept, and put aside in ``scratch``; then, chunk by chunk from the last, its states are made again in registers."""
    block, b, s, spans, begin, end = place(L, channels, span, BD)
    d, n = block * BD + tl.arange(0, BD), tl.arange(0, BN)
    mask_d, mask_n = d < channels, n < N
    A2 = decays(A, n, d, channels, N)
    skip = wide_row(D, d, mask_d)
    raw_bias = tl.zeros([BD], tl.float32) if bias is None else wide_row(bias, d, mask_d)
    aside = scratch + tl.program_id(0).to(tl.int64) * ((K // U) * BN * BD) + n[:, None] * BD + tl.arange(0, BD)[None, :]
    at, mask = state_at(b * spans + s, n, d, channels, N)
    dh = tl.load(after + at, mask=mask, other=0.0)  # of the state after the token at hand
    sum_A = tl.zeros([BN, BD], tl.float32)
    sum_D, sum_bias = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    x += b * x_b
    dt += b * dt_b
    B += b * B_b
    C += b * C_b
    dy += b * dy_b
    if z is not None:
        z += b * z_b
    if starts is not None:
        starts += b * L
    for back in range(tl.cdiv((end - begin).to(tl.int32), K)):
        t0 = begin + (tl.cdiv((end - begin).to(tl.int32), K) - 1 - back) * K
        chunks = tl.cdiv(tl.minimum(K, end - t0).to(tl.int32), U)
        at, mask = state_at(b * tl.cdiv(L, K) + t0 // K, n, d, channels, N)
        h = tl.load(kept + at, mask=mask, other=0.0)
        for j in range(chunks - 1):
            tl.store(aside + j * (BN * BD), h)
            for k in tl.static_range(U):
                t = t0 + j * U + k
                _, delta = time_step(dt + t * dt_t, d, mask_d, raw_bias)
                x_row, B_row = wide_row(x + t * x_t, d, mask_d), wide_row(B + t * B_t, n, mask_n)
                if starts is not None:
                    h = tl.where(tl.load(starts + t) != 0, 0.0, h)
                h = advanced(h, A2, delta, delta * x_row, B_row)
        tl.store(aside + (chunks - 1) * (BN * BD), h)
        tl.debug_barrier()
        for j_back in range(chunks):
            j = chunks - 1 - j_back
            h = tl.load(aside + j * (BN * BD))
            before = ()
            for k in tl.static_range(U):
                t = t0 + j * U + k
                live = t < end
                _, delta = time_step(dt + t * dt_t, d, up_to(live, d, channels), raw_bias)
                x_row, B_row = (
                    wide_row(x + t * x_t, d, up_to(live, d, channels)),
                    wide_row(B + t * B_t, n, up_to(live, n, N)),
                )
                before = before + (h,)  # what the token before left, if it is of another document too
                if starts is not None:
                    h = tl.where(tl.load(starts + t, mask=live, other=0) != 0, 0.0, h)
                h = advanced(h, A2, delta, delta * x_row, B_row)
            for k_back in tl.static_range(U):
                t = t0 + j * U + (U - 1 - k_back)
                live = t < end
                there = up_to(live, d, channels)
                row = (b * L + t) * channels + d
                raw, delta = time_step(dt + t * dt_t, d, there, raw_bias)
                x_row = wide_row(x + t * x_t, d, there)
                u = delta * x_row
                B_row, C_row = wide_row(B + t * B_t, n, up_to(live, n, N)), wide_row(C + t * C_t, n, up_to(live, n, N))
                ds, d_gate = output_gradient(dy + t * dy_t, None if z is None else z + t * z_t, d, there)
                if z is not None:
                    read = tl.sum(h * C_row[:, None], 0) + skip * x_row
                    tl.store(dz + row, (d_gate * read).to(dz.dtype.element_ty), mask=there)
                part = ((block * sequences + b) * L + t) * N + n
                tl.store(dC + part, tl.sum(h * ds[None, :], 1), mask=up_to(live, n, N))
                dh += C_row[:, None] * ds[None, :]
                tl.store(dB + part, tl.sum(dh * u[None, :], 1), mask=up_to(live, n, N))
                du = tl.sum(dh * B_row[:, None], 0)
                h = before[U - 1 - k_back]
                dh *= tl.exp2(delta[None, :] * A2)
                of_power = dh * h  # gradient of Δ A
                if starts is not None:
                    start = tl.load(starts + t, mask=live, other=0) != 0
                    # A gradient that is not finite would outlast a product with 0, too.
                    of_power = tl.where(start, 0.0, of_power)
                    dh = tl.where(start, 0.0, dh)
                sum_A += of_power * delta[None, :]
                d_raw = (tl.sum(of_power * A2, 0) * LN2 + du * x_row) * sigmoid(raw)
                sum_bias += d_raw
                sum_D += ds * x_row
                tl.store(d_dt + row, d_raw.to(d_dt.dtype.element_ty), mask=there)
                tl.store(dx + row, (du * delta + ds * skip).to(dx.dtype.element_ty), mask=there)
        tl.debug_barrier()
    at, mask = state_at(b * spans + s, n, d, channels, N)
    tl.store(dA + at, sum_A, mask=mask)
    at = (b * spans + s) * channels + d
    tl.store(dD + at, sum_D, mask=mask_d)
    if d_bias is not None:
        tl.store(d_bias + at, sum_bias, mask=mask_d)
    if dh0 is not None:
        if s == 0:
            to, mask = state_at(b, n, d, channels, N)
            tl.store(dh0 + to, dh, mask=mask)

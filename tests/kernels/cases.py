"""Every kernel on random shapes and data against torch in float64; what the kernel must write starts as NaN."""

import math
import random
import struct

import torch

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
NAN = float("nan")
# One rounding to bf16 is at most 2^-8 = 3.9e-3 of the value, and about 1.7e-3 in the root mean square of many.
ROUNDED = 2e-3
# Attention rounds its probabilities to bf16 as well.
ROUNDED_TWICE = 3e-3
FEW = 1000
SINGLE = 1e-5


class Mismatch(Exception):
    pass


def compare(name, got, want, limit):
    """Checks ‖got − want‖ / ‖want‖ and returns it; an element nobody wrote is NaN and fails."""
    got, want = got.double().cpu(), want.double().cpu()
    error = ((got - want).norm() / want.norm().clamp_min(1e-30)).item()
    if got.numel() < FEW:
        limit *= 2
    if not error <= limit:
        raise Mismatch(f"{name}: error {error:.2e}, limit {limit:.0e}, {int(got.isnan().sum())} of {got.numel()} are NaN")
    return error


class Inputs:
    def __init__(self, device, seed):
        self.device = device.torch_device
        self.generator = torch.Generator().manual_seed(seed)
        self.random = random.Random(seed)
        self.round = seed % 1000

    def normal(self, *shape, dtype=BF16, scale=1.0):
        return (torch.randn(*shape, generator=self.generator) * scale).to(dtype).to(self.device)

    def integers(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def poison(self, *shape, dtype=BF16):
        return torch.full(shape, NAN, dtype=dtype, device=self.device)


def rms(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


def rotated(x, positions, inv_freq, scale):
    """x [T, heads, d] in float64; angles rounded to float32, as transformers does."""
    angle = (positions.float()[:, None] * inv_freq.float()[None, :]).double()
    cos, sin = (f(angle)[:, None, :] * scale for f in (torch.cos, torch.sin))
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def norm_block(hidden):
    return min(1024, -(-hidden // 256) * 32)


def gemv_launch(tiles, k, sms):
    """The launch rule of gemv.cu: grid and block."""
    best = None
    for warps in (16, 8, 4) if tiles <= sms or tiles >= 32 * sms else (8, 16, 4):
        if warps > 4 and warps >= 2 * -(-k // 256):
            continue
        grid = min(sms * 16 // warps, 8 * tiles)
        fullest = -(-8 * tiles // grid // 8) * -(-grid // sms)
        if best is None or fullest < best[0]:
            best = fullest, grid, 32 * warps
    return best[1:]


def gemv_batch_launch(tiles, k, sms):
    """The launch rule of gemv_batch.cu."""
    warps = next((w for w in (16, 8) if k > 64 * w), 4)
    return min(sms * 16 // warps, 8 * tiles), 32 * warps


GEMV_FILES = {"gemv": gemv_launch, "gemv_batch": gemv_batch_launch}


def sample_parts(n_known):
    """The rule of sample.cu."""
    return -(-n_known // 1024)


def decode_splits(context, n_kv_heads, n_seqs, sms):
    """The rule of attention_decode.cu."""
    most = sms // (n_kv_heads * n_seqs)
    return max(1, min(most, max(min(most // 2, -(-context // 128)), -(-context // 256))))


DECODE_BLOCK = 256


def embed(d, i, hidden=None, tokens=None):
    hidden, tokens = hidden or i.random.choice([64, 200, 576]), tokens or i.random.randint(1, 9)
    first, rows = i.random.randint(0, 30), i.random.randint(1, 40)
    table, ids = i.normal(rows, hidden), i.integers([i.random.randint(0, 80) for _ in range(tokens)])
    near = i.random.randint(0, rows)
    partial, x = i.poison(tokens, hidden), i.poison(tokens, hidden, dtype=F32)
    # Some are named by the row in which the step before has chosen them.
    chosen = i.integers([i.random.randint(0, 80) for _ in range(4)])
    named, ids = ids.clone(), ids.clone()
    for t in i.random.sample(range(tokens), tokens // 2):
        row = i.random.randint(0, 3)
        named[t], ids[t] = row - (1 << 31), chosen[row]
    # One of them only fills the step up.
    room = max(48, tokens)
    slots, history = i.integers(i.random.sample(range(room), tokens)), i.integers([-1] * room)
    slots[tokens - 1] = -1
    d.launch("embed", "embed", tokens, 128, table[:near].clone(), table[near:].clone(), named, chosen, slots, history, partial, x, hidden, first, near, rows)
    d.synchronize()
    kept = [-1] * room
    for slot, token in list(zip(slots.tolist(), ids.tolist()))[:-1]:
        kept[slot] = token
    if history.tolist() != kept:
        raise Mismatch(f"embed keeps {history.tolist()}, not {kept}")
    want = torch.stack([table[t - first].double() if first <= t < first + rows else torch.zeros(hidden, dtype=F64, device=i.device) for t in ids.tolist()])
    compare("embed x", x.double() + 1, torch.ones_like(x).double(), 0.0)
    return compare("embed", partial.double() + 1, want + 1, 0.0)


def norm(d, i, hidden=None, tokens=None):
    hidden, tokens = hidden or i.random.choice([64, 72, 576, 3584, 9216]), tokens or i.random.randint(1, 5)
    x, partial, weight = i.normal(tokens, hidden, dtype=F32), i.normal(tokens, hidden), i.normal(hidden)
    want = x.double() + partial.double()
    h = i.poison(tokens, hidden)
    d.launch("norm", "add_rms_norm", tokens, norm_block(hidden), partial, x, weight, h, hidden, 1e-6)
    d.synchronize()
    compare("add_rms_norm x", x, want, 1e-7)
    return compare("add_rms_norm h", h, rms(want, weight, 1e-6), ROUNDED)


def tiled(rows):
    """Gate rows over up rows, in the order of host memory: 8 gate rows, their 8 up rows, and so on."""
    return rows.view(2, -1, 8, rows.shape[1]).transpose(0, 1).reshape(rows.shape)


def activation(d, i, width=None, rows=None):
    width, rows = width or i.random.choice([8, 1536, 3000]), rows or i.random.randint(1, 6)
    grid = (-(-width // 2048), rows)
    gate_up, mlp = i.normal(rows, 2 * width), i.poison(rows, width)
    d.launch("activation", "silu_mul", grid, 256, gate_up, mlp, width, width, width)
    d.synchronize()
    gate, up = gate_up.double().chunk(2, -1)
    worst = compare("silu_mul", mlp, torch.nn.functional.silu(gate) * up, ROUNDED)
    wide = i.poison(rows, width + 8)
    d.launch("activation", "silu_mul", grid, 256, tiled(gate_up.T).T.contiguous(), wide, width, width + 8, 8)
    d.synchronize()
    worst = max(worst, compare("silu_mul tiled", wide[:, :width], torch.nn.functional.silu(gate) * up, ROUNDED))
    y, bias = i.normal(rows, width), i.normal(width)
    want = y.double() + bias.double()
    d.launch("activation", "add_bias", grid, 256, y, bias, width)
    d.synchronize()
    worst = max(worst, compare("add_bias", y, want, ROUNDED))
    wanted = sorted(i.random.sample(range(rows), i.random.randint(1, rows)))
    out = i.poison(len(wanted), width)
    d.launch("activation", "gather_rows", (grid[0], len(wanted)), 256, mlp, i.integers(wanted), out, width)
    d.synchronize()
    compare("gather_rows", out, mlp[wanted], 0.0)
    x, y = i.normal(width, dtype=F32), i.poison(width)
    d.launch("activation", "to_bf16_array", grid[0], 256, x, y, width)
    d.synchronize()
    compare("to_bf16_array", y, x.to(BF16), 0.0)
    return worst


def sample(d, i, vocab=None, rows=None):
    vocab, rows = vocab or i.random.choice([5, 1000, 20001]), rows or i.random.randint(1, 3)
    ld = vocab + i.random.randint(0, 50)
    logits = i.normal(rows, ld, dtype=F32, scale=3.0)
    logits[:, vocab:] = 1e9  # padding: never chosen
    if vocab > 100:
        logits[0, [7, 99, vocab - 1]] = 50.0  # a tie goes to the lowest
    logits[-1, 0] = -math.inf
    parts = sample_parts(vocab)
    part = [i.poison(rows, parts, dtype=F32), i.integers([[-1] * parts] * rows), i.poison(rows, parts, dtype=F32)]
    token, (logit, top, total) = i.integers([-1] * rows), [i.poison(rows, dtype=F32) for _ in range(3)]
    d.launch("sample", "sample_partial", (parts, rows), 256, logits, vocab, ld, *part)
    d.launch("sample", "sample_reduce", rows, 32, *part, parts, 1, parts, token, logit, top, total)
    d.synchronize()
    known = logits[:, :vocab].double().cpu()
    want = [int((row == row.max()).nonzero()[0]) for row in known]

    def check(way):
        if token.tolist() != want:
            raise Mismatch(f"{way}: tokens {token.tolist()}, not {want}")
        compare(f"{way} max", top, known.max(-1).values, 0.0)
        compare(f"{way} logit", logit, top, 0.0)
        return compare(f"{way} log_sum_exp", top.double().cpu() + total.double().cpu().log(), known.logsumexp(-1), 1e-6)

    worst = check("sample")
    # The same from two ranks' halves, and from a third that has no token.
    half, joined = vocab // 2, i.integers([[-1] * (3 * rows)] * 3)
    for rank, (first, n) in enumerate([(0, half), (half, vocab - half), (vocab, 0)]):
        parts = sample_parts(n)
        part = [i.poison(rows, max(parts, 1), dtype=F32), i.integers([[-1] * max(parts, 1)] * rows), i.poison(rows, max(parts, 1), dtype=F32)]
        local = logits[:, first:first + n].contiguous()
        if n:
            d.launch("sample", "sample_partial", (parts, rows), 256, local, n, n, *part)
        d.launch("sample", "sample_join", rows, 32, *part, parts, first, joined[rank])
    token.fill_(-1)
    flat = joined.view(-1)
    d.launch("sample", "sample_reduce", rows, 32, flat, flat[rows:], flat[2 * rows:], 3, 3 * rows, 1, token, logit, top, total)
    d.synchronize()
    return max(worst, check("sample over ranks"))


def draws(i, rows, choices):
    """The words of `Draw` of candidates.cu, one row for each dict."""
    fields = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "uniform")
    packed = b"".join(struct.pack("<fIffffII", *(c[f] for f in fields), row, 0) for row, c in zip(range(rows), choices))
    return torch.frombuffer(bytearray(packed), dtype=torch.int32).view(rows, 8).to(i.device)


def probabilities(logits, choice):
    """What is drawn from, in float64: [(token, from, to)] over penalised logits, most likely first."""
    order = sorted(range(len(logits)), key=lambda t: (-logits[t], t))
    scaled = torch.tensor([logits[t] for t in order], dtype=F64) / choice["temperature"]
    keep = scaled >= scaled[min(choice["top_k"], len(order)) - 1]
    keep[64:] = False  # ties stay as far as the list reaches
    p = torch.where(keep, (scaled - scaled[0]).exp(), 0.0)
    p /= p.sum()
    if choice["top_p"] < 1:
        p = torch.where(p.cumsum(0) - p < choice["top_p"], p, 0.0)
    p[1:] = torch.where(p[1:] >= choice["min_p"] * p[0], p[1:], 0.0)
    ends = (p / p.sum()).cumsum(0).tolist()
    return list(zip(order, [0.0] + ends, ends))


def candidates(d, i, vocab=None, rows=None, context=60):
    vocab, rows = vocab or i.random.choice([5, 1000, 20001]), rows or i.random.randint(1, 3)
    ld, first = vocab + i.random.randint(0, 50), i.random.randint(0, 1000)
    logits = (4 * i.normal(rows, ld, dtype=F32, scale=3.0)).round() / 4  # ties go to the lowest
    logits[:, vocab:] = 1e9
    logits[-1, 0] = -math.inf
    choice = lambda: {"temperature": i.random.choice([0.0, 0.3, 0.7, 1.5]), "top_k": i.random.choice([1, 2, 20, 63, 64]), "top_p": i.random.choice([1.0, 0.8]),
                      "min_p": i.random.choice([0.0, 0.05]), "repetition_penalty": i.random.choice([1.0, 1.05, 1.5, 0.9]), "uniform": i.random.random()}
    chosen = [choice() for _ in range(rows)]
    told = draws(i, rows, chosen)
    # Each row's tokens so far, in scattered blocks; some belong to other ranks, and some are the likeliest of all.
    contexts = [i.random.randint(1, context) for _ in range(rows)]
    blocks = [-(-n // 16) for n in contexts]
    tables, history = i.integers(i.random.sample(range(sum(blocks)), sum(blocks))), i.integers([[-1] * 16] * sum(blocks))
    seqs, penalised = [], logits[:, :vocab].clone()
    for row, n in enumerate(contexts):
        likely = penalised[row].argsort(descending=True)[:100].tolist()
        tokens = [first + i.random.choice(likely) if i.random.random() < 0.7 else i.random.randint(0, first + vocab + 50) for _ in range(n)]
        at = sum(blocks[:row])
        seqs.append([row, 1, n, at])
        for position, token in enumerate(tokens):
            history[tables[at + position // 16], position % 16] = token
        seen, penalty = torch.tensor([t - first for t in set(tokens) if first <= t < first + vocab], dtype=torch.long, device=i.device), chosen[row]["repetition_penalty"]
        old = penalised[row, seen]
        penalised[row, seen] = torch.where(old > 0, old / penalty, old * penalty)
    lists = -(-vocab // 1024)
    keys = torch.zeros(rows, lists * 64, dtype=torch.int64, device=i.device)
    d.launch("candidates", "candidates", (lists, rows), 512, logits, vocab, ld, first, told, i.integers(seqs), tables, history, keys)
    while lists > 1:
        n = lists * 64
        lists = -(-n // 1024)
        merged = torch.zeros(rows, lists * 64, dtype=torch.int64, device=i.device)
        d.launch("candidates", "candidates_merge", (lists, rows), 512, keys, n, 64, n, merged)
        d.synchronize()
        keys = merged
    d.synchronize()
    id_of = lambda key: (~key & 0xFFFFFFFF) >> 1

    def check(keys, n_ranks):
        for row, found in zip(penalised.cpu().tolist(), keys.cpu().tolist()):
            want = sorted(range(n_ranks * vocab), key=lambda t: (-row[t % vocab], t))[:64]
            ids = [id_of(key) - first for key in found if key]
            if ids != want:
                raise Mismatch(f"candidates of {n_ranks}: {ids[:4]}…, not {want[:4]}…")

    check(keys, 1)
    token, logit = i.integers([-1] * rows), i.poison(rows, dtype=F32)
    d.launch("candidates", "draw", rows, 32, keys, told, token, logit)
    d.synchronize()
    for row, c in enumerate(chosen):
        got, own = token[row].item(), logit[row].item()
        values = penalised[row].tolist()
        if c["temperature"] == 0.0:
            want = -1 if c["repetition_penalty"] == 1.0 else first + min(range(vocab), key=lambda t: (-values[t], t))
            right = got == want
        else:
            # The sums of 64 f32 are off by less.
            right = any(first + t == got and low - 1e-5 <= c["uniform"] <= high + 1e-5 and high > low for t, low, high in probabilities(values, c))
        if not right or (got >= 0 and abs(own - logits[row, got - first].item()) > 3e-7 * abs(own)):
            raise Mismatch(f"draw: token {got} with {own} for {c}")
    # Two ranks with the same logits, whose ids follow each other: the keys hold the ids' complements.
    both, merged = torch.stack([keys, torch.where(keys == 0, keys, keys - 2 * vocab)]), torch.zeros_like(keys)
    d.launch("candidates", "candidates_merge", (1, rows), 512, both, 2 * 64, rows * 64, 64, merged)
    d.synchronize()
    check(merged, 2)
    return 0.0


def rope_inputs(i, tokens, n_kv, d_head, far):
    # Blocks in any order, and room for tokens of other sequences.
    blocks = tokens // 4 + 3
    slots = i.random.sample(range(blocks * 16), tokens)
    if tokens > 2:
        slots[1] = 0xFFFFFFFF - (1 << 32)
    positions = [i.random.randint(0, far) for _ in range(tokens)]
    inv_freq = (1.0 / 1e6 ** (torch.arange(0, d_head, 2).float() / d_head)).to(i.device)
    return blocks, i.integers(slots), i.integers(positions), inv_freq


def check_qkv(want, slots, q, caches, n_heads, n_kv, d_head, limit):
    """`want` [T, heads, d]: q heads, k heads, v heads after rotation."""
    tokens = want.shape[0]
    worst = compare("q", q.view(tokens, n_heads, d_head), want[:, :n_heads], limit)
    for name, cache, first in (("k", caches[0], n_heads), ("v", caches[1], n_heads + n_kv)):
        written = torch.zeros(cache.shape[0], 16, dtype=torch.bool)
        for t, slot in enumerate(slots.tolist()):
            if slot < 0:
                continue
            written[slot // 16, slot % 16] = True
            worst = max(worst, compare(name, cache[slot // 16, :, slot % 16], want[t, first:first + n_kv], limit))
        if not cache.cpu().isnan().all(-1).all(1)[~written].all():
            raise Mismatch(f"{name}: written outside the slots")
    return worst


def qkv(d, i, tokens=None, heads=None):
    tokens, (n_heads, n_kv, d_head) = tokens or i.random.randint(1, 9), heads or i.random.choice([(9, 3, 64), (7, 1, 128), (4, 2, 80), (2, 2, 20), (3, 1, 256)])
    has_bias, has_norm, eps, scale = i.random.random() < 0.5, i.random.random() < 0.5, 1e-6, i.random.choice([1.0, 1.2])
    n_all = n_heads + 2 * n_kv
    x = i.normal(tokens, n_all * d_head, dtype=F32)
    bias = i.normal(n_all * d_head) if has_bias else None
    norms = [i.normal(d_head) if has_norm else None for _ in range(2)]
    blocks, slots, positions, inv_freq = rope_inputs(i, tokens, n_kv, d_head, 131072)
    q, caches = i.poison(tokens, n_heads * d_head), [i.poison(blocks, n_kv, 16, d_head) for _ in range(2)]
    d.launch("qkv", "qkv_rope", (-(-n_all // 4), tokens), 128, x, bias, *norms, inv_freq, scale, eps, positions, slots, q, *caches, n_heads, n_kv, d_head)
    d.synchronize()
    want = x.double() + (bias.double() if has_bias else 0)
    want = want.view(tokens, n_all, d_head)
    if has_norm:
        weights = torch.stack([norms[0]] * n_heads + [norms[1]] * n_kv)
        want = torch.cat([rms(want[:, :-n_kv], weights, eps), want[:, -n_kv:]], 1)
    want = torch.cat([rotated(want[:, :-n_kv], positions, inv_freq, scale), want[:, -n_kv:]], 1)
    return check_qkv(want, slots, q, caches, n_heads, n_kv, d_head, ROUNDED)


def gemv(d, i, shape=None, m=None):
    n, k = shape or (i.random.choice([1, 8, 50, 200, 333]), i.random.choice([8, 64, 200, 576, 2304]))
    m = m or i.random.randint(1, 8)
    w, x, bias = i.normal(n, k, scale=k ** -0.5), i.normal(m, k), i.normal(n) if i.random.random() < 0.5 else None
    want = x.double() @ w.double().T + (bias.double() if bias is not None else 0)
    other = (i.random.randint(1, 5), 32 * i.random.randint(1, 16)) if shape is None and i.random.random() < 0.5 else None
    # Written into a wider row: a rank's part of the whole.
    ldy, first = n + 24, 8
    worst = 0.0
    for file, rule in GEMV_FILES.items():
        grid, block = other or rule(-(-n // 16), k, d.sms)
        for name, dtype, limit in ((f"{file}_bf16", BF16, ROUNDED), (f"{file}_f32", F32, SINGLE)):
            y = i.poison(m * ldy + first, dtype=dtype)
            d.launch(file, name, grid, block, w, x, bias, y[first:], m, n, k, k, ldy)
            d.synchronize()
            rows = y[first:].view(m, ldy)
            worst = max(worst, compare(name, rows[:, :n], want, limit))
            if not rows[:, n:].isnan().all():
                raise Mismatch(f"{name}: written outside its columns")
    return worst


def gemv_gate_up(d, i, shape=None, m=None):
    inter, k = shape or (i.random.choice([3, 64, 248]), i.random.choice([64, 576]))
    m = m or i.random.randint(1, 8)
    w, x = i.normal(2 * inter, k, scale=k ** -0.5), i.normal(m, k)
    gate, up = (x.double() @ w.double().T).chunk(2, -1)
    worst = 0.0
    for file, rule in GEMV_FILES.items():
        y = i.poison(m, inter)
        d.launch(file, f"{file}_gate_up_silu", *rule(-(-inter // 8), k, d.sms), w, x, y, m, inter, k, k, inter)
        d.synchronize()
        worst = max(worst, compare(f"{file}_gate_up_silu", y, torch.nn.functional.silu(gate) * up, ROUNDED))
    if inter % 8 == 0:
        wide, (grid, block) = i.poison(m, inter + 8), gemv_launch(inter // 8, k, d.sms)
        d.launch("gemv", "gemv_gate_up_silu_tiled", grid, block, tiled(w).contiguous(), x, wide, m, inter, k, k, inter + 8)
        d.synchronize()
        worst = max(worst, compare("gemv_gate_up_silu_tiled", wide[:, :inter], torch.nn.functional.silu(gate) * up, ROUNDED))
    return worst


def handover(d, i, m=None, k=None, n=None):
    """The host's half is played here: what arrives is read, an answer is left before the GPU asks for it."""
    m, k, n = m or i.random.randint(1, 9), k or i.random.choice([64, 3584]), n or i.random.choice([8, 24, 1000])
    x, state = i.normal(m, k), i.integers([5, 0])
    host_x, request = i.poison(m, k, dtype=F32), i.integers([0, 0, 0])
    d.launch("handover", "hand_over", i.random.randint(1, 5), 256, x, host_x, request, state, 7, m, k)
    d.synchronize()
    compare("hand_over", host_x, x, 0.0)
    if request.tolist() != [6, 7, m] or state.tolist() != [6, 0]:
        raise Mismatch(f"hand_over: request {request.tolist()}, state {state.tolist()}")
    host_y, answer, lost = i.normal(m, 2 * n, dtype=F32), i.integers([6]), i.integers([0])
    worst = 0.0
    for name, columns, dtype in (("bf16", 2 * n, BF16), ("f32", 2 * n, F32), ("gated", n, BF16)):
        y = i.poison(m, columns + 8, dtype=dtype)
        d.launch("handover", f"take_back_{name}", i.random.randint(1, 5), 256, host_y, answer, lost, state, y, m, columns, columns + 8, 1000)
        d.synchronize()
        pairs = host_y.double().view(m, -1, 2, 8)
        want = (torch.nn.functional.silu(pairs[:, :, 0]) * pairs[:, :, 1]).reshape(m, n) if name == "gated" else host_y
        worst = max(worst, compare(f"take_back_{name}", y[:, :columns], want, ROUNDED))
    if lost.item() != 0:
        raise Mismatch("take_back: lost")
    answer.fill_(5)
    d.launch("handover", "take_back_f32", 2, 256, host_y, answer, lost, state, y, m, 4, 4, 5)
    d.synchronize()
    if lost.item() != 1:
        raise Mismatch("take_back: a host that does not answer is not lost")
    return worst


def gemv_qkv(d, i, heads=None, k=None, m=None):
    n_heads, n_kv, d_head = heads or i.random.choice([(9, 3, 64), (7, 1, 128), (2, 2, 16), (2, 1, 96)])
    k, m = k or i.random.choice([64, 576]), m or i.random.randint(1, 8)
    n_all = n_heads + 2 * n_kv
    w, x, bias = i.normal(n_all * d_head, k, scale=k ** -0.5), i.normal(m, k), i.normal(n_all * d_head) if i.random.random() < 0.7 else None
    blocks, slots, positions, inv_freq = rope_inputs(i, m, n_kv, d_head, 131072)
    want = x.double() @ w.double().T + (bias.double() if bias is not None else 0)
    want = want.view(m, n_all, d_head)
    want = torch.cat([rotated(want[:, :-n_kv], positions, inv_freq, 1.0), want[:, -n_kv:]], 1)
    worst = 0.0
    for file, rule in GEMV_FILES.items():
        q, caches = i.poison(m, n_heads * d_head), [i.poison(blocks, n_kv, 16, d_head) for _ in range(2)]
        grid, block = rule(n_all * d_head // 16, k, d.sms)
        d.launch(file, f"{file}_qkv_rope", grid, block, w, x, bias, inv_freq, 1.0, positions, slots, q, *caches, m, n_heads, n_kv, d_head, k, k)
        d.synchronize()
        worst = max(worst, check_qkv(want, slots, q, caches, n_heads, n_kv, d_head, ROUNDED))
    return worst


def paged(i, contexts, n_kv, d_head):
    """A cache with the sequences' blocks scattered in it, NaN wherever no token lies; and K and V of each sequence."""
    per_seq = [-(-c // 16) for c in contexts]
    total, width = sum(per_seq) + 3, max(per_seq + [1]) + 2
    order = i.random.sample(range(total), total)
    tables = torch.full((len(contexts), width), 0x7FFFFFF, dtype=torch.int32)
    caches, parts = [i.poison(total, n_kv, 16, d_head) for _ in range(2)], []
    for s, context in enumerate(contexts):
        blocks = [order.pop() for _ in range(per_seq[s])]
        tables[s, :len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        kv = [i.normal(context, n_kv, d_head) for _ in range(2)]
        for cache, new in zip(caches, kv):
            padded = torch.full((per_seq[s] * 16, n_kv, d_head), NAN, dtype=BF16, device=i.device)
            padded[:context] = new
            if blocks:
                cache[blocks] = padded.view(-1, 16, n_kv, d_head).transpose(1, 2)
        parts.append(kv)
    return caches, tables.to(i.device), parts


def attend(q, k, v, scale):
    """q [len, heads, d] at the end of k, v [context, n_kv, d]."""
    group, offset = q.shape[1] // k.shape[1], k.shape[0] - q.shape[0]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("thd,chd->htc", q.double(), k) * scale
    late = torch.arange(k.shape[0], device=q.device)[None] > offset + torch.arange(q.shape[0], device=q.device)[:, None]
    return torch.einsum("htc,chd->thd", scores.masked_fill(late, -math.inf).softmax(-1), v)


# In turn: four rounds have met every size of a head.
HEADS = [(9, 3, 64), (7, 1, 128), (4, 4, 96), (10, 2, 80), (14, 2, 64), (16, 1, 128), (16, 1, 64)]


def attention_decode(d, i, heads=None, contexts=None, splits=None):
    n_heads, n_kv, d_head = heads or HEADS[i.round % len(HEADS)]
    contexts = contexts or [i.random.choice([0, 1, 16, 17, 100, 333]) for _ in range(i.random.randint(1, 4))]
    splits = splits or i.random.choice([2, 5] if i.round < 4 else [1, 2, 5])
    caches, tables, parts = paged(i, contexts, n_kv, d_head)
    rows = i.random.sample(range(len(contexts)), len(contexts))
    seqs = i.integers([[row, 1, c, s] for s, (row, c) in enumerate(zip(rows, contexts))])
    q, attn = i.normal(len(contexts), n_heads * d_head), i.poison(len(contexts), n_heads * d_head)
    part, ml = i.poison(len(contexts), n_heads, splits, d_head, dtype=F32), i.poison(len(contexts), n_heads, splits, 2, dtype=F32)
    scale = d_head ** -0.5
    d.launch("attention_decode", f"attention_decode_{d_head}", (splits, n_kv * -(-(n_heads // n_kv) // 8), len(contexts)), DECODE_BLOCK, q, *caches, tables, seqs, part, ml, attn,
             n_heads, n_kv, tables.shape[1], splits, scale)
    if splits > 1:
        d.launch("attention_decode", f"attention_combine_{d_head}", (n_heads, len(contexts)), DECODE_BLOCK, part, ml, seqs, attn, n_heads, splits)
    d.synchronize()
    want = torch.zeros(len(contexts), n_heads, d_head, dtype=F64, device=i.device)
    for s, context in enumerate(contexts):
        if context:
            want[rows[s]] = attend(q[rows[s]].view(1, n_heads, d_head), *parts[s], scale)[0]
    return compare("attention_decode", attn + 1, want.view(len(contexts), -1) + 1, ROUNDED_TWICE)


def wgmma_shape(warpgroups, tile):
    """Rows, threads and shared bytes of a block of attention_prefill_wgmma.cu for a head width."""
    return lambda d_head: (64 * warpgroups, 128 * warpgroups, 2 * d_head * (64 * warpgroups + 5 * tile))


# Each kernel of prefill: rows, threads and shared bytes of a block.
PREFILL = {
    "attention_prefill": lambda d_head: (128, 256, 512 * (d_head + 8)),
    "attention_prefill_wgmma": lambda d_head: wgmma_shape(3 if d_head == 64 else 2, 128)(d_head),
}


def prefill_kernels(d, d_head):
    return [f for f in PREFILL if f != "attention_prefill_wgmma" or d.has_wgmma and d_head in (64, 128)]


def attention_prefill(d, i, heads=None, seqs=None, kernels=None):
    n_heads, n_kv, d_head = heads or HEADS[i.round % len(HEADS)]
    if seqs is None:
        seqs = [(n, n + i.random.choice([0, 0, 1, 70, 300])) for n in (i.random.choice([0, 1, 5, 17, 64, 90]) for _ in range(i.random.randint(1, 3)))]
    caches, tables, parts = paged(i, [context for _, context in seqs], n_kv, d_head)
    total = sum(n for n, _ in seqs) + 2  # a row in front and one behind that belong to nobody here
    starts = [1 + sum(n for n, _ in seqs[:s]) for s in range(len(seqs))]
    table = i.integers([[start, n, context, s] for s, (start, (n, context)) in enumerate(zip(starts, seqs))])
    q, scale, worst = i.normal(total, n_heads * d_head), d_head ** -0.5, 0.0
    longest = max(n for n, _ in seqs) * (n_heads // n_kv)
    for file in kernels or prefill_kernels(d, d_head):
        rows, block, shared = PREFILL[file](d_head)
        attn = i.poison(total, n_heads * d_head)
        d.launch(file, f"{file}_{d_head}", (max(1, -(-longest // rows)), n_kv, len(seqs)), block, q, *caches, tables, table, attn, n_heads, n_kv,
                 tables.shape[1], scale, shared=shared)
        d.synchronize()
        for s, (start, (n, _)) in enumerate(zip(starts, seqs)):
            if n:
                want = attend(q[start:start + n].view(n, n_heads, d_head), *parts[s], scale)
                worst = max(worst, compare(file, attn[start:start + n], want.reshape(n, -1), ROUNDED_TWICE))
        if not attn[[0, -1]].isnan().all():
            raise Mismatch(f"{file}: written outside its rows")
    return worst


def all_reduce(d, i, ranks=None, rows=None, hidden=None, rounds=5):
    """Ranks as threads (emulation) or streams; then a peer that never comes."""
    ranks, rows, hidden = ranks or i.random.randint(1, 4), rows or i.random.randint(1, 3), hidden or i.random.choice([64, 576, 8200])
    max_rows, block = rows + 1, norm_block(hidden)
    inboxes = [torch.zeros(2, ranks, max_rows, hidden, dtype=torch.int32, device=i.device) for _ in range(ranks)]
    table = torch.tensor([t.data_ptr() for t in inboxes], dtype=torch.int64, device=i.device)
    epochs, lost = [[torch.zeros(n, dtype=torch.int32, device=i.device) for _ in range(ranks)] for n in (max_rows, 1)]
    weight, x = i.normal(hidden), i.normal(rows, hidden, dtype=F32)
    xs, want = [x.clone() for _ in range(ranks)], x.double()

    def run(rank, partial, h, timeout):
        d.launch("all_reduce", "all_reduce_add_rms_norm", rows, block, partial, xs[rank], weight, h, table, epochs[rank], lost[rank], rank, ranks,
                 max_rows, hidden, 1e-6, timeout)

    partials = [[i.normal(rows, hidden) for _ in range(rounds)] for _ in range(ranks)]
    hs = [[i.poison(rows, hidden) for _ in range(rounds)] for _ in range(ranks)]
    with d.sharing("all_reduce", inboxes):
        # A rank runs as far ahead of the others as the kernel lets it.
        d.together([lambda r=r: [run(r, p, h, 3000) for p, h in zip(partials[r], hs[r])] for r in range(ranks)])
        if any(t.item() for t in lost):
            raise Mismatch(f"all_reduce: lost {[t.item() for t in lost]}")
        for n in range(rounds):
            want = want + sum(p[n].double() for p in partials)
            worst = max(compare("all_reduce h", h[n], rms(want, weight, 1e-6), ROUNDED) for h in hs)
        for other in xs:
            compare("all_reduce x", other, want, 1e-6)
            compare("all_reduce x on every rank", other, xs[0], 0.0)
        if ranks > 1:
            run(0, partials[0][0], hs[0][0], 10)
            d.synchronize()
            if not 2 <= lost[0].item() <= ranks:
                raise Mismatch(f"all_reduce: no peer came, and lost is {lost[0].item()}")
    return worst


def all_gather(d, i, ranks=None, n=None, rounds=5):
    """Ranks as threads (emulation) or streams."""
    ranks, n = ranks or i.random.randint(1, 4), n or i.random.choice([1, 3, 6, 97])
    first, pairs = 24, n // 2 + 2
    inboxes = [torch.zeros(first + 2 * ranks * pairs, 4, dtype=torch.int32, device=i.device) for _ in range(ranks)]
    table = torch.tensor([t.data_ptr() for t in inboxes], dtype=torch.int64, device=i.device)
    epochs, lost = [[torch.zeros(1, dtype=torch.int32, device=i.device) for _ in range(ranks)] for _ in range(2)]
    local = [[i.integers([i.random.randint(0, 1 << 30) for _ in range(n)]) for _ in range(rounds)] for _ in range(ranks)]
    outs = [[i.integers([-1] * (ranks * n)) for _ in range(rounds)] for _ in range(ranks)]

    def run(rank, words, out):
        d.launch("all_reduce", "all_gather_words", 1, 64, words, out, table, first, epochs[rank], lost[rank], rank, ranks, pairs, n, 3000)

    with d.sharing("all_reduce", inboxes):
        d.together([lambda r=r: [run(r, w, o) for w, o in zip(local[r], outs[r])] for r in range(ranks)])
    for round in range(rounds):
        want = torch.cat([words[round] for words in local]).tolist()
        if any(out[round].tolist() != want for out in outs):
            raise Mismatch(f"all_gather: round {round}")
    return 0.0


def read(d, i, n=None, grid=None):
    """Every word is read once: sums of integers are exact."""
    n, grid, block = n or i.random.choice([0, 1, 31, 777, 5000]), grid or i.random.randint(1, 5), i.random.choice([32, 96, 512])
    data = torch.randint(-2**31, 2**31, (max(n, 1), 4), generator=i.generator, dtype=torch.int64).to(torch.int32).to(i.device)
    total = torch.zeros(1, dtype=torch.int32, device=i.device)
    d.launch("read", "read_sum", grid, block, data, total, n)
    d.synchronize()
    got, want = total.item() % 2**32, int(data[:n].long().sum()) % 2**32
    if got != want:
        raise Mismatch(f"read: {got} instead of {want}")
    return 0.0


CASES = [read, embed, norm, activation, sample, candidates, qkv, gemv, gemv_gate_up, gemv_qkv, handover, attention_decode, attention_prefill, all_reduce, all_gather]

QWEN_HEADS = {"0.5B": (14, 2, 64), "7B": (28, 4, 128), "72B/2": (32, 4, 128), "14B": (40, 8, 128)}
# The same cases at the sizes of real models, for a GPU.
REAL = [(norm, {"hidden": h, "tokens": t}) for h in (896, 3584, 8192) for t in (1, 512)]
REAL += [(activation, {"width": 18944, "rows": 300}), (sample, {"vocab": 151665, "rows": 4}), (embed, {"hidden": 3584, "tokens": 200})]
REAL += [(gemv, {"shape": s, "m": m}) for s in ((4608, 3584), (3584, 3584), (3584, 18944), (8192, 14784), (896, 4864), (576, 1536)) for m in (1, 3, 8)]
REAL += [(gemv_gate_up, {"shape": s, "m": m}) for s in ((18944, 3584), (14784, 8192), (4864, 896)) for m in (1, 8)]
REAL += [(gemv_qkv, {"heads": h, "k": k, "m": m}) for h, k in (((28, 4, 128), 3584), ((32, 4, 128), 8192), ((14, 2, 64), 896)) for m in (1, 8)]
REAL += [(qkv, {"heads": h, "tokens": 300}) for h in QWEN_HEADS.values()]
REAL += [(attention_decode, {"heads": h, "contexts": c, "splits": s}) for h in QWEN_HEADS.values() for c in ([1024], [5000, 3, 0, 700]) for s in (1, 16, 64)]
REAL += [(attention_prefill, {"heads": h, "seqs": s}) for h in QWEN_HEADS.values() for s in ([(512, 512)], [(700, 3000), (1, 900), (17, 17)])]
# Tiles of 128 tokens and of 64 or 192 rows in every position to each other.
REAL += [(attention_prefill, {"heads": h, "seqs": [(n, n + before)]})
         for h in ((7, 1, 128), (8, 1, 128), (4, 4, 128), (5, 1, 64), (7, 1, 64)) for n, before in ((1, 127), (1, 128), (18, 111), (129, 0), (200, 57), (333, 1000))]
REAL += [(candidates, {"vocab": 151665, "rows": 3, "context": 5000}), (handover, {"m": 8, "k": 8192, "n": 14784}), (read, {"n": 5_000_000, "grid": 264})]
REAL += [(all_gather, {"ranks": 2, "n": n}) for n in (3, 192)]
REAL += [(all_reduce, {"ranks": r, "rows": n, "hidden": h}) for r in (2, 4) for n, h in ((1, 8192), (8, 3584))]

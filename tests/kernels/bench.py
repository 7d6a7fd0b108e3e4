"""Times the kernels on the GPU at hand, in CUDA graphs over buffers that do not fit its L2: python bench.py [part ...]

Every figure stands beside its limit: the read rate or the matrix rate measured first, and what torch (cuBLAS, SDPA) needs.
"""

import math
import pathlib
import shutil
import sys
import tempfile

import torch

import cases
from device import KERNELS, Cuda

BF16, F32 = torch.bfloat16, torch.float32
GPU = "cuda"

READ = r"""
#include "common.cuh"
extern "C" __global__ void __launch_bounds__(512) read_all(const Vec16* data, u32 n, u32* out) {
    u32 sum = 0;
    u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += 8 * step) {
        Vec16 v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = i + j * step < n ? load_stream(data + i + j * step) : zero16();
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += v[j].w[0] ^ v[j].w[1] ^ v[j].w[2] ^ v[j].w[3];
    }
    if (sum == 0x12345678) *out = sum;
}
"""


def variant(changes=(), defines=(), extra=None, **options):
    """A device whose kernels have `changes` (file, old, new)."""
    folder = pathlib.Path(tempfile.mkdtemp()) / "kernels"
    shutil.copytree(KERNELS, folder)
    for file, old, new in changes:
        text = (folder / file).read_text()
        assert old in text, (file, old)
        (folder / file).write_text(text.replace(old, new))
    for name, text in (extra or {}).items():
        (folder / name).write_text(text)
    return Cuda(folder, defines, **options)


def graph_us(run, n_inner, repeats=7):
    """Microseconds of one of `n_inner` things that `run` launches: the median over replays of a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / n_inner)
    return sorted(times[1:])[len(times[1:]) // 2]


def normal(*shape, dtype=BF16, scale=1.0):
    return (torch.randn(*shape, device=GPU, dtype=F32 if math.prod(shape) < 1 << 28 else BF16) * scale).to(dtype)


def copies(n_bytes):
    """So many buffers of this size that they pass the L2 several times over."""
    return max(2, min(64, math.ceil(600e6 / n_bytes)))


def ceilings():
    d = variant(extra={"read.cu": READ})
    data, out = torch.randint(-2**31, 2**31 - 1, (1 << 30,), device=GPU, dtype=torch.int32), torch.zeros(1, device=GPU, dtype=torch.int32)
    best = 0.0
    for blocks in (1, 2, 4):
        us = graph_us(lambda: d.launch("read", "read_all", d.sms * blocks, 512, data, data.numel() // 4, out), 1)
        best = max(best, data.nbytes / us * 1e-6)
    a, b = normal(8192, 8192), normal(8192, 8192)
    us = graph_us(lambda: [torch.mm(a, b) for _ in range(8)], 8)
    rate = 2 * 8192**3 / us * 1e-6
    print(f"read {best:.2f} TB/s, bf16 product {rate:.0f} TFLOP/s\n", flush=True)
    return best, rate


SHAPES = [  # name, n, k, fused gate·up
    ("7B qkv", 4608, 3584, False), ("7B o", 3584, 3584, False), ("7B gate·up", 37888, 3584, True), ("7B down", 3584, 18944, False),
    ("7B head", 152064, 3584, False), ("7B/2 qkv", 2304, 3584, False), ("7B/2 o", 3584, 1792, False), ("7B/2 gate·up", 18944, 3584, True),
    ("7B/2 down", 3584, 9472, False), ("72B/2 qkv", 5120, 8192, False), ("72B/2 o", 8192, 4096, False), ("72B/2 gate·up", 29568, 8192, True),
    ("72B/2 down", 8192, 14784, False), ("72B/2 head", 76032, 8192, False), ("0.5B gate·up", 9728, 896, True), ("0.5B down", 896, 4864, False),
]


# Launch rules to compare: warps of a block, blocks a multiprocessor.
RULES = {f"{warps} × {per_sm}": (lambda tiles, k, sms, w=warps, p=per_sm: (min(sms * p, 8 * tiles), 32 * w))
         for warps, per_sm in ((16, 1), (8, 2), (4, 4))}
RULES["rule"] = cases.gemv_launch


def gemv_us(d, weights, m, n, k, fused, rule, file):
    xs = [normal(m, k) for _ in weights]
    width = n // 2 if fused else n
    ys = [torch.empty(m, width, device=GPU, dtype=BF16) for _ in weights]
    grid, block = rule(-(-width // 8) if fused else -(-n // 16), k, d.sms)

    def run():
        for w, x, y in zip(weights, xs, ys):
            if fused:
                d.launch(file, f"{file}_gate_up_silu", grid, block, w, x, y, m, width, k, k, width)
            else:
                d.launch(file, f"{file}_bf16", grid, block, w, x, None, y, m, n, k, k, n)
    return graph_us(run, len(weights))


def cublas_and_silu_us(d, weights, xs, outs):
    m, width = outs[0].shape[0], outs[0].shape[1] // 2
    ys = [torch.empty(m, width, device=GPU, dtype=BF16) for _ in weights]

    def run():
        for x, w, out, y in zip(xs, weights, outs, ys):
            torch.mm(x, w.T, out=out)
            d.launch("activation", "silu_mul", (-(-width // 2048), m), 256, out, y, width, width, width)
    return graph_us(run, len(weights))


def gemv(read, devices, batches=(1,), ways={file: (file, rule) for file, rule in cases.GEMV_FILES.items()}):
    """Each shape by each variant, kernel file with launch rule, and batch; cuBLAS beside, for gate and up also with the kernel that must follow it."""
    print(f"\n{'GEMV µs':14}{'m':>2}{'MB':>7}{'floor':>7}{'cuBLAS':>7}{'+ SiLU':>7} | " + " | ".join(f"{name}: {', '.join(ways)}" for name in devices))
    for name, n, k, fused in SHAPES:
        weights = [normal(n, k, scale=k**-0.5) for _ in range(copies(2 * n * k))]
        for m in batches:
            xs, outs = [normal(m, k) for _ in weights], [torch.empty(m, n, device=GPU, dtype=BF16) for _ in weights]
            floor = 2 * n * k / read * 1e-6
            cublas = graph_us(lambda: [torch.mm(x, w.T, out=o) for x, w, o in zip(xs, weights, outs)], len(weights))
            with_silu = f"{cublas_and_silu_us(next(iter(devices.values())), weights, xs, outs):7.2f}" if fused else " " * 7
            row, best = f"{name:14}{m:2}{2e-6 * n * k:7.1f}{floor:7.2f}{cublas:7.2f}{with_silu}", math.inf
            for d in devices.values():
                row += " |"
                for file, rule in ways.values():
                    us = gemv_us(d, weights, m, n, k, fused, rule, file)
                    best = min(best, us)
                    row += f"{us:7.2f}"
            print(row + f" | best {100 * floor / best:.0f}%", flush=True)
        del weights
        torch.cuda.empty_cache()


def cache_of(contexts, n_kv, d_head):
    per = [-(-c // 16) for c in contexts]
    tables = torch.zeros(len(contexts), max(per), dtype=torch.int32)
    order = torch.randperm(sum(per), dtype=torch.int32)
    for s, n in enumerate(per):
        tables[s, :n] = order[sum(per[:s]):sum(per[:s]) + n]
    k, v = (normal(sum(per), n_kv, 16, d_head) for _ in range(2))
    return k, v, tables.to(GPU)


def decode(read, devices):
    print(f"\n{'decode attention':20}{'MB':>7}{'floor':>7} | µs by splits (with combine)")
    for name, n_heads, n_kv, d_head, contexts in [
        ("7B, 1024", 28, 4, 128, [1024]), ("7B, 4096", 28, 4, 128, [4096]), ("7B, 16384", 28, 4, 128, [16384]), ("7B, 32768", 28, 4, 128, [32768]),
        ("72B/2, 16384", 32, 4, 128, [16384]), ("7B/2, 1024", 14, 2, 128, [1024]), ("7B, 8 × 4096", 28, 4, 128, [4096] * 8),
        ("7B, 64 × 1024", 28, 4, 128, [1024] * 64), ("0.5B, 4096", 14, 2, 64, [4096]),
    ]:
        n_bytes = sum(contexts) * n_kv * d_head * 4
        sets = [cache_of(contexts, n_kv, d_head) for _ in range(copies(n_bytes))]
        seqs = torch.tensor([[s, 1, c, s] for s, c in enumerate(contexts)], dtype=torch.int32, device=GPU)
        q, attn = normal(len(contexts), n_heads * d_head), torch.empty(len(contexts), n_heads * d_head, device=GPU, dtype=BF16)
        floor = n_bytes / read * 1e-6
        rule = cases.decode_splits(max(contexts), n_kv, len(contexts), 132)
        row = f"{name:20}{n_bytes * 1e-6:7.1f}{floor:7.2f} | rule {rule}"
        for label, (d, block) in devices.items():
            row += f" | {label}"
            for splits in sorted({1, rule, 8, 16, 32, 48, 64, 96, 128}):
                part = torch.empty(len(contexts), n_heads, splits, d_head, device=GPU)
                ml = torch.empty(len(contexts), n_heads, splits, 2, device=GPU)

                def run():
                    for k, v, tables in sets:
                        d.launch("attention_decode", f"attention_decode_{d_head}", (splits, n_kv, len(contexts)), block, q, k, v, tables, seqs, part, ml, attn,
                                 n_heads, n_kv, tables.shape[1], splits, d_head**-0.5)
                        if splits > 1:
                            d.launch("attention_decode", f"attention_combine_{d_head}", (n_heads, len(contexts)), block, part, ml, seqs, attn, n_heads, splits)
                row += f" {splits}: {graph_us(run, len(sets)):.1f}"
        print(row, flush=True)


def prefill(rate, devices):
    print(f"\n{'prefill attention':24}{'GFLOP':>8}{'torch':>16} | " + "  ".join(devices))
    for name, n_heads, n_kv, d_head, length, context in [
        ("7B, 512", 28, 4, 128, 512, 512), ("7B, 4096", 28, 4, 128, 4096, 4096), ("7B, 16384", 28, 4, 128, 16384, 16384),
        ("7B, 512 of 8192", 28, 4, 128, 512, 8192), ("7B, 16 of 4096", 28, 4, 128, 16, 4096), ("0.5B, 4096", 14, 2, 64, 4096, 4096),
    ]:
        pairs = length * (context - length) + length * (length + 1) / 2
        flops = 4 * pairs * n_heads * d_head
        k, v, tables = cache_of([context], n_kv, d_head)
        seqs = torch.tensor([[0, length, context, 0]], dtype=torch.int32, device=GPU)
        q, attn = normal(length, n_heads * d_head), torch.empty(length, n_heads * d_head, device=GPU, dtype=BF16)
        peer = ""
        if length == context:
            kk, vv = (t[tables[0].long()].transpose(1, 2).reshape(context, n_kv, d_head).transpose(0, 1)[None].contiguous() for t in (k, v))
            qq = q.view(length, n_heads, d_head).transpose(0, 1)[None].contiguous()
            kk, vv = (t.repeat_interleave(n_heads // n_kv, 1) for t in (kk, vv))
            us = graph_us(lambda: torch.nn.functional.scaled_dot_product_attention(qq, kk, vv, is_causal=True), 1)
            peer = f"{us:8.1f} {flops / us * 1e-6:4.0f}T"
        row = f"{name:24}{flops * 1e-9:8.1f}{peer:>16} |"
        for d, file, shape in devices.values():
            rows, block, shared = shape(d_head)
            tiles = -(-length * (n_heads // n_kv) // rows)
            try:
                us = graph_us(lambda: d.launch(file, f"{file}_{d_head}", (tiles, n_kv, 1), block, q, k, v, tables, seqs, attn, n_heads, n_kv, tables.shape[1],
                                               d_head**-0.5, shared=shared), 1)
                row += f"{us:10.1f} {flops / us * 1e-6:4.0f}T"
            except RuntimeError as e:  # a variant that does not serve this width
                row += f"{str(e).splitlines()[0][:15]:>16}"
        print(row, flush=True)


def small(d):
    print("\nsmall kernels, µs in a graph:")
    for hidden in (896, 3584, 8192):
        for tokens in (1, 8, 4096):
            p, x, w, h = normal(tokens, hidden), normal(tokens, hidden, dtype=F32), normal(hidden), normal(tokens, hidden)
            us = graph_us(lambda: [d.launch("norm", "add_rms_norm", tokens, cases.norm_block(hidden), p, x, w, h, hidden, 1e-6) for _ in range(20)], 20)
            print(f"  add_rms_norm {tokens} × {hidden}: {us:.2f} µs, {tokens * hidden * 12 / us * 1e-6:.2f} TB/s")
    for tokens in (1, 8, 4096):
        n_heads, n_kv, dh = 28, 4, 128
        x, q = normal(tokens, 36 * dh, dtype=F32), normal(tokens, n_heads * dh)
        caches = [normal(300, n_kv, 16, dh) for _ in range(2)]
        ids = torch.arange(tokens, dtype=torch.int32, device=GPU)
        freq = torch.rand(dh // 2, device=GPU)
        us = graph_us(lambda: [d.launch("qkv", "qkv_rope", (9, tokens), 128, x, None, None, None, freq, 1.0, 1e-6, ids, ids, q, *caches, n_heads, n_kv, dh)
                               for _ in range(20)], 20)
        print(f"  qkv_rope {tokens}: {us:.2f} µs")
    gate_up, mlp = normal(4096, 37888), normal(4096, 18944)
    us = graph_us(lambda: d.launch("activation", "silu_mul", (-(-18944 // 2048), 4096), 256, gate_up, mlp, 18944, 18944, 18944), 1)
    print(f"  silu_mul 4096 × 18944: {us:.1f} µs, {(gate_up.nbytes + mlp.nbytes) / us * 1e-6:.2f} TB/s")
    for rows in (1, 8):
        vocab = 152064
        logits, parts = normal(rows, vocab, dtype=F32), cases.sample_parts(151665)
        part = [torch.empty(rows, parts, device=GPU) for _ in range(3)]
        out = [torch.empty(rows, device=GPU) for _ in range(4)]

        def run():
            for _ in range(20):
                d.launch("sample", "sample_partial", (parts, rows), 256, logits, 151665, vocab, *part)
                d.launch("sample", "sample_reduce", rows, 32, *part, parts, 1, parts, *out)
        print(f"  sample {rows} × {vocab}: {graph_us(run, 20):.2f} µs", flush=True)


def reduce():
    """Two ranks as two streams of one GPU: the protocol's own time, without a link."""
    for rows, hidden in ((1, 3584), (1, 8192), (8, 8192)):
        # No overlap: on one GPU, one rank's launches ahead of their time could leave no room for the other's.
        d = Cuda(overlap=False)
        inboxes = [torch.zeros(2, 2, rows, hidden, dtype=torch.int32, device=GPU) for _ in range(2)]
        table = torch.tensor([t.data_ptr() for t in inboxes], dtype=torch.int64, device=GPU)
        state = [(torch.zeros(rows, dtype=torch.int32, device=GPU), torch.zeros(1, dtype=torch.int32, device=GPU), normal(rows, hidden), normal(rows, hidden, dtype=F32),
                  normal(rows, hidden)) for _ in range(2)]
        weight, streams = normal(hidden), [torch.cuda.Stream() for _ in range(2)]

        def run():
            here = torch.cuda.current_stream()
            for rank, (epochs, lost, partial, x, h) in enumerate(state):
                streams[rank].wait_stream(here)
                with torch.cuda.stream(streams[rank]):
                    for _ in range(50):
                        d.launch("all_reduce", "all_reduce_add_rms_norm", rows, cases.norm_block(hidden), partial, x, weight, h, table, epochs, lost, rank, 2, rows,
                                 hidden, 1e-6, 2000)
            for stream in streams:
                here.wait_stream(stream)
        us = graph_us(run, 50)
        assert not any(s[1].item() for s in state)
        print(f"  all_reduce_add_rms_norm {rows} × {hidden}, two streams: {us:.2f} µs", flush=True)


class Model:
    """A whole decode step of batch 1 with random weights and no all-reduce."""

    def __init__(self, name, layers, hidden, inter, n_heads, n_kv, d_head, vocab, context=1024):
        self.name, self.layers, self.hidden, self.inter, self.n_heads = name, layers, hidden, inter, n_heads
        self.n_kv, self.d_head, self.vocab, self.context = n_kv, d_head, vocab, context
        n_all = n_heads + 2 * n_kv
        # Rows alike, to be quick; the values are random all the same.
        one = lambda *shape: torch.randn(shape[-1], device=GPU, dtype=BF16).mul_(0.02).expand(shape).contiguous()
        self.ws = [dict(norm=normal(hidden), qkv=one(n_all * d_head, hidden), bias=normal(n_all * d_head), o=one(hidden, n_heads * d_head), post=normal(hidden),
                        gate_up=one(2 * inter, hidden), down=one(hidden, inter), kv=cache_of([context], n_kv, d_head)) for _ in range(layers)]
        self.head, self.final = one(vocab, hidden), normal(hidden)

    def measure(self, read, d, label, rule=cases.gemv_launch, splits=None):
        layers, hidden, inter, n_heads, n_kv, d_head, vocab, context = (
            getattr(self, f) for f in ("layers", "hidden", "inter", "n_heads", "n_kv", "d_head", "vocab", "context"))
        ws, n_all = self.ws, n_heads + 2 * n_kv
        x, h, q = normal(1, hidden, dtype=F32), normal(1, hidden), normal(1, n_heads * d_head)
        attn, mlp, partial, logits = normal(1, n_heads * d_head), normal(1, inter), normal(1, hidden), normal(1, vocab, dtype=F32)
        splits = splits or cases.decode_splits(context, n_kv, 1, d.sms)
        part, ml = torch.empty(n_heads, splits, d_head, device=GPU), torch.empty(n_heads, splits, 2, device=GPU)
        seqs = torch.tensor([[0, 1, context, 0]], dtype=torch.int32, device=GPU)
        token, freq = torch.tensor([5], dtype=torch.int32, device=GPU), 1 / 1e6 ** (torch.arange(0, d_head, 2, device=GPU) / d_head)
        position = torch.tensor([context - 1], dtype=torch.int32, device=GPU)
        parts = cases.sample_parts(vocab)
        sampled = [torch.empty(1, parts, device=GPU) for _ in range(3)] + [torch.empty(1, device=GPU) for _ in range(4)]
        slots = [(w["kv"][2][0, -1] * 16 + 15).int().view(1) for w in ws]
        history = torch.zeros(-(-context // 16), 16, dtype=torch.int32, device=GPU)
        block = cases.norm_block(hidden)
        grid = lambda tiles, k: rule(tiles, k, d.sms)

        def run():
            overlap, d.overlap = d.overlap, False
            d.launch("embed", "embed", 1, 128, self.head, None, token, token, slots[0], history, partial, x, hidden, 0, vocab, vocab)
            d.overlap = overlap
            d.launch("norm", "add_rms_norm", 1, block, partial, x, ws[0]["norm"], h, hidden, 1e-6)
            for i, w in enumerate(ws):
                k, v, tables = w["kv"]
                d.launch("gemv", "gemv_qkv_rope", *grid(n_all * d_head // 16, hidden), w["qkv"], h, w["bias"], freq, 1.0, position, slots[i], q, k, v, 1, n_heads, n_kv,
                         d_head, hidden, hidden)
                d.launch("attention_decode", f"attention_decode_{d_head}", (splits, n_kv, 1), cases.DECODE_BLOCK, q, k, v, tables, seqs, part, ml, attn, n_heads, n_kv,
                         tables.shape[1], splits, d_head**-0.5)
                if splits > 1:
                    d.launch("attention_decode", f"attention_combine_{d_head}", (n_heads, 1), cases.DECODE_BLOCK, part, ml, seqs, attn, n_heads, splits)
                d.launch("gemv", "gemv_bf16", *grid(hidden // 16, n_heads * d_head), w["o"], attn, None, partial, 1, hidden, n_heads * d_head, n_heads * d_head, hidden)
                d.launch("norm", "add_rms_norm", 1, block, partial, x, w["post"], h, hidden, 1e-6)
                d.launch("gemv", "gemv_gate_up_silu", *grid(inter // 8, hidden), w["gate_up"], h, mlp, 1, inter, hidden, hidden, inter)
                d.launch("gemv", "gemv_bf16", *grid(hidden // 16, inter), w["down"], mlp, None, partial, 1, hidden, inter, inter, hidden)
                d.launch("norm", "add_rms_norm", 1, block, partial, x, ws[i + 1]["norm"] if i + 1 < layers else self.final, h, hidden, 1e-6)
            d.launch("gemv", "gemv_f32", *grid(vocab // 16, hidden), self.head, h, None, logits, 1, vocab, hidden, hidden, vocab)
            d.launch("sample", "sample_partial", (parts, 1), 256, logits, vocab, vocab, *sampled[:3])
            d.launch("sample", "sample_reduce", 1, 32, *sampled[:3], parts, 1, parts, *sampled[3:])
        us = graph_us(run, 1)
        n_bytes = sum(t.nbytes for w in ws for t in (w["qkv"], w["o"], w["gate_up"], w["down"], *w["kv"][:2])) + self.head.nbytes
        floor = n_bytes / read * 1e-6
        print(f"  {self.name}, context {context}, {label}: {us:.0f} µs, {n_bytes * 1e-9:.2f} GB, floor {floor:.0f} µs: {100 * floor / us:.1f}%", flush=True)


def prefill_variants(d):
    """Kernels to compare: a device, the file, and the shape of a block for a head width."""
    compared = {"as is": (d, "attention_prefill", cases.PREFILL["attention_prefill"])}
    if not d.has_wgmma:
        return compared | {"4 warps": (variant(defines=["-DPREFILL_WARPS=4"]), "attention_prefill", lambda d_head: (64, 128, 512 * (d_head + 8)))}
    file = "attention_prefill_wgmma"
    compared["wgmma"] = (d, file, cases.PREFILL[file])
    for warpgroups, tile in ((2, 64), (3, 64), (3, 96)):
        shaped = variant(defines=[f"-DPREFILL_WARPGROUPS={warpgroups}", f"-DPREFILL_TILE={tile}"])
        compared[f"{warpgroups} × 64 rows, tile {tile}"] = (shaped, file, cases.wgmma_shape(warpgroups, tile))
    soften, meet = "        soften(scores, high, sum, shrink, to_log2);\n", "        meet(tile);\n"
    early = variant([(file + ".cu", soften + meet, meet + soften)])
    compared["early"] = (early, file, cases.PREFILL[file])
    # Always true, and a branch that exponentials do not pass.
    late = variant([(file + ".cu", meet, "        if (tile < max_blocks) meet(tile);\n")])
    compared["late"] = (late, file, cases.PREFILL[file])
    return compared


def main():
    wanted = sys.argv[1:] or ["model", "gemv", "decode", "prefill", "small"]
    read, rate = ceilings()
    d = Cuda()
    stages = {"4 stages": d, "3 stages": variant(defines=["-DGEMV_STAGES=3"])}
    if "model" in wanted:
        print("whole decode steps:")
        for shape in (("7B", 28, 3584, 18944, 28, 4, 128, 152064), ("7B", 28, 3584, 18944, 28, 4, 128, 152064, 16384), ("7B/2", 28, 3584, 9472, 14, 2, 128, 76032),
                      ("72B/2", 80, 8192, 14784, 32, 4, 128, 76032)):
            model = Model(*shape)
            model.measure(read, d, "as is")
            model.measure(read, Cuda(overlap=False), "no overlap")
            for splits in (8, 16, 32):
                model.measure(read, d, f"{splits} splits", splits=splits)
            for name, e in stages.items():
                for label, rule in RULES.items():
                    model.measure(read, e, f"{name}, {label}", rule)
            del model
            torch.cuda.empty_cache()
    if "gemv" in wanted:
        gemv(read, stages, ways={name: ("gemv", rule) for name, rule in RULES.items()})
        gemv(read, {"as is": d}, batches=(1, 2, 4, 8))
    if "decode" in wanted:
        shaped = lambda warps, blocks: (variant(defines=[f"-DDECODE_WARPS={warps}", f"-DDECODE_BLOCKS={blocks}"]), 32 * warps)
        decode(read, {"8 × 1": (d, cases.DECODE_BLOCK)} | {f"{warps} × {blocks}": shaped(warps, blocks) for warps, blocks in ((4, 3), (8, 2), (12, 1))})
    if "prefill" in wanted:
        prefill(rate, prefill_variants(d))
    if "small" in wanted:
        small(d)
        reduce()


main()

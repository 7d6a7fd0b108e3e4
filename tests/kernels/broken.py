"""Breaks the kernels on purpose, one line at a time: the emulation or the comparison must catch every one."""

import pathlib
import shutil
import subprocess
import tempfile

import cases
from device import KERNELS, Emulated

# file, what stands there, what to put instead, the case, arguments of the case
BREAKS = [
    ("embed", "i < hidden;", "i < hidden - 8;", cases.embed, {}),
    ("embed", "i < hidden;", "i <= hidden;", cases.embed, {}),
    ("rows", "__syncthreads();", "", cases.norm, {"hidden": 576}),
    ("norm", "const int i = element(v);\n        if (i >= hidden)", "const int i = element(v);\n        if (i > hidden)", cases.norm, {"hidden": 72}),
    ("all_reduce", "(epoch & 1)", "(epoch & 0)", cases.all_reduce, {"ranks": 3, "rounds": 40}),
    ("all_reduce", "m.first_mark != epoch || m.second_mark != epoch", "false", cases.all_reduce, {"ranks": 3}),
    ("all_reduce", "if (peer == rank) continue;", "if (peer <= rank) continue;", cases.all_reduce, {"ranks": 2, "rows": 1, "hidden": 64}),
    ("activation", "if (i >= inter) return;", "if (i > inter) return;", cases.activation, {}),
    ("sample", "__syncthreads();", "", cases.sample, {}),
    ("sample", "a.id < b.id", "a.id > b.id", cases.sample, {"vocab": 20001}),
    ("sample", "i < n_known;", "i <= n_known;", cases.sample, {}),
    ("qkv", "if (slot == NO_SLOT) return;", "", cases.qkv, {"tokens": 5}),
    ("qkv", "for (int j = 0; j < 2; ++j) rotate", "for (int j = 0; j < 1; ++j) rotate", cases.qkv, {}),
    ("gemv", "__syncthreads();", "", cases.gemv, {"shape": (333, 576)}),
    ("gemv", "sums + at / 8 % 2 * MAX_WARPS", "sums + 0 * MAX_WARPS", cases.gemv, {"shape": (3330, 576)}),
    ("gemv", "if (pair < end && lane", "if (lane", cases.gemv, {"shape": (333, 576)}),
    ("gemv", "int other = 0; other", "int other = 1; other", cases.gemv, {"shape": (333, 576)}),
    ("gemv", "at < k && ahead.high", "ahead.high", cases.gemv, {"shape": (64, 200)}),
    ("gemv", "if (row + 8 < n) put", "put", cases.gemv, {"shape": (20, 64)}),
    ("attention_decode", "int w = 0; w < WARPS", "int w = 1; w < WARPS", cases.attention_decode, {"contexts": [16]}),
    ("attention_decode", "    __syncthreads();\n    for", "    for", cases.attention_decode, {"contexts": [100]}),
    ("attention_decode", "v[i][c] = 2 * t + token < n_tokens && ", "v[i][c] = ", cases.attention_decode, {"contexts": [17]}),
    ("attention_decode", "g + 8 * i < n_tokens ? p", "g + 8 * i <= n_tokens ? p", cases.attention_decode, {"contexts": [17]}),
    ("attention_decode", "return block < last ? load(table + block) : 0", "return load(table + block)", cases.attention_decode, {"contexts": [333], "splits": 1}),
    ("attention_prefill", "__syncthreads();", "", cases.attention_prefill, {"seqs": [(90, 90)]}),
    ("attention_prefill", "cp_async_wait<0>();", "", cases.attention_prefill, {"seqs": [(90, 90)]}),
    ("attention_prefill", "> sees[i / 2]", ">= sees[i / 2]", cases.attention_prefill, {"seqs": [(90, 90)]}),
    ("attention_prefill", "first_masked = (offset +", "first_masked = (offset + TILE +", cases.attention_prefill, {"seqs": [(90, 90)]}),
    ("attention_prefill", "if (!here[r]) continue;", "", cases.attention_prefill, {"seqs": [(5, 5)]}),
    ("attention_prefill", ", row < n_tokens);", ", true);", cases.attention_prefill, {"seqs": [(17, 17)]}),
    *[(file, old, new, cases.attention_prefill, {"heads": (7, 1, 128), "seqs": [seq], "kernels": ["attention_prefill_wgmma"]}) for file, old, new, seq in (
        ("attention_prefill_wgmma", "        __syncthreads();", "", (400, 400)),
        ("attention_prefill_wgmma", "cp_async_wait<0>();", "", (400, 400)),
        ("attention_prefill_wgmma", "        fence_async_proxy();", "", (400, 400)),
        ("attention_prefill_wgmma", "V_PLACES = 3", "V_PLACES = 2", (600, 600)),
        ("attention_prefill_wgmma", "wgmma_wait<1>();", "wgmma_wait<2>();", (90, 200)),
        ("attention_prefill_wgmma", "out[n][i] *= shrink[i / 2];", ";", (90, 200)),
        ("attention_prefill_wgmma", "> sees)", ">= sees)", (90, 90)),
        ("attention_prefill_wgmma", "if (row >= n_rows) continue;", "", (5, 5)),
        ("attention_prefill_wgmma", "row + i * ROWS < n_tokens);", "true);", (17, 17)),
        ("attention_prefill_wgmma", ", TILE * 128);", ");", (17, 17)),
        ("wgmma", "EIGHT_ROWS = 1024", "EIGHT_ROWS = 512", (17, 17)),
        ("wgmma", "(piece ^ row) % 8", "piece % 8", (17, 17)),
    )],
]

missed = 0
for file, old, new, case, arguments in BREAKS:
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "kernels"
        shutil.copytree(KERNELS, source)
        path = next(source.glob(file + ".cu*"))
        text = path.read_text()
        assert old in text, f"{file}: no longer has {old!r}"
        path.write_text(text.replace(old, new, 1))
        found = ""
        try:
            device = Emulated(source)
            for seed in range(5):
                case(device, cases.Inputs(device, seed), **arguments)
        except (cases.Mismatch, RuntimeError) as e:
            found = str(e)
    missed += not found
    print(f"{file}: {old.strip()!r} → {new!r}: {found or 'NOT FOUND'}", flush=True)
raise SystemExit(1 if missed else 0)

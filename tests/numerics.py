"""tandem's logits on GPUs against transformers in float32, beside transformers' own bf16 run.

    python3 tests/numerics.py TANDEM OUT_DIR [--shapes qwen2.5-7b,…] [--ranks 1,2] [--prompts 1,17,512,5000]
                              [--gpu-memory SIZE,…] [--max-seconds S] [--smollm2 DIR]

For each published shape, cut to a few layers, transformers makes random weights and saves them in bf16. tandem
continues prompts of random token ids greedily, one after the other, and leaves the logits that each token was chosen
from; transformers computes the logits of the same positions, given the same tokens, in float32 and in bf16. The error of
a run is ‖logits − float32's‖ / ‖float32's‖ over all its rows; tandem's may be at most 1.2 times that of transformers'
bf16. A second run, which leaves no logits and so chooses on the device, must give the same tokens.

With --gpu-memory every run is made under each of these budgets instead: what does not fit is offloaded, and the bar stays.
Only the second run's tokens may differ then: each run cuts between link and cores as it measures them.

With --smollm2, the golden prompts too: every token is the most likely one in float32, given the tokens before it, except
where the two logits are no further apart than bf16 is seen to move them; those places are listed. How far that is,
transformers' own bf16 run says: the gap of float32's two best logits changes by less in 99 of 100 places of the golden answers.

The most important shapes come first: --max-seconds cuts the others. Needs torch, transformers and safetensors;
`--device cpu` tries the script itself on a machine without a GPU. Writes OUT_DIR/numerics.json; the table comes last.
Exit status 1 when a bar is missed.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config
from transformers.utils import logging

BAR = 1.2
SHAPES = (
    "qwen2.5-0.5b qwen2.5-7b qwen2.5-72b qwen3-0.6b qwen3-8b "
    "qwen2.5-1.5b qwen3-1.7b qwen2.5-3b qwen3-4b qwen2.5-14b qwen3-14b qwen2.5-32b qwen3-32b"
).split()
# The largest shapes spend their bytes on layers here, not on two matrices of the full vocabulary.
CUT_VOCAB = {"qwen2.5-32b": 32768, "qwen3-32b": 32768, "qwen2.5-72b": 32768}
RUN_SECONDS = {"cuda": 60, "cpu": 900}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(n) for n in text.split(",") if n]
    p.add_argument("tandem", type=lambda path: str(Path(path).resolve()))
    p.add_argument("out", type=Path)
    p.add_argument("--shapes", type=lambda text: [s for s in text.split(",") if s], default=SHAPES)
    p.add_argument("--ranks", type=numbers, default=[1, 2])
    p.add_argument("--prompts", type=numbers, default=[1, 17, 512, 5000])
    p.add_argument("--gpu-memory", type=lambda text: text.split(","), default=[None], help="budgets of a rank: offload under them")
    p.add_argument("--decode", type=int, default=64, help="tokens of an answer")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--vocab", type=int, help="cut every vocabulary to this")
    p.add_argument("--max-seconds", type=float, default=float("inf"), help="begin nothing new after this")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--work", type=Path, default=Path("/dev/shm"), help="holds the checkpoints meanwhile")
    p.add_argument("--smollm2", type=Path, help="the demo model's folder")
    return p.parse_args()


def config_of(args, shape):
    """The shape as tandem knows it, as a config of transformers; cut to a few layers."""
    plan = subprocess.run([args.tandem, "plan", "--model", shape, "--json"], check=True, capture_output=True, text=True)
    m = json.loads(plan.stdout)["model"]
    family = Qwen3Config if shape.startswith("qwen3") else Qwen2Config
    vocab = args.vocab or CUT_VOCAB.get(shape, m["vocab_size"])
    more = {"head_dim": m["head_dim"]} if family is Qwen3Config else {}
    return family(
        vocab_size=vocab,
        hidden_size=m["hidden_size"],
        intermediate_size=m["intermediate_size"],
        num_hidden_layers=args.layers,
        num_attention_heads=m["n_heads"],
        num_key_value_heads=m["n_kv_heads"],
        max_position_embeddings=m["max_position_embeddings"],
        rms_norm_eps=m["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": m["rope"]["theta"]},
        tie_word_embeddings=m["tie_word_embeddings"],
        bos_token_id=0,
        eos_token_id=1,
        **more,
    )


@torch.no_grad()
def make_model(config, device):
    """Random weights at the scale of a real initialisation; biases and norms far enough from trivial to matter."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    random = torch.Generator(device).manual_seed(config.hidden_size * 31 + config.intermediate_size)
    for name, p in model.named_parameters():
        noise = torch.empty(p.shape, dtype=torch.float32, device=device).normal_(generator=random)
        if "norm" in name:
            p.copy_(1 + 0.2 * noise)
        elif name.endswith("bias"):
            p.copy_(0.5 * noise)
        else:
            p.copy_(0.02 * noise)
    return model


def generate(args, folder, prompts, ranks, n_tokens, budget=None, gpu=0, logits=None):
    """The tokens that tandem answers to each of `prompts`, one after the other; or why there are none."""
    command = [args.tandem, "generate", "--device", args.device, "--model", folder, "--prompts", "-", "--one-by-one"]
    command += ["--temperature", "0", "--repetition-penalty", "1", "--ignore-eos", "--max-tokens", n_tokens]
    command += ["--logits", logits] if logits else []
    command += ["--gpu-memory", budget] if budget else []
    env = dict(os.environ)
    if ranks > 1:
        command += ["--ranks", ranks]
    elif args.device == "cuda":
        env["CUDA_VISIBLE_DEVICES"] = str(gpu)
    lines = "\n".join(json.dumps({"prompt_token_ids": ids}) for ids in prompts)
    limit = RUN_SECONDS[args.device]
    try:
        run = subprocess.run(
            [str(c) for c in command], input=lines, capture_output=True, text=True, timeout=limit, env=env
        )
    except subprocess.TimeoutExpired:
        return None, f"still running after {limit} s"
    if run.returncode:
        return None, run.stderr.strip()[-300:] or f"exit status {run.returncode}"
    return [json.loads(line)["token_ids"] for line in run.stdout.splitlines()], None


def run_tandem(args, folder, vocab, ranks, budget):
    """Both runs of all prompts; on one rank at the same time, each on a GPU of its own, since nothing is timed."""
    n_gpus = torch.cuda.device_count() if args.device == "cuda" else 1
    prompts = [torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in args.prompts]
    kept = args.work / "kept"

    def one(gpu, logits):
        return generate(args, folder, prompts, ranks, args.decode, budget, gpu, logits)

    with ThreadPoolExecutor(n_gpus if ranks == 1 else 1) as pool:
        (tokens, error), (again, error2) = pool.map(one, [0, 1 % n_gpus], [kept, None])
    runs = []
    for i, ids in enumerate(prompts):
        run = dict(shape=folder.name, prompt=len(ids), ranks=ranks, gpu_memory=budget, ids=ids, error=error or error2)
        run["tokens"] = tokens and tokens[i]
        run["identical"] = bool(tokens and again) and tokens[i] == again[i]
        runs.append(run)
    if tokens:
        for run, rows in zip(runs, load_file(kept)["logits"].split(args.decode)):
            run["logits"] = rows.clone()
        kept.unlink()
    return runs


@torch.no_grad()
def reference(model, device, ids, tokens):
    """transformers' logits where tandem chose its tokens, `[tokens, vocab]`, given those tokens."""
    ids = torch.tensor([ids + tokens[:-1]], device=device)
    return model(ids, use_cache=False, logits_to_keep=len(tokens)).logits[0].float().cpu()


def references(model, device, runs):
    """One for each run, computed once where runs gave the same tokens."""
    known = {}
    for run in runs:
        key = (run["prompt"], *run["tokens"])
        if key not in known:
            known[key] = reference(model, device, run["ids"], run["tokens"])
        yield known[key]


def relative(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item()


def compare(device, model, runs):
    """Adds both errors to the runs that ended well; `model` comes in bf16 and ends in float32."""
    well = [run for run in runs if run["tokens"]]
    in_bf16 = list(references(model, device, well))
    model.float()
    for run, bf16, want in zip(well, in_bf16, references(model, device, well)):
        got = run["logits"]
        if got.shape != want.shape:
            run["error"] = f"logits of shape {list(got.shape)} for {list(want.shape)}"
            continue
        run["tandem_error"], run["bf16_error"] = relative(got, want), relative(bf16, want)
        run["ratio"] = run["tandem_error"] / run["bf16_error"]


def passes(run):
    return run["error"] is None and (run["identical"] or run["gpu_memory"] is not None) and run["ratio"] <= BAR


def check_shape(args, shape, until):
    """All runs of a shape, and what was left out for want of time."""
    config = config_of(args, shape)
    folder = args.work / shape
    model = make_model(config, args.device)
    model.save_pretrained(folder)
    runs, left_out = [], []
    for ranks, budget in itertools.product(args.ranks, args.gpu_memory):
        if time.monotonic() > until:
            left_out.append(f"{shape} on {ranks}")
        else:
            runs += run_tandem(args, folder, config.vocab_size, ranks, budget)
    shutil.rmtree(folder)
    compare(args.device, model, runs)
    del model
    torch.cuda.empty_cache()
    for run in runs:
        run["vocab"] = config.vocab_size
        for key in ("ids", "logits"):
            run.pop(key, None)
    return runs, left_out


@torch.no_grad()
def moved_by_bf16(args, golden, model):
    """In 99 of 100 places transformers' bf16 run moves the gap of float32's two best logits by less than this."""
    in_bf16 = AutoModelForCausalLM.from_pretrained(args.smollm2, dtype=torch.bfloat16).to(args.device).eval()
    moved = []
    for prompt in golden.values():
        want, got = (reference(m, args.device, prompt["prompt_token_ids"], prompt["token_ids"]) for m in (model, in_bf16))
        best = want.topk(2).indices
        gap, gap_bf16 = (-x.gather(1, best).diff()[:, 0] for x in (want, got))
        moved.append((gap_bf16 - gap).abs())
    return torch.cat(moved).quantile(0.99).item()


def check_smollm2(args):
    """A summary for each number of ranks."""
    golden = json.loads((Path(__file__).parent / "golden/smollm2/golden.json").read_text())["prompts"]
    model = AutoModelForCausalLM.from_pretrained(args.smollm2, dtype=torch.float32).to(args.device).eval()
    moved = moved_by_bf16(args, golden, model)
    return [check_answers(args, golden, model, moved, ranks) for ranks in args.ranks]


def check_answers(args, golden, model, moved, ranks):
    """The places where tandem's token is not float32's, and whether each is a tie to bf16."""
    summary = dict(ranks=ranks, prompts=len(golden), tokens=0, equal_to_golden=0, moved_by_bf16=moved, places=[], errors=[])
    kept, longest = args.work / "smollm2.kept", max(len(prompt["token_ids"]) for prompt in golden.values())
    prompts = [prompt["prompt_token_ids"] for prompt in golden.values()]
    answers, error = generate(args, args.smollm2, prompts, ranks, longest, logits=kept)
    if error:
        return dict(summary, errors=[error])
    for (name, prompt), answer, got in zip(golden.items(), answers, load_file(kept)["logits"].split(longest)):
        tokens = answer[: len(prompt["token_ids"])]
        want = reference(model, args.device, prompt["prompt_token_ids"], tokens)
        summary["tokens"] += len(tokens)
        summary["equal_to_golden"] += tokens == prompt["token_ids"]
        for i, (token, row) in enumerate(zip(tokens, want)):
            best = int(row.argmax())
            if best == token:
                continue
            gap = (row[best] - row[token]).item()
            summary["places"].append(dict(
                prompt=name, token=i, float32=best, tandem=token, gap=gap, tie=gap <= moved,
                float32_logits=[row[best].item(), row[token].item()],
                tandem_logits=[got[i][best].item(), got[i][token].item()],
            ))
    return summary


def print_smollm2(summary):
    s = summary
    print(f"smollm2 on {s['ranks']}: {s['equal_to_golden']} of {s['prompts']} answers equal float32's, "
          f"{len(s['places'])} of {s['tokens']} tokens differ from float32's choice; bf16 moves gaps by {s['moved_by_bf16']:.3f}")
    for p in s["places"]:
        f, t = p["float32_logits"], p["tandem_logits"]
        print(f"  {p['prompt']} token {p['token']}: {p['tandem']} for {p['float32']}; float32 {f[0]:.4f} {f[1]:.4f}, "
              f"tandem {t[0]:.4f} {t[1]:.4f}: {'a tie' if p['tie'] else 'NO TIE'}")
    for error in s["errors"]:
        print(f"  FAILED {error}")


def print_table(runs, left_out):
    print(f"{'shape':14} {'vocab':>6} {'prompt':>6} {'ranks':>5} {'budget':>8} {'tandem':>9} {'bf16':>9} {'ratio':>6}  same tokens")
    for r in runs:
        line = f"{r['shape']:14} {r['vocab']:6} {r['prompt']:6} {r['ranks']:5} {r['gpu_memory'] or 'all':>8} "
        if "ratio" in r:
            line += f"{r['tandem_error']:9.2e} {r['bf16_error']:9.2e} {r['ratio']:6.3f}  {'yes' if r['identical'] else 'NO'}"
        if r["error"]:
            line += f" FAILED {r['error']}"
        print(line + ("" if passes(r) else "  <<<"))
    if left_out:
        print("not run for want of time:", ", ".join(left_out))
    ratios = [r["ratio"] for r in runs if "ratio" in r]
    if ratios:
        print(f"worst ratio {max(ratios):.3f} of {BAR} allowed; {sum(map(passes, runs))} of {len(runs)} runs pass")


def main():
    args = arguments()
    start = time.monotonic()
    until = start + args.max_seconds
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work = Path(tempfile.mkdtemp(prefix="tandem-numerics-", dir=args.work))
    runs, left_out = [], []

    def save():
        report = dict(bar=BAR, runs=runs, not_run=left_out, smollm2=smollm2, seconds=time.monotonic() - start)
        (args.out / "numerics.json").write_text(json.dumps(report, indent=1))

    smollm2 = check_smollm2(args) if args.smollm2 else []
    for shape in args.shapes:
        if time.monotonic() > until:
            left_out += [f"{shape} on {ranks}" for ranks in args.ranks]
            continue
        now = time.monotonic()
        done, rest = check_shape(args, shape, until)
        runs += done
        left_out += rest
        save()
        print(f"{shape}: {time.monotonic() - now:.1f} s", file=sys.stderr, flush=True)
    save()
    shutil.rmtree(args.work)
    print_table(runs, left_out)
    for summary in smollm2:
        print_smollm2(summary)
    ties = all(not s["errors"] and all(p["tie"] for p in s["places"]) for s in smollm2)
    sys.exit(0 if all(map(passes, runs)) and ties else 1)


if __name__ == "__main__":
    main()

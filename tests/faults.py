#!/usr/bin/env python3
"""Random faults: whatever happens to a run, it ends in time, says one line, and loses no answer that was finished.

    tests/faults.py TANDEM [N [SEED]]       N faults (200), four at a time; ends with "faults: N held"

A fault is a signal to a rank, or an output that cannot be written, at a random moment of generate, batch, bench or chat on one
to four CPU ranks. After it:
- no process of the run is left 20 s later;
- stderr has at most one error line, and no panic;
- the exit code is the one that belongs to the fault;
- every answer that a batch has reported as finished is in its output, whole and once.
Standard library only. A full disk is a small file system of its own, which needs root; without it that fault is not drawn.
"""
import concurrent.futures
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMIT = 20  # seconds from a fault to the end of the last process
# Far longer than any moment at which a fault comes.
ENDLESS = ["--temperature", "0", "--ignore-eos", "--max-tokens", "200000"]


def endless_model(folder):
    """A tiny model with room for answers of minutes; "ab" is answered after one token."""
    model = f"{folder}/model"
    shutil.copytree(f"{ROOT}/tests/golden/models/qwen2-tied", model)
    with open(f"{model}/config.json") as f:
        config = json.load(f)
    config["max_position_embeddings"] = 262144
    with open(f"{model}/config.json", "w") as f:
        json.dump(config, f)
    with open(f"{model}/generation_config.json", "w") as f:
        json.dump({"eos_token_id": [208], "do_sample": False}, f)
    with open(f"{model}/batch.jsonl", "w") as f:
        for n in range(41):
            f.write(json.dumps({"prompt": "ab" if n else "x y z", "n": n}) + "\n")
    return model


def children(pid):
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as f:
                for child in f.read().split():
                    found += [int(child), *children(int(child))]
    except OSError:
        pass
    return found


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


class Trial:
    """One run and its fault."""

    def __init__(self, tandem, model, folder, seed, disk):
        self.random = random.Random(seed)
        self.folder = f"{folder}/{seed}"
        os.mkdir(self.folder)
        self.tandem, self.model, self.disk = tandem, model, disk
        self.kind = self.random.choice(["text", "json", "batch", "batch", "bench", "chat"])
        self.ranks = self.random.randint(1, 4)
        faults = ["KILL", "TERM", "INT", "STOP", "stderr full", "stderr closed"]
        # An output breaks at the next write; of these kinds there is one within the limit.
        if self.kind in ("text", "batch", "chat"):
            faults += ["stdout full", "stdout closed"] + ["disk"] * (disk is not None)
        self.fault = self.random.choice(faults)
        # The bench stops, and starts, its runs itself.
        self.victim = 0 if self.kind == "bench" else self.random.randrange(self.ranks)
        if self.fault == "STOP" and self.victim == 0 and self.ranks == 1:
            self.fault = "KILL"  # Nobody is left to notice.
        if self.fault == "STOP" and self.kind == "bench":
            self.fault = "TERM"
        self.name = f"{seed}: {self.fault} of rank {self.victim} of {self.ranks}, {self.kind}"

    def command(self):
        common = ["--model", self.model, "--device", "cpu"]
        ranks = ["--ranks", str(self.ranks)]
        return {
            "text": ["generate", *common, *ranks, *ENDLESS, "--prompt", "x y z"],
            "json": ["generate", *common, *ranks, *ENDLESS, "--prompt", "x y z", "--json"],
            "batch": ["generate", *common, *ranks, "--max-tokens", "200000", "--prompts", f"{self.model}/batch.jsonl"],
            "bench": ["bench", "latency", *common, *ranks, "--max-tokens", "4", "--prompt-tokens", "9",
                      "--batch", ",".join(["1"] * 300), "--json", f"{self.folder}/bench.json"],
            "chat": ["chat", *common, *ranks, *ENDLESS, "--context", "262144"],
        }[self.kind]

    def open_outputs(self):
        """stdout and stderr, each a file, a device or a pipe as the fault wants it."""
        out, err = open(f"{self.folder}/out", "wb"), open(f"{self.folder}/err", "wb")
        self.out_path = f"{self.folder}/out"
        if self.fault == "disk":
            self.out_path = f"{self.disk}/{os.path.basename(self.folder)}"
            out = open(self.out_path, "wb")
        broken = {"full": lambda: open("/dev/full", "wb"), "closed": self.closed_pipe}
        if self.fault.startswith("stdout"):
            out = broken[self.fault.split()[1]]()
        if self.fault.startswith("stderr"):
            err = broken[self.fault.split()[1]]()
        return out, err

    @staticmethod
    def closed_pipe():
        reader, writer = os.pipe()
        os.close(reader)
        return os.fdopen(writer, "wb")

    def run(self):
        out, err = self.open_outputs()
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PMI", "OMPI", "RANK", "WORLD"))}
        process = subprocess.Popen([self.tandem, *self.command()], stdin=subprocess.PIPE, stdout=out, stderr=err,
                                   env=env, start_new_session=True)
        out.close()
        err.close()
        try:
            if self.kind == "chat":
                try:
                    process.stdin.write(b"x y z\n")
                    process.stdin.flush()
                except BrokenPipeError:
                    pass
            time.sleep(self.random.uniform(0, 2.5))
            ranks = [process.pid, *children(process.pid)]
            return self.judge(process, ranks, self.hit(process, ranks))
        finally:
            for pid in [process.pid, *children(process.pid)]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            process.wait()

    def hit(self, process, ranks):
        """Carries the fault out; the exit codes that may follow."""
        if self.fault in ("KILL", "TERM", "INT", "STOP"):
            number = getattr(signal, "SIG" + self.fault)
            # A run that is only starting may not have its ranks yet.
            victim = ranks[min(self.victim, len(ranks) - 1)]
            try:
                os.kill(victim, number)
            except ProcessLookupError:
                return None
            if self.fault == "STOP":
                return (1, -signal.SIGKILL) if victim == process.pid else (1,)
            return (-number, 128 + number) if victim == process.pid else (1,)
        if self.fault.startswith("stderr"):
            # It changes nothing: the run goes on until it is told to end.
            process.send_signal(signal.SIGTERM)
            return (-signal.SIGTERM, 128 + signal.SIGTERM)
        return (1,)

    def judge(self, process, ranks, codes):
        until = time.time() + LIMIT
        while time.time() < until and any(map(is_alive, ranks)):
            process.poll()
            time.sleep(0.02)
        left = [pid for pid in ranks if is_alive(pid)]
        if left:
            return f"{len(left)} of {len(ranks)} processes are left after {LIMIT} s"
        code = process.wait()
        if codes and code not in codes:
            return f"exit code {code}, not {codes}: {self.errors()[-1:]}"
        errors = self.errors()
        # Where rank 0 is gone, each rank speaks for itself.
        speakers = self.ranks if self.victim == 0 and self.fault in ("KILL", "STOP") else 1
        if any("panicked" in line for line in errors) or len(errors) > speakers:
            return f"stderr: {errors}"
        return self.lost_answers()

    def errors(self):
        if self.fault.startswith("stderr"):
            return []
        with open(f"{self.folder}/err", errors="replace") as f:
            lines = f.read().splitlines()
        return [line for line in lines if line.startswith("tandem: ") and "warning" not in line or "panic" in line]

    def lost_answers(self):
        """Answers that were reported on stderr and are not in the output; lines that are not whole."""
        if self.kind == "bench" and os.path.exists(f"{self.folder}/bench.json"):
            with open(f"{self.folder}/bench.json") as f:
                json.load(f)
        if self.kind != "batch" or self.fault.startswith("stdout"):
            return None
        with open(self.out_path) as f:
            text = f.read()
        try:
            found = [json.loads(line)["index"] for line in text.splitlines()]
        except (ValueError, KeyError) as e:
            return f"a line of the output is not whole: {e}"
        if len(set(found)) != len(found) or text and not text.endswith("\n"):
            return f"answers more than once, or the last one is cut: {sorted(found)}"
        if not self.fault.startswith("stderr"):
            with open(f"{self.folder}/err") as f:
                reported = sum(line.startswith("load ") for line in f)
            if len(found) < reported:
                return f"{reported} answers were finished, {len(found)} are in the output"
        return None


def small_disk(folder):
    """A file system without room for more than a few answers, or None."""
    place = f"{folder}/disk"
    os.mkdir(place)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", place]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode != 0:
        return None
    return place


def main():
    tandem = os.path.abspath(sys.argv[1])
    n = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else random.randrange(10**6)
    print(f"faults: {n} from seed {seed}", flush=True)
    folder = tempfile.mkdtemp(prefix="faults.")
    disk, broke, printing = None, 0, threading.Lock()
    try:
        model = endless_model(folder)
        disk = small_disk(folder)
        trials = [Trial(tandem, model, folder, seed + i, disk) for i in range(n)]
        with concurrent.futures.ThreadPoolExecutor(4) as at_a_time:
            for trial, wrong in zip(trials, at_a_time.map(Trial.run, trials)):
                if wrong:
                    broke += 1
                    with printing:
                        print(f"{trial.name}: {wrong}", flush=True)
    finally:
        if disk:
            subprocess.run(["umount", disk], check=True)
        shutil.rmtree(folder, ignore_errors=True)
    print(f"faults: {n - broke} held" + (f", {broke} did not" if broke else ""))
    sys.exit(broke > 0)


if __name__ == "__main__":
    main()

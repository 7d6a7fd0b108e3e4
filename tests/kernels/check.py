"""Checks every kernel: python check.py [--device cuda] [--rounds 20] [--real] [--only gemv]"""

import argparse
import time

import cases
from device import Cuda, Emulated, all_kernels

parser = argparse.ArgumentParser()
parser.add_argument("--device", choices=["emulate", "cuda"], default="emulate")
parser.add_argument("--rounds", type=int, default=20)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--real", action="store_true", help="also the sizes of real models")
parser.add_argument("--only", default="")
options = parser.parse_args()
device = Emulated() if options.device == "emulate" else Cuda()

work = [(case, {}, options.seed * 1000 + round) for case in cases.CASES for round in range(options.rounds)]
if options.real:
    work += [(case, arguments, options.seed) for case, arguments in cases.REAL]
failed, report = [], {}
for case, arguments, seed in work:
    if options.only not in case.__name__:
        continue
    begin = time.time()
    try:
        error = case(device, cases.Inputs(device, seed), **arguments)
    except (cases.Mismatch, RuntimeError) as e:
        failed.append(f"{case.__name__} {arguments} seed {seed}: {e}")
        error = float("inf")
    count, worst, seconds = report.get(case.__name__, (0, 0.0, 0.0))
    report[case.__name__] = count + 1, max(worst, error), seconds + time.time() - begin
for name, (count, worst, seconds) in report.items():
    print(f"{name:20}{count:4} runs on the {device.name}, worst error {worst:.1e}, {seconds:.1f} s")
if not options.only:
    failed += [f"{kernel} of {file}.cu: in no case" for file, kernel in all_kernels() if (file, kernel) not in device.launched]
print("\n".join(failed[:20]))
print(f"{len(failed)} failed")
raise SystemExit(1 if failed else 0)

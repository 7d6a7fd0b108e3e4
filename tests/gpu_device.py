"""Memory of a GPU through the driver alone, without torch.

    python3 gpu_device.py hold ORDINAL LEAVE_MIB        fills the GPU but for LEAVE_MIB, prints "held", waits for SIGTERM
    python3 gpu_device.py context                       MiB that an idle CUDA context takes
    python3 gpu_device.py peak N_GPUS -- COMMAND …      runs it; prints JSON: each GPU's bytes in use before, and at most
                                                        meanwhile (sampled 20 times a second), the most host memory that
                                                        it and its children held, and the command's stdout
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading

MIB = 1 << 20


def check(code, what):
    if code:
        sys.exit(f"gpu_device.py: {what}: error {code}")


class Cuda:
    """The calls of libcuda that are needed here, with the primary context of one GPU."""

    def __init__(self, ordinal):
        self.lib = ctypes.CDLL("libcuda.so.1")
        check(self.lib.cuInit(0), "cuInit")
        self.device = ctypes.c_int()
        check(self.lib.cuDeviceGet(ctypes.byref(self.device), ordinal), f"GPU {ordinal}")
        context = ctypes.c_void_p()
        check(self.lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), self.device), "context")
        check(self.lib.cuCtxSetCurrent(context), "context")

    def free(self):
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        check(self.lib.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)), "cuMemGetInfo")
        return free.value

    def alloc(self, size):
        return self.lib.cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(size)) == 0


class Nvml:
    """Bytes in use on a GPU, whoever uses them."""

    class Memory(ctypes.Structure):
        _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]

    def __init__(self):
        self.lib = ctypes.CDLL("libnvidia-ml.so.1")
        check(self.lib.nvmlInit_v2(), "nvmlInit")

    def used(self, index):
        device, memory = ctypes.c_void_p(), self.Memory()
        check(self.lib.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)), f"GPU {index}")
        check(self.lib.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)), f"memory of GPU {index}")
        return memory.used


def hold(ordinal, leave_mib):
    cuda = Cuda(ordinal)
    for size in (1024 * MIB, 64 * MIB, 2 * MIB):
        while cuda.free() >= leave_mib * MIB + size and cuda.alloc(size):
            pass
    print("held", cuda.free() // MIB, flush=True)
    signal.sigwait({signal.SIGTERM})


def context():
    nvml = Nvml()
    before = nvml.used(0)
    Cuda(0)
    print((nvml.used(0) - before) // MIB)


def resident(pid):
    """Bytes of host memory that a process and its children hold; a child that is just ending counts for nothing."""
    try:
        with open(f"/proc/{pid}/statm") as statm:
            total = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = []
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as listed:
                children += listed.read().split()
    except OSError:
        return 0
    return total + sum(resident(child) for child in children)


def peak(n_gpus, command):
    nvml = Nvml()
    before = [nvml.used(i) for i in range(n_gpus)]
    most, host, done = list(before), [0], threading.Event()

    def sample():
        while not done.wait(0.05):
            for i in range(n_gpus):
                most[i] = max(most[i], nvml.used(i))
            host[0] = max(host[0], resident(run.pid))

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            stdout, _ = run.communicate()
        finally:
            done.set()
            sampler.join()
    print(json.dumps(dict(before=before, most=most, host=host[0], rc=run.returncode, stdout=stdout)))


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "hold":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        hold(int(rest[0]), int(rest[1]))
    elif what == "context":
        context()
    elif what == "peak":
        peak(int(rest[0]), rest[2:])
    else:
        sys.exit(__doc__)

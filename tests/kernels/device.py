"""Launches the kernels of kernels/ on the CPU's emulation or on a GPU, with torch tensors as memory."""

import concurrent.futures
import contextlib
import ctypes
import functools
import os
import pathlib
import re
import subprocess
import tempfile

import torch

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "kernels"
HEADERS = ["common.cuh", "gemv_out.cuh", "rope.cuh", "rows.cuh", "softmax.cuh", "wgmma.cuh"]


@functools.cache
def n_parameters(source, file, kernel):
    """As the source declares them, there for all widths at once where the kernel's name ends in one."""
    declared = re.search(rf"\b(?:{kernel}|{re.sub(r'_[0-9]+$', '_##D', kernel)})\(([^)]*)\)\s*[{{\\]", (source / f"{file}.cu").read_text())
    return len(declared[1].split(","))


def arguments(source, file, kernel, args):
    """`void**` for a launch: tensors as pointers, None as null, ints as 32 bits, floats as f32."""
    # Of a list too short the launch would read past the end.
    wanted = n_parameters(source, file, kernel)
    assert len(args) == wanted, f"{kernel} takes {wanted} arguments, not {len(args)}"
    values = []
    for a in args:
        if isinstance(a, torch.Tensor):
            assert a.is_contiguous()
            values.append(ctypes.c_void_p(a.data_ptr()))
        elif a is None:
            values.append(ctypes.c_void_p(0))
        elif isinstance(a, float):
            values.append(ctypes.c_float(a))
        else:
            values.append(ctypes.c_uint32(a & 0xFFFFFFFF))
    array = (ctypes.c_void_p * len(values))(*[ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values])
    return array, values


def triple(v):
    v = (v,) if isinstance(v, int) else tuple(v)
    return v + (1,) * (3 - len(v))


def all_kernels():
    """Every (file, kernel) that the files name themselves."""
    for file in sorted(KERNELS.glob("*.cu")):
        for names in re.findall(r"^KERNELS(?:_IN_ORDER)?\(([^)]*)\)", file.read_text(), re.M):
            yield from ((file.stem, name.strip()) for name in names.split(","))


class Emulated:
    """Kernels as host code: bounds, races and barriers are checked."""

    name = "emulation"
    torch_device = "cpu"
    has_wgmma = True
    sms = 6  # few blocks, so that their loops over the work are walked

    def __init__(self, source=KERNELS, defines=()):
        self.source, self.defines, self.libraries, self.seed = pathlib.Path(source), list(defines), {}, 1
        self.launched = set()
        self.folder = tempfile.TemporaryDirectory()

    def library(self, file):
        if file not in self.libraries:
            out = os.path.join(self.folder.name, file + ".so")
            command = ["g++", "-std=c++17", "-O2", "-w", "-shared", "-fPIC", "-DTANDEM_EMULATE", *self.defines]
            subprocess.run([*command, "-x", "c++", str(self.source / (file + ".cu")), "-o", out], check=True)
            self.libraries[file] = ctypes.CDLL(out)
        return self.libraries[file]

    def launch(self, file, kernel, grid, block, *args, shared=0):
        lib = self.library(file)
        self.launched.add((file, kernel))
        packed, keep = arguments(self.source, file, kernel, args)
        error = ctypes.create_string_buffer(512)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        for t in tensors:
            lib.tandem_emulate_register(ctypes.c_void_p(t.data_ptr()), ctypes.c_size_t(t.nbytes))
        self.seed += 1
        rc = lib.tandem_emulate_launch(
            kernel.encode(), (ctypes.c_uint * 3)(*triple(grid)), (ctypes.c_uint * 3)(*triple(block)), ctypes.c_uint(shared), packed,
            ctypes.c_uint64(self.seed), error, ctypes.c_size_t(512))
        for t in tensors:
            lib.tandem_emulate_unregister(ctypes.c_void_p(t.data_ptr()))
        if rc != 0:
            raise RuntimeError(error.value.decode())

    def synchronize(self):
        pass

    @contextlib.contextmanager
    def sharing(self, file, tensors):
        """Memory that kernels reach through pointers in memory."""
        lib = self.library(file)
        for t in tensors:
            lib.tandem_emulate_register(ctypes.c_void_p(t.data_ptr()), ctypes.c_size_t(t.nbytes))
        try:
            yield
        finally:
            for t in tensors:
                lib.tandem_emulate_unregister(ctypes.c_void_p(t.data_ptr()))

    def together(self, launches):
        """Runs launches that wait for each other."""
        with concurrent.futures.ThreadPoolExecutor(len(launches)) as pool:
            for f in [pool.submit(launch) for launch in launches]:
                f.result()


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class Config(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
                ("attributes", ctypes.POINTER(Attribute)), ("n_attributes", ctypes.c_uint)]


PROGRAMMATIC_STREAM_SERIALIZATION, MAX_DYNAMIC_SHARED_SIZE_BYTES = 6, 8


def nvrtc_library():
    """NVRTC of the loader's path or of pip's nvidia packages."""
    packages = pathlib.Path(torch.__file__).resolve().parents[1] / "nvidia"
    found = sorted(packages.glob("*/lib/libnvrtc.so.*")) + sorted(packages.glob("cuda_nvrtc/lib/libnvrtc.so.*"))
    return ctypes.CDLL(str(found[-1]) if found else "libnvrtc.so")


class Nvrtc:
    """Compiles a kernel file with no header but our own."""

    def __init__(self):
        self.lib = nvrtc_library()

    def sized(self, program, size, get):
        n = ctypes.c_size_t()
        getattr(self.lib, size)(program, ctypes.byref(n))
        out = ctypes.create_string_buffer(n.value)
        getattr(self.lib, get)(program, out)
        return out.raw

    def compile(self, source, file, arch, defines=()):
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(HEADERS))(*[(source / h).read_bytes() for h in HEADERS])
        names = (ctypes.c_char_p * len(HEADERS))(*[h.encode() for h in HEADERS])
        self.lib.nvrtcCreateProgram(ctypes.byref(program), (source / (file + ".cu")).read_bytes(), (file + ".cu").encode(), len(HEADERS), texts, names)
        options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", *[d.encode() for d in defines]]
        if self.lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)) != 0:
            raise RuntimeError(self.sized(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").decode())
        return self.sized(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")


class Cuda:
    """Kernels through NVRTC and the driver, on torch's current stream."""

    name = "GPU"
    torch_device = "cuda"

    def __init__(self, source=KERNELS, defines=(), overlap=True):
        self.driver, self.nvrtc, self.overlap = ctypes.CDLL("libcuda.so.1"), Nvrtc(), overlap
        self.source, self.defines, self.modules, self.functions = pathlib.Path(source), list(defines), {}, {}
        self.launched = set()
        torch.zeros(1, device="cuda")
        properties = torch.cuda.get_device_properties(0)
        self.sms = properties.multi_processor_count
        self.has_wgmma = (properties.major, properties.minor) == (9, 0)
        self.arch = f"sm_{properties.major}{properties.minor}" + ("a" if properties.major >= 9 else "")

    def check(self, result):
        if result != 0:
            raise RuntimeError(f"driver error {result}")

    def function(self, file, kernel, shared):
        if (file, kernel) not in self.functions:
            if file not in self.modules:
                self.modules[file] = ctypes.c_void_p()
                cubin = self.nvrtc.compile(self.source, file, self.arch, self.defines)
                self.check(self.driver.cuModuleLoadData(ctypes.byref(self.modules[file]), cubin))
            f = ctypes.c_void_p()
            self.check(self.driver.cuModuleGetFunction(ctypes.byref(f), self.modules[file], kernel.encode()))
            if shared > 48 << 10:
                self.check(self.driver.cuFuncSetAttribute(f, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared))
            self.functions[file, kernel] = f
        return self.functions[file, kernel]

    def launch(self, file, kernel, grid, block, *args, shared=0):
        self.launched.add((file, kernel))
        packed, keep = arguments(self.source, file, kernel, args)
        attribute = Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1))
        config = Config(triple(grid), triple(block), shared, torch.cuda.current_stream().cuda_stream, ctypes.pointer(attribute), 1 if self.overlap else 0)
        self.check(self.driver.cuLaunchKernelEx(ctypes.byref(config), self.function(file, kernel, shared), packed, None))

    def synchronize(self):
        torch.cuda.synchronize()

    @contextlib.contextmanager
    def sharing(self, file, tensors):
        yield

    def together(self, launches):
        # Ranks that share a GPU: launched ahead of their time, one rank's blocks could leave no room for the other's.
        overlap, self.overlap = self.overlap, False
        torch.cuda.synchronize()
        for launch in launches:
            with torch.cuda.stream(torch.cuda.Stream()):
                launch()
        torch.cuda.synchronize()
        self.overlap = overlap

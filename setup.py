"""Builds the operators: csrc/cpu and csrc/torch, and csrc/cuda where there is a CUDA toolkit.

Everything else about the package is in pyproject.toml. Two environment variables are read here:

ELASTIC_CACHE_CUDA   auto (default): build CUDA sources if there are any, torch has CUDA and nvcc
                     is installed; 0: never; 1: stop if they cannot be built. Whether a GPU is
                     visible does not matter: machines that build often have none.
ELASTIC_CACHE_MARCH  value of -march. Default "native", because a local build runs where it is
                     built and the kernels are only as fast as the instructions they may use
                     (AVX2 and FMA on x86-64); for machines that share a build, give the
                     oldest one's level, such as x86-64-v3.
"""

import os
import shutil
import site
import sys
from glob import glob

from setuptools import setup


def use_torch_of_the_environment() -> None:
    """pip hides the environment's packages from an isolated build, but torch must be the same
    at build time and at run time, so the environment's torch is found again here."""
    sys.path += [path for path in site.getsitepackages() if path not in sys.path]


try:
    import torch
except ImportError:
    use_torch_of_the_environment()
try:
    import torch
    from torch.utils.cpp_extension import (
        CUDA_HOME,
        BuildExtension,
        CppExtension,
        CUDAExtension,
        include_paths,
    )
except ImportError as error:
    sys.exit(
        f"elastic_cache needs torch >= 2.11 in this environment ({error}): run `pip install "
        "torch==2.13.0`, then `pip install --no-build-isolation -e .`"
    )
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    sys.exit(
        f"elastic_cache needs torch >= 2.11, this environment has {torch.__version__}: run "
        "`pip install torch==2.13.0`"
    )
if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
    sys.exit(
        "elastic_cache needs a C++20 compiler and found none: run `apt-get install g++` (or your "
        "system's equivalent), or set CXX to the compiler"
    )

ROOT = os.path.dirname(os.path.abspath(__file__))
CPU_SOURCES = sorted(glob("csrc/cpu/*.cpp") + glob("csrc/torch/*.cpp"))
CUDA_SOURCES = sorted(glob("csrc/cuda/**/*.cu", recursive=True))


def builds_cuda() -> bool:
    """Whether the CUDA kernels are part of this build."""
    wish = os.environ.get("ELASTIC_CACHE_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"ELASTIC_CACHE_CUDA must be auto, 0 or 1, got {wish!r}")
    missing = [
        what
        for what, is_there in (
            ("a torch built with CUDA", torch.version.cuda),
            ("nvcc (set CUDA_HOME)", CUDA_HOME),
            ("CUDA sources in csrc/cuda", CUDA_SOURCES),
        )
        if not is_there
    ]
    if wish == "1" and missing:
        sys.exit(f"ELASTIC_CACHE_CUDA=1, but this build lacks {' and '.join(missing)}")
    return wish != "0" and not missing


def extension():
    """The one shared object, elastic_cache/_ops.abi3.so."""
    has_cuda = builds_cuda()
    # One build runs on every torch from 2.11 on: libtorch's stable ABI, as of 2.11.
    macros = [("TORCH_TARGET_VERSION", "0x020b000000000000")]
    host = ["-O3", "-std=c++20", "-Wall", "-Wextra", "-fvisibility=hidden"]
    # Warnings are for this project's code, not for torch's headers.
    host += [f"-isystem{path}" for path in include_paths()]
    # Error messages carry file names: keep them as short as in the repository.
    host += [f"-ffile-prefix-map={ROOT}/="]
    # The kernels are OpenMP, but nothing is linked with -fopenmp: the symbols then resolve to
    # the OpenMP runtime torch has already loaded. Two runtimes would be two pools of threads
    # that fight for the same cores.
    host += [f"-march={os.environ.get('ELASTIC_CACHE_MARCH', 'native')}", "-fopenmp"]
    flags = {"cxx": host}
    if has_cuda:
        # USE_CUDA: torch's header declares what gives its current stream only then.
        macros += [("ELASTIC_CACHE_CUDA", None), ("USE_CUDA", None)]
        # torch raises IndexError when no GPU is visible and no architecture is given. The PTX is
        # what GPUs newer than 9.0 run; only 9.0a, not 9.0, has wgmma. No nvcc flag may contain
        # "arch": torch would then drop all -gencode flags, so -march stays with the host compiler.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
        if "9.0a" in os.environ["TORCH_CUDA_ARCH_LIST"]:
            macros += [("ELASTIC_CACHE_SM90A", None)]
        flags["nvcc"] = ["-O3", "-std=c++20", "-lineinfo", "-Xptxas", "-v,--warn-on-spills"]
    kind = CUDAExtension if has_cuda else CppExtension
    return kind(
        "elastic_cache._ops",
        CPU_SOURCES + (CUDA_SOURCES if has_cuda else []),
        include_dirs=[os.path.join(ROOT, "csrc/include"), os.path.join(ROOT, "csrc/cuda")],
        define_macros=macros,
        extra_compile_args=flags,
        py_limited_api=True,
    )


class BuildOps(BuildExtension):
    """Keeps object files between builds; an editable install would compile everything anew."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = "build/temp"


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildOps},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

"""Builds the C++ kernels as one abi3 extension, or says plainly that it did not.

fastguard works without a compiler: the ops then run on PyTorch products and PyTorch element-wise code
(backend "portable"). `fastguard doctor` shows which backend serves which op, and why.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
os.chdir(ROOT)


def extension():
    """The extension and its build command, or the reason why there is none."""
    if os.environ.get("FASTGUARD_NO_EXTENSION") == "1":
        return None, "FASTGUARD_NO_EXTENSION=1"
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return None, "torch is not importable in the build (use pip install --no-build-isolation)"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return None, "no C++ compiler found"
    # No -march: one binary for every CPU of the architecture; the hot loops are cloned per instruction set
    # in the source and chosen when the library is loaded.
    flags = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.cpp"))
    sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    module = CppExtension(
        "fastguard._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": flags},
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030B0000")],
        py_limited_api=True,
    )
    module.optional = True  # a failing compiler must not fail the installation
    return (module, BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)), None


built, reason = extension()
if built is None:
    print(f"fastguard: building without C++ kernels ({reason}); ops fall back to PyTorch", file=sys.stderr)
    setup()
else:
    setup(
        ext_modules=[built[0]],
        cmdclass={"build_ext": built[1]},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )

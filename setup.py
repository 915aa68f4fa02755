"""Builds the C++ kernels as one abi3 extension, or says plainly that it did not.

fastguard works without them: the ops then run on PyTorch products and PyTorch element-wise code (backend "portable").
So neither a missing nor a failing compiler fails the installation; the reason is left in the package, in
``fastguard/_extension.txt``, where `fastguard doctor` finds it, and the wheel is tagged as what it is, py3-none-any.

FASTGUARD_NO_EXTENSION=1       does not try
FASTGUARD_REQUIRE_EXTENSION=1  fails where the kernels cannot be built; so does `python setup.py build_ext`
"""

import contextlib
import os
import shutil
import sys
import threading
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
from build_backend import unbuildable  # noqa: E402

NOTE = "_extension.txt"
REQUIRED = os.environ.get("FASTGUARD_REQUIRE_EXTENSION") == "1" or "build_ext" in sys.argv


def extension():
    """The extension, the command that builds it, and the reason why it cannot be built."""
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
    reason = unbuildable()
    if reason is None:
        try:
            from torch.utils.cpp_extension import BuildExtension, CppExtension
        except ImportError as error:
            reason = f"torch was not importable where it was built ({error})"
    if reason is not None:
        return Extension("fastguard._C", sources, py_limited_api=True), build_ext, reason
    # No -march: one binary for every CPU of the architecture; the hot loops are cloned per instruction set
    # in the source and chosen when the library is loaded.
    flags = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    module = CppExtension(
        "fastguard._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": flags},
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030B0000")],
        py_limited_api=True,
    )
    return module, BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None), None


@contextlib.contextmanager
def overheard():
    """What this process and its children print: passed on, and kept in the list that is given."""
    heard = []
    sys.stdout.flush()
    sys.stderr.flush()
    real = os.dup(1), os.dup(2)
    end, mouth = os.pipe()

    def pass_on():
        while chunk := os.read(end, 65536):
            heard.append(chunk)
            os.write(real[0], chunk)

    listener = threading.Thread(target=pass_on, daemon=True)
    os.dup2(mouth, 1)
    os.dup2(mouth, 2)
    os.close(mouth)
    listener.start()
    try:
        yield heard
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(real[0], 1)
        os.dup2(real[1], 2)
        listener.join(timeout=5)  # a compiler cache's server may hold the other end open
        if not listener.is_alive():
            for descriptor in (end, *real):
                os.close(descriptor)


MODULE, COMMAND, REASON = extension()


class BuildKernels(COMMAND):
    """Builds the kernels; where it cannot, leaves a note in their place."""

    def run(self):
        """Build, or note why not. Raises what went wrong where the kernels are required."""
        if self.editable_mode:
            self.inplace = True
        target = Path(self.get_ext_fullpath("fastguard._C"))
        note = target.with_name(NOTE)
        note.unlink(missing_ok=True)
        with overheard() as heard:
            try:
                if REASON is None:
                    super().run()
                    return
                reason = REASON
            except Exception as error:  # compilers, linkers, ninja and torch's checks all raise their own
                if REQUIRED:
                    raise
                reason = f"the compiler failed ({type(error).__name__}: {error})"
        if REQUIRED:
            raise SystemExit(f"fastguard: the C++ kernels are required and cannot be built: {reason}")
        printed = b"".join(heard).decode(errors="replace").splitlines()
        said = dict.fromkeys(line.strip()[:300] for line in printed if "error" in line.lower())
        lines = [reason, *list(said)[:3]]
        print("fastguard: built WITHOUT the C++ kernels:", "\n  ".join(lines), file=sys.stderr)
        target.unlink(missing_ok=True)  # of an earlier build: it would not be what the sources say
        target.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("\n".join(lines) + "\n")
        self.extensions, self.distribution.ext_modules = [], []


class TaggedWheel(bdist_wheel):
    """A wheel whose tags say whether there are kernels in it, which only the build can tell."""

    def run(self):
        """Build first, then tag."""
        self.run_command("build")
        self.skip_build = True
        if not self.distribution.ext_modules:
            self.root_is_pure, self.py_limited_api = True, False
        super().run()


setup(
    ext_modules=[MODULE],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": TaggedWheel},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

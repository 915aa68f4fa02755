"""What the host does to launch the GPU kernels, read off without a GPU.

Every op runs, forward and backward, on fake tensors of a GPU that is not the current one, with its own body and with
launches that only look at what they are given: the device of their tensors must be current, the arguments the kernel's.
A wait for the device (an item, a size that depends on data, a copy to the host) has no answer on fake tensors: it fails
the test. What passes can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import triton
from fastguard.ops import launch, orthonormal
from fastguard.ops.abs_weight_grad import abs_weight_grad_
from fastguard.ops.add_project_rms_norm import add_project_rms_norm
from fastguard.ops.class_moments import class_moments_
from fastguard.ops.column_norms import column_norms_
from fastguard.ops.gaussian_mmd import gaussian_mmd
from fastguard.ops.gram import gram_
from fastguard.ops.head_kl import head_kl
from fastguard.ops.lm_head_stats import op as lm_head
from fastguard.ops.lm_head_stats.triton import backward_pass, hopper
from fastguard.ops.masks import apply_mask_, count_bits, pack_mask, unpack_mask
from fastguard.ops.masks import triton as masks
from fastguard.ops.multi_tensor import triton as tables
from fastguard.ops.multi_tensor.scalars import AdamW
from fastguard.ops.project_out import project_out, project_out_
from fastguard.ops.representation_distance import representation_distance
from fastguard.ops.threshold_select import triton as selection
from fastguard.ops.vocabulary import Head

DEVICE = torch.device("cuda", 1)


class Context(SimpleNamespace):
    """What autograd hands to an op's formula."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


class OwnBodies(TorchDispatchMode):
    """Runs the bodies of the ops, then those of their backwards; nothing may come to the host."""

    backwards = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastguard":
            with self:
                return self.both(OPDEFS[func._schema.name], args)
        out = func(*args, **(kwargs or {}))
        if any(t.device.type == "cuda" for t in tensors_of((args, kwargs))):
            assert all(t.device.type == "cuda" for t in tensors_of(out)), f"{func} brings a tensor to the host"
        return out

    def both(self, definition, args):
        out = definition._init_fn(*args)
        if definition._backward_fn is not None and not self.backwards:
            self.backwards = True
            names = [a.name for a in definition._opoverload._schema.arguments]
            needed = [isinstance(a, torch.Tensor) and name != "basis" for a, name in zip(args, names, strict=True)]
            context = Context(needs_input_grad=needed)
            context.set_materialize_grads = context.mark_non_differentiable = lambda *_: None
            if definition._setup_context_fn is not None:
                definition._setup_context_fn(context, args, out)
            definition._backward_fn(context, *(torch.empty_like(t) for t in tensors_of(out)))
            self.backwards = False
        return out


def tensors_of(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def item(tensor, key):
    """tensor[key]: a torch that was built without CUDA does not index what is, or is said to be, on a GPU."""
    axis = 0
    for part in key if isinstance(key, tuple) else (key,):
        if part is None:
            tensor = tensor.unsqueeze(axis)
        elif isinstance(part, int):
            tensor = tensor.select(axis, part)
            continue
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice(tensor, axis, part.start, part.stop, part.step or 1)
        else:
            # A mask, whose count nobody knows, is none of what index_select takes.
            tensor = tensor.index_select(axis, part.flatten()).unflatten(axis, part.shape)
        axis += 1
    return tensor


@pytest.fixture
def launched(monkeypatch):
    """Fake tensors, and the names of the kernels that were launched on them."""
    monkeypatch.setenv("FASTGUARD_BACKEND", "triton")  # unproven there, as everywhere
    current, names = [torch.device("cuda", 0)], []

    def run(kernel, *args, grid, warmup, **kwargs):
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        bound = inspect.signature(kernel.fn).bind(*args, **kwargs)  # a TypeError if they are not the kernel's
        assert all(isinstance(value, int) and value > 0 for value in (*grid, *options.values()))
        for name, value in bound.arguments.items():
            for leaf in tree_leaves(value):
                if isinstance(leaf, torch.Tensor):
                    assert leaf.device == DEVICE, f"{kernel.__name__}: {name} is on {leaf.device}"
        assert current[0] == DEVICE, f"{kernel.__name__} was launched on {current[0]}"
        names.append(kernel.__name__)

    @contextlib.contextmanager
    def device_of(tensor):
        before, current[0] = current[0], tensor.device
        yield
        current[0] = before

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    properties = SimpleNamespace(name="a GPU", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: SimpleNamespace(stream_id=7))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(launch, "shared_memory", lambda _: 227 * 1024)
    launch.chip.cache_clear()
    monkeypatch.setattr(FakeTensor, "__getitem__", item)
    monkeypatch.setattr(FakeTensor, "copy_", lambda t, source: torch.ops.aten.copy_(t, source))
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda t: t.untyped_storage()._cdata << 16)  # each its own megabyte
    monkeypatch.setattr(torch, "_assert_async", lambda *_: None)
    with FakeTensorMode(), OwnBodies(), torch.no_grad():
        yield names
    launch.chip.cache_clear()


def new(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def basis(k, width):
    q = new(k, width, dtype=torch.float32)
    orthonormal._seen[q] = q._version  # looked at in an earlier call
    return q


def test_waits_and_a_launch_on_another_device_are_seen(launched):
    x = new(3, 4)
    with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        bool((x > 0).any())
    with pytest.raises(AssertionError, match="to the host"):
        torch.ops.aten._to_copy(x, device="cpu")
    with pytest.raises(AssertionError, match="launched on cuda:0"):
        masks.pack_kernel[(1,)](x, x, 12, CHUNK=masks.CHUNK)
    with pytest.raises(TypeError, match="CHUNK"), torch.cuda.device_of(x):
        masks.pack_kernel[(1,)](x, x, 12)


def test_project_out(launched):
    for k in (1, 20):
        project_out(new(3, 40, 576), basis(k, 576))
        project_out_(new(120, 576), basis(k, 576))
    project_out(new(3, 40, 576), basis(2, 576), preserve_norm=True)
    assert set(launched) == {"project_kernel", "project_tile_kernel", "project_gradient_kernel"}


@pytest.mark.parametrize("k", [None, 3, 20])
def test_add_project_rms_norm(launched, k):
    r, u, w = new(3, 40, 576), new(3, 40, 576), new(576)
    add_project_rms_norm(r, u, None if k is None else basis(k, 576), w, 1e-5)
    assert "norm_gradient_kernel" in launched


def test_gaussian_mmd(launched):
    x, mask = new(2, 4, 33 * 128), new(4, 33, dtype=torch.bool)
    gaussian_mmd(x, mask, call=new(dtype=torch.int64))
    gaussian_mmd(new(2, 4, 33 * 128), call=new(dtype=torch.int64))
    assert {"order_kernel", "gram_kernel", "reduce_kernel", "mmd_kernel", "gradient_kernel"} <= set(launched)


@pytest.mark.parametrize("kind", ["l2", "cosine"])
def test_representation_distance(launched, kind):
    a, b, mask = new(3, 33, 128), new(3, 33, 128), new(33, dtype=torch.bool)
    representation_distance(a, b, mask, kind=kind)
    assert len(launched) >= 2


def test_head_kl(launched):
    student, teacher, weight = new(70, 64), new(70, 64), new(1000, 64)
    head_kl(student, teacher, weight, softcap=30.0)
    assert set(launched) == {"scan_kernel", "combine_kernel", "dlogit_kernel"}


@pytest.mark.parametrize("dtype, softcap, with_mean", [(torch.bfloat16, 0.0, False), (torch.float16, 30.0, True)])
def test_lm_head_stats(launched, dtype, softcap, with_mean, monkeypatch):
    """How many columns live is not known to the host: it launches for all that may be, and works on those of none."""
    monkeypatch.setattr(lm_head, "_valid", lambda *_: None)  # which waits, once for each target
    n, v, places = 300, 20000, 1024
    monkeypatch.setattr(backward_pass, "WINDOW_ELEMENTS", 0)
    hidden, weight, bias, target = new(n, 64, dtype=dtype), new(v, 64, dtype=dtype), new(v), new(n, dtype=torch.int64)

    def run(filter_tol):
        launched.clear()
        torch.ops.fastguard.lm_head_stats(
            hidden, None, weight, bias, target, "none", None, None, 0.0, 1.0, softcap, filter_tol, with_mean,
            filter_tol > 0, 0, None,
        )  # fmt: skip

    run(0.05)
    assert set(launched) == {
        "target_kernel", "scan_descriptors_kernel", "combine_kernel", "mark_kernel", "compact_kernel", "order_kernel",
        "floor_kernel", "weigh_kernel", "dlogit_kernel", "dx_kernel", "wanted_kernel", "dweight_kernel", "tail_kernel",
        "add_rows_kernel",
    }  # fmt: skip
    assert launched.count("dlogit_kernel") == launched.count("dweight_kernel") == -(-v // places)
    run(0.0)
    assert launched[-1] == "gradient_kernel" and "dlogit_kernel" not in launched


def test_a_scan_by_descriptors_is_launched_where_its_blocks_fit(launched, monkeypatch):
    """Consumer GPUs of compute capability 12 have descriptors, and 99 KiB of shared memory."""
    x, head = new(128, 64), Head(new(1000, 64))
    for capability, size, want in (((9, 0), 227, True), ((12, 0), 99, False), ((8, 0), 163, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        monkeypatch.setattr(launch, "shared_memory", lambda _, size=size: size * 1024)
        launch.chip.cache_clear()
        assert hopper.serves(x, head) == want


def test_scores_and_activations(launched):
    dy, x = new(2, 30, 96), new(2, 30, 64)
    wide = {"dtype": torch.float32}
    bounds = new(2, 2, dtype=torch.int64)
    abs_weight_grad_(new(96, 64, **wide), dy, x, squared=new(96, 64, **wide))
    column_norms_(new(64, **wide), x.view(60, 64), bounds=bounds)
    gram_(new(64, 64, **wide), x.view(60, 64), bounds=bounds)
    class_moments_(
        new(2, dtype=torch.int64), new(2, 3, 64, **wide), new(2, 3, 64, **wide), x, new(2, dtype=torch.int64),
        positions=new(2, 3, dtype=torch.int64), second=new(2, 3, 64, **wide), second_rest=new(2, 3, 64, **wide),
    )  # fmt: skip
    assert {"sums_kernel", "squares_kernel", "gram_kernel", "moments_kernel"} <= set(launched)


def test_passes_of_threshold_select(launched):
    """The op itself waits once, between two passes."""
    scores, key = [new(33, 70), new(5, 1)], new(dtype=torch.int64)
    selection.histogram(scores, None, torch.bfloat16, None, 5, 11)
    selection.histogram(scores, None, torch.bfloat16, key, 0, 5)
    selection.ties(scores, scores, torch.bfloat16, key)
    of_rows, cut, _ = selection.rows(scores[0], None, torch.bfloat16, 3)
    selection.write(scores[0], None, torch.bfloat16, of_rows, cut)
    names = ["histogram_kernel"] * 4 + ["ties_kernel"] * 2 + ["rows_kernel", "write_kernel"]
    assert launched == names


def test_masks(launched):
    packed = pack_mask(new(100, 7, dtype=torch.bool))
    unpack_mask(packed, (100, 7))
    apply_mask_(new(100, 7), packed)
    count_bits(packed)
    assert launched == ["pack_kernel", "unpack_kernel", "apply_kernel"]


def test_multi_tensor_keeps_its_tables_but_those_of_a_graph(launched, monkeypatch):
    uploads, capturing = [], False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(FakeTensor, "pin_memory", lambda values: uploads.append(values) or values, raising=False)
    for name in ("_chunks", "_addresses"):
        monkeypatch.setattr(tables, f"_kept{name}", functools.lru_cache(getattr(tables, name)))
    monkeypatch.setattr(tables, "_captured", [])
    a, b, c, d = ([new(33, 7, dtype=torch.float32), new(5, dtype=torch.float32)] for _ in range(4))
    scalars = AdamW.at(1, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)

    def all_of_them():
        tables.squared_norm(a)
        tables.dot(a, b)
        tables.accumulate_(a, b, 0.5)
        tables.perturb_(a, b, new(dtype=torch.float32), None, None)
        tables.adamw_(a, b, c, d, scalars)

    all_of_them()
    assert set(launched) == {"dot_kernel", "accumulate_kernel", "perturb_kernel", "adamw_kernel"}
    once = len(uploads)
    assert once == 3 + 3  # of the sizes, and the addresses of one list, of two and of four
    all_of_them()
    assert len(uploads) == once
    capturing = True  # whatever its copies read must stay, and no table may stand in the cache before a replay
    all_of_them()
    assert len(uploads) == once and len(tables._captured) == 5 * 4


@pytest.mark.parametrize(
    "setting, want",
    [
        ("torch.set_float32_matmul_precision('high')", "tf32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", "ieee"),
    ],
)
def test_products_are_as_precise_as_torch_was_told(setting, want):
    """In a process of its own: nothing takes these settings back."""
    code = f"import torch\n{setting}\nfrom fastguard.ops import launch\nprint(launch.precision())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == want

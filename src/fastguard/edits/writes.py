"""Which tensors of a model's files write to its residual stream, found by what they do and not by their names.

A small random model of the same architecture, with as many layers, is made from the configuration. In it a parameter
is a write if taking one direction out of it takes that direction, and nothing else, out of what its layer adds to the
stream: an attention's last product does, its first does not. All writes together must then leave the stream
orthogonal to the direction at every layer; where they do not (a norm behind the embedding, a layer of an unknown
kind) the model is refused. A norm between a write and the stream (Gemma 2 and 3, OLMo 2) is found on the way.

What these parameters are called on disk, and how they lie there, is found by painting: each is filled with numbers that
say which it is and which feature of the stream they belong to, saved as transformers saves the architecture, and looked
for in the file. Experts that one parameter holds in memory and many tensors on disk are met by that, and so is GPT-2's
transposed Conv1D.
"""

from __future__ import annotations

import contextlib
import copy
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastguard.directions.edit import followed_by_norm, orthogonalise
from fastguard.taps import find_structure
from fastguard.taps.taps import first_tensor

if TYPE_CHECKING:
    from fastguard.edits.shards import Folder

WIDTH, HEADS, HEAD_DIM, VOCABULARY, TOKENS = 64, 4, 16, 211, 24
MATRIX, BIAS, EMBEDDING = "matrix", "bias", "embedding"


@dataclass(frozen=True)
class Write:
    """One tensor that writes to the stream.

    Attributes:
        parameter: its name in the model.
        axis: which of its axes is the stream's.
        kind: ``matrix`` or ``bias`` of a layer, or ``embedding`` (whatever makes the first layer's input).
        norm: the weight of the RMS norm between it and the stream, if there is one.
        offset: what that norm adds to its weight (Gemma: 1).
    """

    parameter: str
    axis: int
    kind: str
    norm: str | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class Writes:
    """A model's writes, and what else is known of its files.

    Attributes:
        tensors: by the tensor's name in the file; ``norm`` is a name in the file, too.
        head: the output head's name in files like this one.
        embedding: the input embedding's.
        tied: whether the configuration says that they are one.
        adaptable: names of the modules whose ``weight`` is in ``tensors`` and on which PEFT's LoRA can sit: linear maps
            and embeddings, not experts that share a parameter.
    """

    tensors: dict[str, Write]
    head: str
    embedding: str
    tied: bool
    adaptable: frozenset[str]


def residual_writes(folder: Folder) -> Writes:
    """Find them for the model in ``folder``; no tensor is read.

    Raises:
        ValueError: the architecture cannot be made small and run, or its stream is not what embedding and layers write;
            the files hold tensors that it does not know, or lack writes; weights are quantised.
    """
    config = _config(folder)
    try:
        with torch.no_grad(), _quiet():
            model = _small(config)
            found = _find(model)
            _check(model, found)
            painted = _painted(model, found)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:  # of code that is not ours
        raise ValueError(
            f"model: no small {config.model_type} could be made and run to find what writes to its stream: {error}"
        ) from error
    return _match(folder, config, model, painted)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is said of a small model that nobody asked for."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


# a small model --------------------------------------------------------------------------------------------------------


def _config(folder: Folder) -> Any:
    from transformers import AutoConfig

    from fastguard.models import named_errors

    with named_errors(str(folder.path), "configuration"):
        config: Any = AutoConfig.from_pretrained(folder.path)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"model: {folder.path} is quantised (quantization_config); dequantise it first")
    if config.get_text_config() is not config:
        raise ValueError(f"model: {config.model_type} is more than a language model; expected a text-only causal one")
    return config


def _small(config: Any) -> Any:
    """A random model of few features and all layers, in float64."""
    from transformers import AutoModelForCausalLM

    small = copy.deepcopy(config)
    heads, kv = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH, "vocab_size": VOCABULARY, "num_attention_heads": HEADS, "head_dim": HEAD_DIM,
        "max_position_embeddings": 128, "word_embed_proj_dim": WIDTH,
        "num_key_value_heads": HEADS if kv == heads else 1 if kv == 1 else 2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if getattr(config, "word_embed_proj_dim", None) != getattr(config, "hidden_size", None):
        sizes["word_embed_proj_dim"] = WIDTH // 2
    for name in (name for name in vars(config) if re.search(r"intermediate_size|ffn_dim|ffn_hidden|n_inner", name)):
        sizes[name] = 8 if "moe" in name else 96  # experts are many
    if (rotary := getattr(config, "qk_rope_head_dim", None)) is not None:  # multi-head latent attention
        sizes |= {"head_dim": rotary, "num_key_value_heads": HEADS}
    for name, value in sizes.items():
        if getattr(small, name, None) is not None:
            with contextlib.suppress(AttributeError):  # a property that follows from others
                setattr(small, name, value)
    if getattr(small, "rope_parameters", None):
        small.rope_parameters = _plain_rope(small.rope_parameters)
    small.tie_word_embeddings = False
    small.dtype = torch.float32
    small.use_cache = False
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        experts = {"experts_implementation": "eager"} if hasattr(small, "_experts_implementation") else {}
        model: Any = AutoModelForCausalLM.from_config(small, attn_implementation="eager", **experts)
        model = model.double().eval()
        for p in model.parameters():
            # Biases begin at zero, where nothing is seen of them, and matrices so small that little is.
            p.data.add_(torch.randn(p.shape, dtype=p.dtype), alpha=0.1)
    return model


def _plain_rope(rope: Any) -> Any:
    """Without the scalings, some of whose tables fit the real width alone."""
    if not isinstance(rope, dict):
        return rope
    if any(isinstance(v, dict) for v in rope.values()):
        return {k: _plain_rope(v) for k, v in rope.items()}
    return {k: v for k, v in rope.items() if not k.endswith("factor") or k.startswith("partial")} | {
        "rope_type": "default"
    }


# its writes -----------------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    args: Any
    kwargs: Any
    output: Any


def _direction() -> Tensor:
    row = torch.randn(1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return row / row.norm()


def _tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(2))


@contextlib.contextmanager
def _calls(modules: list[nn.Module]) -> Iterator[dict[nn.Module, _Call]]:
    """The last call of each module inside."""
    found: dict[nn.Module, _Call] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found[module] = _Call(args, kwargs, _cloned(output))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _cloned(output: Any) -> Any:
    """Some layers add to their blocks' outputs in place."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(_cloned(o) for o in output) if type(output) in (tuple, list) else output


@contextlib.contextmanager
def _changed(p: Tensor, value: Tensor) -> Iterator[None]:
    before = p.detach().clone()
    p.copy_(value)
    try:
        yield
    finally:
        p.copy_(before)


def _find(model: Any) -> dict[str, Write]:
    """Parameter's name -> what it writes."""
    try:
        structure = find_structure(model)
    except ValueError as error:
        raise ValueError(f"{error} (seen on a small {model.config.model_type} of random weights)") from error
    layers = list(structure.layers)
    names = {id(p): name for name, p in model.named_parameters()}
    with _calls(layers) as calls:
        model(input_ids=_tokens())
    found = _embeddings(model, layers, calls[layers[0]], structure.head)
    kinds: dict[Any, dict[str, Write]] = {}
    for i, layer in enumerate(layers):
        kind = (type(layer), tuple((name, p.shape) for name, p in layer.named_parameters()))
        if kind not in kinds:
            kinds[kind] = _layer(layer, calls[layer], f"layer {i} ({type(layer).__name__})")
        own = dict(layer.named_parameters())
        for name, write in kinds[kind].items():
            norm = None if write.norm is None else names[id(own[write.norm])]
            found[names[id(own[name])]] = replace(write, parameter=names[id(own[name])], norm=norm)
    return found


def _axes(p: Tensor) -> list[int]:
    return [axis for axis in range(p.dim()) if p.shape[axis] == WIDTH and (p.dim(), axis) != (3, 0) and p.dim() <= 3]


def _along(change: Tensor, direction: Tensor, of: Tensor) -> bool | None:
    """Whether a change is along the direction alone; None where there is none."""
    size = float(change.norm())
    if size <= 1e-9 * float(of.norm()):
        return None
    if change.shape[-1] != WIDTH:
        return False
    return float((change - (change @ direction.T) @ direction).norm()) <= 1e-5 * size


def _embeddings(model: Any, layers: list[nn.Module], first: _Call, head: nn.Module) -> dict[str, Write]:
    """Parameters before the layers that make the first one's input: tokens', positions', types'."""
    inside = {id(p) for layer in layers for p in layer.parameters()} | {id(p) for p in head.parameters()}
    direction, before = _direction(), _input(first)
    found = {}
    for name, p in model.named_parameters():
        if id(p) in inside:
            continue
        for axis in _axes(p):
            with _changed(p, orthogonalise(p, direction, axis=axis)), _calls([layers[0]]) as calls:
                model(input_ids=_tokens())
            if _along(_input(calls[layers[0]]) - before, direction, before):
                found[name] = Write(name, axis, EMBEDDING)
    return found


def _input(call: _Call) -> Tensor:
    return first_tensor((*call.args, *call.kwargs.values()))


def _layer(layer: nn.Module, call: _Call, called: str) -> dict[str, Write]:
    """The writes of one layer, by their names in it."""
    blocks = [child for child in layer.children() if any(p.dim() >= 2 for p in child.parameters())]
    norms = [m for m in layer.modules() if getattr(m, "weight", None) is not None and m.weight.dim() == 1]  # type: ignore[union-attr,operator]
    names = {id(p): name for name, p in layer.named_parameters()}
    with _calls([*blocks, *norms]) as calls:
        before = first_tensor(layer(*call.args, **call.kwargs))
    direction = _direction()
    found: dict[str, Write] = {}
    for block in blocks:
        if block not in calls:
            continue
        own = calls[block].output
        # The other blocks answer as they did, so that what is seen is this one's part.
        held = [other for other in blocks if other is not block and other in calls]
        handles = [b.register_forward_hook(lambda *_, kept=calls[b].output: _cloned(kept)) for b in held]
        silent: dict[str, Tensor] = {}
        try:
            for p in block.parameters():
                write, seen = None, False
                for axis in _axes(p):
                    with _changed(p, orthogonalise(p, direction, axis=axis)), _calls([block]) as again:
                        after = first_tensor(layer(*call.args, **call.kwargs))
                    through = _along(
                        first_tensor(again[block].output) - first_tensor(own), direction, first_tensor(own)
                    )
                    reached = _along(after - before, direction, before)
                    seen = seen or through is not None or reached is not None
                    kind = BIAS if p.dim() == 1 or "bias" in names[id(p)].rpartition(".")[2] else MATRIX
                    if reached:
                        write = Write("", axis, kind)
                    elif through and reached is not None:
                        write = _through_norm(Write("", axis, kind), calls, norms, first_tensor(own), names, called)
                if write is not None:
                    found[names[id(p)]] = write
                elif not seen and _axes(p):
                    silent[names[id(p)]] = p
        finally:
            for handle in handles:
                handle.remove()
        # One of many experts may have got no token; what its siblings are, it is.
        for name, idle in silent.items():
            alike = [w for other, w in found.items() if _template(other) == _template(name)]
            if alike:
                found[name] = alike[0]
            elif idle.dim() >= 2 and all(o in silent for o in names.values() if _template(o) == _template(name)):
                raise ValueError(
                    f"model: {name} of {called} did nothing in a trial; it may write to the stream, or not"
                )
    return found


def _template(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _through_norm(
    write: Write, calls: dict[nn.Module, _Call], norms: list[nn.Module], y: Tensor, names: dict[int, str], called: str
) -> Write:
    """A write whose output a norm reads before it comes to the stream."""
    for norm in norms:
        if norm in calls and _input(calls[norm]).shape == y.shape and torch.equal(_input(calls[norm]), y):
            weight: Any = norm.weight
            if getattr(norm, "bias", None) is not None:
                break
            with _changed(weight, torch.zeros_like(weight)):
                offset = float(bool(norm(y).abs().max() > 0))
            return replace(write, norm=names[id(weight)], offset=offset)
    raise ValueError(
        f"model: what {called} writes goes through something that is no RMS norm before it comes to the stream; no "
        "edit of the weights stands for a projection there"
    )


def _check(model: Any, writes: dict[str, Write]) -> None:
    """All writes together keep the direction out of the stream, wherever a layer begins or ends."""
    if not any(w.kind == EMBEDDING for w in writes.values()):
        raise ValueError(
            f"model: no parameter of {model.config.model_type} makes its first layer's input by addition alone (is "
            "there a norm behind the embedding?); no edit of the weights stands for a projection there"
        )
    layers = list(find_structure(model).layers)
    own, direction = dict(model.named_parameters()), _direction()
    before = {name: own[name].detach().clone() for name in writes}
    try:
        for name, write in writes.items():
            basis = direction
            if write.norm is not None:
                basis = followed_by_norm(direction, own[write.norm] + write.offset)
            orthogonalise(own[name], basis, axis=write.axis, out=own[name])
        with _calls(layers) as calls:
            model(input_ids=_tokens())
    finally:
        for name, value in before.items():
            own[name].copy_(value)
    for i, layer in enumerate(layers):
        for where, stream in (("input", _input(calls[layer])), ("output", first_tensor(calls[layer].output))):
            share = float((stream @ direction.T).norm() / stream.norm())
            if not share <= 1e-5:
                raise ValueError(
                    f"model: with every write that was found edited, the {where} of layer {i} keeps {share:.2g} of a "
                    f"direction: something else of {model.config.model_type} writes to the stream"
                )


# their names on disk --------------------------------------------------------------------------------------------------

MARK = 4096
"""More than there are features: a number is (which parameter + 1) x MARK + feature + 1."""


@dataclass(frozen=True)
class _Painted:
    """File's name -> what it is; and the names of all tensors in such a file."""

    writes: dict[str, Write]
    norms: dict[str, str]
    head: str
    embedding: str
    known: frozenset[str]


def _painted(model: Any, writes: dict[str, Write]) -> _Painted:
    own = dict(model.named_parameters())
    of = {id(p): name for name, p in own.items()}
    marked = list(writes)
    plain = sorted({w.norm for w in writes.values() if w.norm is not None})
    plain += [of[id(model.get_output_embeddings().weight)]]
    for p in (*own.values(), *(b for b in model.buffers() if b.is_floating_point())):
        p.zero_()
    for j, name in enumerate(marked):
        shape = [1] * own[name].dim()
        shape[writes[name].axis] = WIDTH
        own[name].copy_((j + 1) * MARK + torch.arange(1, WIDTH + 1, dtype=torch.float64).view(shape))
    for j, name in enumerate(plain):
        own[name].fill_(-1.0 - j)
    found: dict[str, Write] = {}
    others: dict[str, str] = {}
    state = [*model.state_dict().items(), *_saved(model)]  # as in memory, too: some folders are written so
    for name, t in state:
        if not t.is_floating_point() or not t.any():
            continue
        first = float(t.flatten()[0])
        if first < 0:
            if not bool((t == first).all()):
                raise ValueError(f"model: {name} holds more than one parameter on disk; no edit for it is known")
            others[name] = plain[int(-first) - 1]
            continue
        parameter = marked[int(t.max()) // MARK - 1]
        for axis in _axes(t):
            shape = [1] * t.dim()
            shape[axis] = WIDTH
            expected = (t.max() // MARK) * MARK + torch.arange(1, WIDTH + 1, dtype=t.dtype).view(shape)
            if bool((t == expected).all()):
                found[name] = replace(writes[parameter], parameter=parameter, axis=axis)
        if name not in found:
            raise ValueError(f"model: {name} on disk holds {parameter} with something else; no edit for it is known")
    embedding = of[id(model.get_input_embeddings().weight)]
    return _Painted(found, others, plain[-1], embedding, frozenset(name for name, _ in state))


def _saved(model: Any) -> list[tuple[str, Tensor]]:
    """What ``save_pretrained`` writes."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return [item for path in sorted(Path(folder).glob("*.safetensors")) for item in load_file(path).items()]


def _match(folder: Folder, config: Any, model: Any, painted: _Painted) -> Writes:
    """Apply to the tensors that are there."""
    prefix = f"{model.base_model_prefix}."

    def called(names: Any) -> dict[str, str]:  # as in the file -> as painted; a base model's file lacks the prefix
        return {short: name for name in names for short in (name.removeprefix(prefix), name)}

    known, writes = called(painted.known), called(painted.writes)
    there = folder.tensors
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()} | {"masked_bias", "inv_freq"}
    tensors: dict[str, Write] = {}
    norms = {disk: painted.norms[name] for disk, name in called(painted.norms).items() if disk in there}
    where = {parameter: disk for disk, parameter in norms.items()}
    for name, stored in there.items():
        if name in writes:
            write = painted.writes[writes[name]]
            if len(stored.shape) <= write.axis or stored.shape[write.axis] != config.hidden_size:
                raise ValueError(
                    f"model: {name} has shape {stored.shape}, expected {config.hidden_size} on axis {write.axis}"
                )
            if write.norm is not None and write.norm not in where:
                raise ValueError(f"model: {folder.path} lacks {write.norm}, the norm behind {name}")
            tensors[name] = write if write.norm is None else replace(write, norm=where[write.norm])
        elif name not in known and not any(p.search(name) for p in ignored):
            of_gpt2 = name.endswith((".attn.bias", ".attention.bias"))  # causal masks that old files carry
            if name.rpartition(".")[2] not in buffers and not of_gpt2:
                raise ValueError(
                    f"model: {name} in {folder.path} is no tensor that a {config.model_type} is known to have"
                )
    reached = {w.parameter for w in tensors.values()}
    lacking = [w.parameter for w in painted.writes.values() if w.parameter not in reached]
    if lacking:
        raise ValueError(f"model: {folder.path} lacks {len(set(lacking))} weights, the first {lacking[0]}")
    short = painted.embedding not in there and painted.embedding.removeprefix(prefix) in there
    embedding = painted.embedding.removeprefix(prefix) if short else painted.embedding
    modules = {f"{name}.weight": module for name, module in model.named_modules()}
    adaptable = {
        w.parameter.removesuffix(".weight") for w in tensors.values() if _adaptable(modules.get(w.parameter), w)
    }  # fmt: skip
    return Writes(tensors, painted.head, embedding, bool(config.tie_word_embeddings), frozenset(adaptable))


def _adaptable(module: nn.Module | None, write: Write) -> bool:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Embedding):  # PEFT knows of subclasses those that scale, not those that shift positions
        return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    return isinstance(module, nn.Linear | Conv1D) and write.kind == MATRIX

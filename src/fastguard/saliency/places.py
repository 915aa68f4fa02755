"""Which weights of a model are scored: the linear maps of its layers, and the vocabulary's if that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fastguard.taps import Structure
from fastguard.taps.structure import output_head

LINEAR, HEAD, EMBEDDING = "linear", "head", "embedding"

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""What checkpoint wrappers and torch.compile put into a parameter's name."""


@dataclass(frozen=True)
class Place:
    """A weight [O, I] and the module that uses it.

    Attributes:
        name: of the weight, as the language model's ``named_parameters`` has it; a tied head's is the embedding's.
        kind: `LINEAR`, `HEAD` or `EMBEDDING`. layer: of the model; None outside its layers.
    """

    name: str
    module: nn.Module
    kind: str
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the weight."""
        outputs, inputs = self.module.weight.shape  # type: ignore[misc, union-attr]
        return int(outputs), int(inputs)


def clean(name: str) -> str:
    """A parameter's name without what wrappers have put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def find_places(structure: Structure, wanted: Callable[[str], bool], vocabulary: bool) -> tuple[Place, ...]:
    """The places of a model, in the order of its parameters, the vocabulary's last.

    Args:
        wanted: from a weight's name to whether it is to be scored; asked for those of the layers.
        vocabulary: the embedding and the head too.

    Raises ValueError that names a wanted weight that is no linear map's (3-D experts, Conv1D), or where none is wanted.
    """
    names = {id(p): clean(name) for name, p in structure.model.named_parameters()}
    found: list[Place] = []
    refused: dict[str, str] = {}
    for number, layer in enumerate(structure.layers):
        for module in layer.modules():
            for own, parameter in module.named_parameters(recurse=False):
                name = names[id(parameter)]
                if parameter.dim() < 2 or not wanted(name):
                    continue
                if isinstance(module, nn.Linear) and own == "weight":
                    found.append(Place(name, module, LINEAR, number))
                else:
                    refused[name] = f"{type(module).__name__} {list(parameter.shape)}"
    if refused:
        said = ", ".join(f"{name} of a {what}" for name, what in list(refused.items())[:4])
        raise ValueError(
            f"modules: {len(refused)} weights cannot be scored, since they are not torch.nn.Linear's: {said}; leave "
            "them out, as in modules=lambda name: 'self_attn' in name"
        )
    if vocabulary:
        head, embedding = output_head(structure.model), embedding_of(structure.model)
        for module, kind in ((head, HEAD), (embedding, EMBEDDING)):
            expected = nn.Linear if kind == HEAD else nn.Embedding
            plain = type(module) is expected or hasattr(module, "embed_scale")
            if not isinstance(module, expected) or not plain:
                raise ValueError(f"vocabulary: the {kind} is a {type(module).__name__}, expected a {expected.__name__}")
            found.append(Place(names[id(module.weight)], module, kind))
    if not found:
        raise ValueError("modules: expected at least one weight of the model's layers to be scored, got none")
    return tuple(found)


def embedding_of(model: nn.Module) -> nn.Module:
    """The input embedding of a language model. Raises ValueError where there is none."""
    getter = getattr(model, "get_input_embeddings", None)
    found = getter() if callable(getter) else None
    if not isinstance(found, nn.Module):
        raise ValueError(f"model: {type(model).__name__} has no input embedding (get_input_embeddings gave {found!r})")
    return found

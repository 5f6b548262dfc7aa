"""A trained model made ready for use: weights in 8 or 4 bits, and weights packed for the CPU's kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from trilemma.config import Quantization
from trilemma.errors import CapabilityError
from trilemma.models.model import SequenceModel
from trilemma.nn.embedding import Embedding
from trilemma.nn.group_codes import GROUP
from trilemma.nn.kernels import codes_pack, least_packed
from trilemma.nn.linear import (
    HeldInt4Linear,
    HeldInt8Linear,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    PackedInt8Linear,
    PackedLinear,
)

_NARROWEST = 32  # narrower layers make gates and step sizes: small, and sensitive
_PACKED_TYPES = (torch.float32, torch.bfloat16)
_PRODUCTS = {
    HeldInt4Linear: "int4-in-float32",
    Int4Linear: "int4",
    PackedInt8Linear: "packed-int8",
    HeldInt8Linear: "int8-in-float32",
    Int8Linear: "int8",
}


def quantize(model: SequenceModel, kind: Quantization = "int8") -> SequenceModel:
    """Turns linear layers and tables of tokens into coded ones, in place. All else, States included, stays float32.

    Args:
        kind: of linear layers: "int8", or "int4" for weights alone, where 32 divides the inputs. Tables of tokens and
            the head are in 8 bits either way.

    Raises:
        CapabilityError: no layer is wide enough.
    """
    model.float()
    if min(model.embedding.tokens.weight.shape) >= _NARROWEST:
        _code_tables(model)
    if model.config.num_labels is None:
        table = model.embedding.get_submodule("tokens")
        if model.output is not None:
            model.projection, model.output = Int8Linear.of(model.output, model.logit_bias), None
        elif isinstance(table, Int8Embedding):
            model.projection = Int8Linear(table.codes, table.scale, model.logit_bias)
    _replace(model, functools.partial(_coded, kind=kind))
    if not any(isinstance(module, Int8Linear | Int4Linear) for module in model.modules()):
        raise CapabilityError(f"nothing to quantize: no layer of this model is {_NARROWEST} wide")
    return model


def pack(model: SequenceModel) -> SequenceModel:
    """Makes linear layers ready for inference on this CPU, in place.

    8-bit codes are packed where the processor's 8-bit sums are exact, and kept as float32 numbers elsewhere, as 4-bit
    codes always are; large layers of float32 and bfloat16 are packed where that pays (`trilemma.nn.kernels`).

    The model can be used afterwards, but neither trained nor saved nor moved. `products` tells what it runs on.
    """
    if model.device.type != "cpu" or model.dtype not in _PACKED_TYPES:
        return model
    exact, least = codes_pack(), least_packed(model.dtype)
    _replace(model, lambda module: _ready(module, exact))
    if least is not None:
        if model.projection is None and model.config.num_labels is None:
            weight = model.embedding.tokens.weight if model.output is None else model.output.weight
            if weight.numel() >= least:
                model.projection, model.output = PackedLinear(weight, model.logit_bias), None
        _replace(model, lambda module: _packed(module, least))
    return model


def products(model: SequenceModel) -> str:
    """What a model's matrix products run on: the weights' type, such as "float32", of packed ones "packed-float32".

    8-bit codes are "int8" in the plain form, "packed-int8" on the 8-bit kernel, "int8-in-float32" as float32 numbers;
    4-bit codes "int4" and "int4-in-float32", whatever the head is.
    """
    kinds = {type(module) for module in model.modules()}
    for kind, name in _PRODUCTS.items():
        if kind in kinds:
            return name
    name = str(model.dtype).removeprefix("torch.")
    return f"packed-{name}" if PackedLinear in kinds else name


def _code_tables(model: SequenceModel) -> None:
    """One table that several embeddings read stays one."""
    embeddings = [module for module in model.modules() if isinstance(module, Embedding)]
    coded = {id(each.tokens): Int8Embedding.of(each.tokens) for each in embeddings}
    for each in embeddings:
        each.add_module("tokens", coded[id(each.tokens)])


def _coded(module: nn.Module, kind: Quantization) -> nn.Module:
    if type(module) is not nn.Linear or min(module.weight.shape) < _NARROWEST:
        return module
    if kind == "int4" and module.in_features % GROUP == 0:
        return Int4Linear.of(module)
    return Int8Linear.of(module, module.bias)


def _ready(module: nn.Module, exact: bool) -> nn.Module:
    if isinstance(module, Int8Linear):
        return module.packed() if exact else module.held()
    return module.held() if isinstance(module, Int4Linear) else module


def _packed(module: nn.Module, least: int) -> nn.Module:
    if type(module) is nn.Linear and module.weight.numel() >= least:
        return PackedLinear(module.weight, module.bias)
    return module


def _replace(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> None:
    """Replaces every module by what `change` makes of it."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            setattr(parent, name, change(child))

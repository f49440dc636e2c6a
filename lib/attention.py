"""Attention by layers of its own, so that its projections are seen like any other layer."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import evaluated
from .linear import Place, Projection, View, layers_of


class Attention(nn.Module):
    """What ``nn.MultiheadAttention`` computes, by layers of their own.

    Heads, masks and what is appended to keys and values are those of torch's, whose projections
    are made the identity.
    """

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        size, stored = attention.embed_dim, dict(attention.named_parameters(recurse=False))
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        whole = stored.get("in_proj_weight")
        for part, (letter, bias) in enumerate(zip("qkv", biases, strict=True)):
            name, first = f"{letter}_proj_weight", 0
            weight: Tensor | None = stored.get(name)
            if whole is not None:
                name, first = "in_proj_weight", part * size
                weight = whole[first : first + size]
            assert weight is not None
            self.add_module(f"in_proj_{letter}", Projection(name, first, weight, bias))
        self.out_proj = attention.out_proj
        self.core = copy.deepcopy(attention)
        core: Any = self.core
        unit = torch.eye(size, dtype=self.out_proj.weight.dtype, device=self.out_proj.weight.device)
        core._qkv_same_embed_dim, core.kdim, core.vdim = True, size, size
        core.q_proj_weight = core.k_proj_weight = core.v_proj_weight = core.in_proj_bias = None
        core.in_proj_weight = nn.Parameter(unit.repeat(3, 1))
        core.out_proj.weight, core.out_proj.bias = nn.Parameter(unit), None

    def __getattr__(self, name: str) -> Any:
        """What others ask an attention about, such as ``batch_first``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("core"), name)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention``."""
        query, key, value = self.in_proj_q(query), self.in_proj_k(key), self.in_proj_v(value)
        heads, weights = self.core(query, key, value, *args, **kwargs)
        return self.out_proj(heads), weights


def opened(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode that shares all parameters, attentions by layers of their own."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    model = evaluated(copy.deepcopy(model, shared))
    replaced: dict[int, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        plain = getattr(module.forward, "__func__", None) is nn.MultiheadAttention.forward
        hooks = module._forward_hooks or module._forward_pre_hooks
        if path and plain and isinstance(module, nn.MultiheadAttention) and not hooks:
            new = replaced.setdefault(id(module), Attention(module).eval())
            model.set_submodule(path, new)
    return model


def views_of(model: nn.Module) -> dict[str, View]:
    """How stored weights are read, by name; an in-projection by query, key and value apart."""
    views: dict[str, View] = {}
    for path, layer in layers_of(opened(model)).items():
        name, view = Place.of(path, layer).name, View.of(layer)
        groups = views[name].groups + 1 if name in views else view.groups
        views[name] = replace(view, groups=groups)
    return views

"""Folding of batch norms into the convolutions before them: the same function with fewer layers, for inference."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from icdctl.models.outputs import Classifier

_Model = TypeVar("_Model", bound=nn.Module)


def fold_batch_norms(model: _Model) -> _Model:
    """A frozen copy in eval mode, with every pair of `conv_bn_pairs()` fused into one convolution with a bias.

    The fused weights are computed in float64 and cast back, so the results differ by rounding only (1e-5 of the largest
    logit in float32). A module that is not a `Classifier` names no pairs; it is only copied and frozen.

    Args:
        model: any module; it is not changed.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    pairs = folded.conv_bn_pairs() if isinstance(folded, Classifier) else []
    for conv_name, norm_name in pairs:
        conv, norm = folded.get_submodule(conv_name), folded.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        _fuse(conv, norm)
        parent_name, _, child_name = norm_name.rpartition(".")
        setattr(folded.get_submodule(parent_name), child_name, nn.Identity())
    return folded


@torch.no_grad()
def _fuse(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Give `conv` the weights of conv followed by norm: y = (conv(x) - mean) * weight / sqrt(var + eps) + bias."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    dtype = conv.weight.dtype
    scale = norm.weight.double() / torch.sqrt(variance.double() + norm.eps)
    bias = -mean.double() if conv.bias is None else conv.bias.double() - mean.double()
    weight = conv.weight.double() * scale.reshape(-1, 1, 1, 1)
    conv.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    conv.bias = nn.Parameter((bias * scale + norm.bias.double()).to(dtype), requires_grad=False)

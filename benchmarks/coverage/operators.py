"""Registers the operators that torchvision expects of a torch built with it. Nothing here calls them."""

from __future__ import annotations

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor a, Tensor b, float s, SymInt h, SymInt w, int r, bool al) -> Tensor",
    "roi_pool(Tensor a) -> (Tensor, Tensor)",
    "ps_roi_align(Tensor a) -> (Tensor, Tensor)",
    "ps_roi_pool(Tensor a) -> (Tensor, Tensor)",
    "deform_conv2d(Tensor a) -> Tensor",
    "_roi_align_backward(Tensor g) -> Tensor",
    "_roi_pool_backward(Tensor a) -> Tensor",
    "_ps_roi_align_backward(Tensor a) -> Tensor",
    "_ps_roi_pool_backward(Tensor a) -> Tensor",
    "_deform_conv2d_backward(Tensor a) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_LIBRARIES: list[torch.library.Library] = []  # the operators exist as long as these objects


def register() -> None:
    """Define the operators, so that torchvision can be imported beside a torch without CUDA."""
    if not _LIBRARIES:
        _LIBRARIES.append(torch.library.Library("torchvision", "DEF"))
        for schema in _SCHEMAS:
            _LIBRARIES[0].define(schema)

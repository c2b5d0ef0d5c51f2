"""What the tests of TRX and STRM share: inputs of their golden files, and gradients by the published names."""

import torch
from torch import Tensor

from contracts.compared import Compared
from episodes.head import HeadModule
from episodes.heads.trx_checkpoint import published_head


def golden_videos(file: Compared) -> dict[str, Tensor]:
    """Supports and queries of a file as they lie there, wanting a gradient."""
    return {name: file.tensor(f"in/{name}").requires_grad_() for name in ("support", "query")}


def published_gradients(file: Compared, head: HeadModule, videos: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the published names; zero for what we keep as buffers because nothing computes with it."""
    owners = dict(head.named_parameters())
    found = {name: values.grad for name, values in videos.items()}
    for name, values in file.group("param").items():
        (ours,) = published_head({name: values})
        found[name] = owners[ours].grad if ours in owners else torch.zeros_like(values)
    gradients = {name: gradient for name, gradient in found.items() if gradient is not None}
    assert gradients.keys() == found.keys()
    return gradients

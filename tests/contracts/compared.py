"""Torch results compared with the arrays of one golden file."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from contracts import golden
from episodes.batch import EpisodeBatch

SATURATED_GRADIENT = 5e-2
SATURATED_ATTENTION = 0.99
"""Attention above this, somewhere in a file, is all but one-hot."""

both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
both_modes = pytest.mark.parametrize("mode", ["eval", "train"])


class Compared:
    """Compares results with the arrays of one file, and counts which of them were compared."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.path = path
        self.dtype = dtype
        self.arrays = golden.load(path)
        self.seen: set[str] = set()
        attention = [values for name, values in golden.group(self.arrays, "out").items() if name.startswith("A_")]
        self.is_saturated = any(values.max() > SATURATED_ATTENTION for values in attention)

    def tensor(self, name: str) -> Tensor:
        value = torch.from_numpy(self.arrays[name])
        return value.to(self.dtype) if value.is_floating_point() else value

    def number(self, name: str) -> float:
        return float(self.arrays[name])

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {name: self.tensor(f"{prefix}/{name}") for name in golden.group(self.arrays, prefix)}

    def matches(self, name: str, result: Tensor) -> None:
        self.seen.add(name)
        double = self.dtype == torch.float64
        # With one-hot attention the gradients of the meta-learner are tiny and ill-conditioned; 5e-2 is recommended.
        ill_conditioned = self.is_saturated and name.startswith("grad/f_")
        default = SATURATED_GRADIENT if ill_conditioned else None
        golden.assert_matches(self.path, name, result.detach().cpu().numpy(), double=double, default=default)

    def assert_all_seen(self, *prefixes: str, without: tuple[str, ...] = ()) -> None:
        expected = {name for name in self.arrays if name.partition("/")[0] in prefixes}
        assert expected - self.seen == set(without)


def head_batch(file: Compared) -> EpisodeBatch:
    """The one episode of a file, with inputs that want a gradient."""
    return EpisodeBatch(
        support=file.tensor("in/support")[None].requires_grad_(),
        support_labels=file.tensor("in/support_labels")[None],
        query=file.tensor("in/query")[None].requires_grad_(),
        query_labels=file.tensor("in/query_labels")[None],
        n_way=len(file.arrays["in/class_global_labels"]),
        class_global_labels=file.tensor("in/class_global_labels")[None],
    )

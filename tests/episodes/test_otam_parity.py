"""OTAM compared with the golden arrays, number by number."""

# Q queries, S supports; C channels, T U time steps of query and support

from dataclasses import replace
from pathlib import Path

import torch

from contracts import golden
from contracts.compared import Compared, both_precisions
from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs
from episodes.heads.frame_matching import frame_cosines
from episodes.heads.ordered_alignment import alignment_distance, cumulative_distances, two_way_distance
from episodes.heads.otam import OtamConfig, OtamHead


def smoothings(file: Compared) -> list[str]:
    """As they stand in the names of the arrays."""
    prefix = "out/distance_lambda"
    return [name.removeprefix(prefix) for name in file.arrays if name.startswith(prefix)]


@golden.each_file("otam_")
@both_precisions
def test_otam_parity_of_every_array(golden_file: Path, dtype: torch.dtype) -> None:
    file = Compared(golden_file, dtype)
    query, support = file.tensor("in/query")[None], file.tensor("in/support")[None]
    distances = 1.0 - frame_cosines(query, support, eps=0.0)[0]
    file.matches("out/frame_distance", distances)
    for name in smoothings(file):
        smoothing = float(name)
        file.matches(f"out/cumulative_lambda{name}", cumulative_distances(distances, smoothing))
        file.matches(f"out/distance_lambda{name}", alignment_distance(distances, smoothing))
        file.matches(f"out/distance_reverse_lambda{name}", alignment_distance(distances.transpose(-1, -2), smoothing))
        file.matches(f"out/distance_symmetric_lambda{name}", two_way_distance(distances, smoothing, "mean"))
    file.assert_all_seen("out")


@golden.each_file("otam_")
@both_precisions
def test_otam_parity_of_the_head(golden_file: Path, dtype: torch.dtype) -> None:
    file = Compared(golden_file, dtype)
    # All cubes of a store have one shape; where the files have shorter supports, only the common steps are compared.
    query, support = file.tensor("in/query"), file.tensor("in/support")
    num_steps = min(query.shape[1], support.shape[1])
    same_length = query.shape[1] == support.shape[1]
    query, support = (frames[None, :, :num_steps].transpose(-1, -2)[..., None, None] for frames in (query, support))
    # One support per class, then all supports in one class: the mean over shots.
    labels = torch.arange(support.shape[1])[None]
    batch = EpisodeBatch(support, labels, query, None, support.shape[1])
    inputs = HeadInputs((query.shape[2], num_steps, 1, 1))
    for name in smoothings(file):
        head = OtamHead(OtamConfig(directions="mean", eps=0.0, smoothing=float(name)), inputs)
        logits = head(batch).logits
        if same_length:
            file.matches(f"out/distance_symmetric_lambda{name}", -logits[0])
        together = head(replace(batch, support_labels=torch.zeros_like(labels), n_way=1)).logits
        torch.testing.assert_close(together.squeeze(-1), logits.mean(dim=-1))
        summed = OtamHead(OtamConfig(directions="sum", eps=0.0, smoothing=float(name)), inputs)(batch).logits
        torch.testing.assert_close(summed, 2.0 * logits)

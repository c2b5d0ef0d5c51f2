"""How well a model that classifies knows the videos of its training classes that it has not seen."""

# V videos, K clips and crops of each, Z training classes; F frames, H W pixels

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from configs.training import ClassifyConfig
from episodes.clip_sampler import ClipSampler
from pipeline.classify import clip_sampler
from pipeline.classify_model import ClassifierModel
from pipeline.evaluation import ScoreError, evaluating
from pipeline.ranks import ALONE, Ranks
from pipeline.setup import Workplace
from pipeline.sources import LiveClips
from pipeline.statistics import Interval, share_interval

TOP5_CLASSES = 10
"""Fewest training classes for which the five likeliest say something."""
CLIPS_AT_A_TIME = 64
"""Clips that are decoded together, or those of one video where it has more; changes no number."""


class ScoringClips(Protocol):
    """Gives several clips of a video, each cropped once or three times (`pipeline.sources.LiveClips`)."""

    def read_scoring(
        self, video_ids: Sequence[str], num_clips: int, num_crops: Literal[1, 3], while_waiting: Callable[[], None]
    ) -> Tensor:
        """Clips (V, K, F, H, W, 3) uint8, K = num_clips x num_crops; `while_waiting` may raise to leave."""
        ...


@dataclass(frozen=True, slots=True)
class HeldOutScore:
    """Accuracy over the held-out videos, as fractions."""

    top1: float
    interval: Interval
    """Wilson's 95 % interval over the videos."""
    top5: float | None
    """None where there are fewer than `TOP5_CLASSES`."""
    videos: int

    @property
    def line(self) -> dict[str, float | int]:
        """For the validation line of metrics.jsonl."""
        top5 = {} if self.top5 is None else {"heldout_top5": self.top5}
        return {
            "heldout_top1": self.top1,
            "heldout_low95": self.interval.low,
            "heldout_high95": self.interval.high,
            **top5,
            "heldout_videos": self.videos,
        }


def score_held_out(
    place: Workplace,
    ranks: Ranks = ALONE,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOutScore | None:
    """Classify the videos that a run keeps out of its training; None where it keeps out none.

    Args:
        place: of a classification run.
        ranks: each scores its share of the videos.
        on_progress: called with (videos done, videos in all).
    """
    if not place.config.classify.holdout:
        return None
    assert isinstance(place.model, ClassifierModel)
    assert isinstance(place.source, LiveClips)
    sampler = clip_sampler(place.config, place.manifest)
    return score_videos(place.model, place.source, sampler, place.config.classify, place.device, on_progress, ranks)


def score_videos(
    model: ClassifierModel,
    clips: ScoringClips,
    sampler: ClipSampler,
    config: ClassifyConfig,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> HeldOutScore:
    """Classify the held-out videos of a sampler: probabilities are averaged over clips and crops.

    Args:
        model: left in the mode that it came in.
        clips: where the videos come from.
        sampler: says which videos are held out; at least one.
        config: how many clips and crops.
        device: where the model runs.
        on_progress: called with (videos done, videos in all), also while they are waited for; may raise to leave.
        ranks: each scores its share of the videos; all get the same answer.
    """
    num_videos = len(sampler.held_out_ids)
    size = max(1, CLIPS_AT_A_TIME // (config.num_clips * config.num_crops))
    # Whole parts are shared, so that each is computed as it is by one process.
    parts = ranks.slice_of([range(start, min(start + size, num_videos)) for start in range(0, num_videos, size)])
    places = []
    with evaluating([model]), torch.no_grad():
        for number, part in enumerate(parts):
            ids = [sampler.held_out_ids[index] for index in part]
            look = partial(on_progress, num_videos * number // len(parts), num_videos)
            probabilities = mean_probabilities(
                model, clips.read_scoring(ids, config.num_clips, config.num_crops, look), device
            )
            places.append(
                place_of_label(probabilities, torch.tensor([sampler.held_out_labels[index] for index in part]))
            )
            on_progress(num_videos * (number + 1) // len(parts), num_videos)
    own = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
    place = ranks.gather_rows(own).numpy()
    hits = int((place == 0).sum())
    top5 = float((place < 5).mean()) if sampler.num_classes >= TOP5_CLASSES else None
    return HeldOutScore(hits / len(place), share_interval(hits, len(place)), top5, len(place))


def mean_probabilities(model: ClassifierModel, clips: Tensor, device: torch.device) -> Tensor:
    """Class probabilities of videos, averaged over their clips and crops.

    Args:
        model: in evaluation mode.
        clips: (V, K, F, H, W, 3) uint8.

    Returns:
        (V, Z) float32 on the CPU.

    Raises:
        ScoreError: a probability is not finite.
    """
    cubes = model.encoder(clips.flatten(0, 1)[None].to(device))[0]  # (V K, C, T, H, W)
    probabilities = model.log_probabilities(cubes).exp()  # (V K, Z)
    if not bool(probabilities.isfinite().all()):
        raise ScoreError(
            "the class probabilities of held-out videos are not finite: the weights hold infinite numbers or none. "
            "Take an earlier checkpoint, or train with a lower learning rate."
        )
    return probabilities.reshape(*clips.shape[:2], -1).mean(dim=1).cpu()


def place_of_label(probabilities: Tensor, labels: Tensor) -> Tensor:
    """How many classes are ahead of the right one: (V, Z) and (V,) int64 to (V,) int64; of equal ones the first by name is ahead."""
    order = probabilities.argsort(dim=1, descending=True, stable=True)
    return (order == labels[:, None]).to(torch.int64).argmax(dim=1)

"""What classification trains: the backbone and a linear classifier, on clips that may be mixed."""

# E clips (episodes of one query), Z training classes; C channels, T time; F frames, H W pixels or grid

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor, nn

from configs.schema import RunConfig
from configs.training import ClassifyConfig
from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOutput
from episodes.linear import LinearClassifier, LinearOptions
from pipeline.classify import build_scorer
from pipeline.model import FewShotModel
from pipeline.own_draws import OwnDraws


class Mixing:
    """MixUp and CutMix of torchvision on the clips of one forward pass; all frames of a clip are mixed alike.

    Partners are neighbours in the pass, so mixing depends on how many clips pass at a time and on the number of ranks.
    """

    def __init__(self, config: ClassifyConfig, num_classes: int) -> None:
        """Set up what is asked for: one of them, or with both a draw between them for each pass."""
        from torchvision import tv_tensors  # here, so that all other runs start without
        from torchvision.transforms import v2

        transforms: list[nn.Module] = []
        if config.mixup_alpha:
            transforms.append(v2.MixUp(alpha=config.mixup_alpha, num_classes=num_classes))
        if config.cutmix_alpha:
            transforms.append(v2.CutMix(alpha=config.cutmix_alpha, num_classes=num_classes))
        self._transform = v2.RandomChoice(transforms)
        self._as_video = tv_tensors.Video

    def __call__(self, clips: Tensor, labels: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Mix; what is drawn depends on the seeds of the pass alone.

        Args:
            clips: (E, F, H, W, 3) uint8.
            labels: (E,) int64.
            seeds: (E,) int64 on the CPU.

        Returns:
            Clips as they came, rounded to uint8, and the probability of each class, (E, Z) float32.
        """
        frames = self._as_video(clips.permute(0, 1, 4, 2, 3).float())  # (E, F, 3, H, W)
        digest = hashlib.sha256(seeds.numpy().tobytes()).digest()
        with OwnDraws(int.from_bytes(digest[:8], "little") >> 1):
            mixed, targets = self._transform(frames, labels)
        pixels: Tensor = mixed.as_subclass(Tensor).round().to(torch.uint8)
        return pixels.permute(0, 1, 3, 4, 2), targets


class ClassifierModel(FewShotModel):
    """A backbone and a linear classifier; few-shot accuracy is measured by a head that has nothing to learn."""

    head: LinearClassifier

    def __init__(
        self, encoder: nn.Module, head: LinearClassifier, scorer: HeadModule, mixing: Mixing | None = None
    ) -> None:
        super().__init__(encoder, head)
        self.mixing = mixing
        self._scorer = scorer

    @property
    def few_shot_head(self) -> HeadModule:
        """The head that scores few-shot episodes on this model's cubes."""
        return self._scorer

    def forward(self, batch: EpisodeBatch, with_maps: bool = False) -> HeadOutput:
        """Classify the clips (E, 1, F, H, W, 3) uint8 of a batch without supports; logits (E, 1, Z)."""
        targets = None
        if self.training and self.mixing is not None:
            assert batch.query_labels is not None
            assert batch.seeds is not None
            clips, probabilities = self.mixing(batch.query[:, 0], batch.query_labels[:, 0], batch.seeds)
            targets = probabilities[:, None]
            batch = replace(batch, support=clips[:, None][:, :0], query=clips[:, None])
        output: HeadOutput = self.head(self.encoded(batch), with_maps=with_maps, targets=targets)
        return output

    def log_probabilities(self, cubes: Tensor) -> Tensor:
        """Of each class for cubes (V, C, T, H, W): (V, Z) float32."""
        labels = torch.zeros((len(cubes), 0), dtype=torch.int64, device=cubes.device)
        num_classes = self.head.linear.out_features
        batch = EpisodeBatch(cubes[:, None][:, :0], labels, cubes[:, None], None, num_classes)
        logits: Tensor = self.head(batch).logits[:, 0]
        return logits.log_softmax(dim=-1)


def build_classifier(
    config: RunConfig, encoder: nn.Module, shape: tuple[int, int, int, int], num_classes: int, device: torch.device
) -> ClassifierModel:
    """The model of a classification config (`resolved_classification`); its first weights depend on ``training.seed`` alone.

    Args:
        encoder: the backbone.
        shape: (C, T, H, W) of its cubes.
        num_classes: Z.
        device: where the model runs.
    """
    classify = config.classify
    head = LinearClassifier(
        LinearOptions(label_smoothing=classify.label_smoothing, dropout=classify.dropout),
        HeadInputs(shape, num_classes, generator=torch.Generator().manual_seed(config.training.seed)),
    )
    mixing = Mixing(classify, num_classes) if classify.mixup_alpha or classify.cutmix_alpha else None
    return ClassifierModel(encoder, head, build_scorer(config, shape), mixing).to(device)

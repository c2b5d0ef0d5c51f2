"""A linear classifier over the training classes: what classification trains beside the backbone. No few-shot head: it takes no supports."""

# E clips (episodes of one query), Q = 1, Z training classes; C channels, T time steps, H W grid

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs, HeadModule, HeadOptions, HeadOutput
from episodes.initial import make_linear
from episodes.noise import EpisodeNoise
from episodes.shots import video_vectors


class LinearOptions(HeadOptions):
    """Knobs of the linear classifier."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of each target that is spread over all classes, in training."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """On the averaged cube, in training."""


class LinearClassifier(HeadModule):
    """Cubes are averaged over time and space; one linear layer gives a logit per training class."""

    def __init__(self, config: LinearOptions, inputs: HeadInputs) -> None:
        """Build the layer.

        Args:
            config: its knobs.
            inputs: cube shape, number of training classes, and the generator of the first weights.
        """
        super().__init__()
        if not inputs.num_classes:
            raise ValueError("a linear classifier needs num_classes, the number of training classes")
        self.config = config
        self.cube_shape = inputs.cube_shape
        self.loss_weights = {"class": 1.0}
        self.linear = make_linear(inputs.cube_shape[0], inputs.num_classes, None, inputs.generator)

    # ARG002: every head takes `with_maps`; this one has nothing to show.
    def forward(
        self,
        batch: EpisodeBatch,
        with_maps: bool = False,  # noqa: ARG002
        targets: Tensor | None = None,
    ) -> HeadOutput:
        """Classify the queries.

        Args:
            batch: queries (E, Q, C, T, H, W); supports are not looked at, n_way is Z.
            with_maps: without effect; there is nothing to see.
            targets: (E, Q, Z) float32 probabilities where clips were mixed; None: the batch's labels.

        Returns:
            Logits (E, Q, Z); "class" losses where the batch has labels. With targets, `labels` is the class of most weight.
        """
        self.refuse_other_shape(batch)
        # Log-sum-exp over many classes loses small differences in half precision.
        with torch.autocast(batch.query.device.type, enabled=False):
            vectors = video_vectors(batch.query)  # (E, Q, C)
            vectors = EpisodeNoise(batch.seeds).dropout(vectors, self.config.dropout, is_on=self.training)
            logits: Tensor = self.linear(vectors)
            wanted = batch.query_labels if targets is None else targets
            losses = {} if wanted is None else {"class": self._loss(logits, wanted)}
        return HeadOutput(logits, losses, labels=None if targets is None else targets.argmax(dim=-1))

    def _loss(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Cross-entropy (E, Q) of logits (E, Q, Z) with labels (E, Q) int64 or probabilities (E, Q, Z)."""
        smoothing = self.config.label_smoothing if self.training else 0.0
        losses = F.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(0, 1), reduction="none", label_smoothing=smoothing
        )
        return losses.reshape(logits.shape[:2])

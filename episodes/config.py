"""The knobs of the tasks: which videos, which episodes, and how they are scored."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DataConfig(BaseModel):
    """Which videos there are."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    manifest: str | None = None
    """CSV file of the videos, made by `mastaf dataset`; see docs/datasets.md."""
    global_labels: Literal["train", "all"] = "train"
    """Labels of the classifier over all training classes. train: 0 .. Z-1 over the training classes by name. all: the place
    among the classes of all splits by name, as in the published code, whose checkpoints need it."""
    allow_overlap: bool = False
    """Go on although a class or a video is in two splits."""
    allow_outside: bool = False
    """Accept videos outside of the manifest's root folder (absolute paths, "..", links)."""


class EpisodesConfig(BaseModel):
    """What one few-shot task is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    protocol: Literal["per_class", "one_query"] = "per_class"
    """per_class: n_query queries of every class (usual). one_query: n_query queries of one class, drawn anew in every
    episode (published MASTAF)."""
    n_way: int = Field(default=5, ge=2)
    """Classes in an episode. 5 in nearly all papers."""
    k_shot: int = Field(default=1, ge=1)
    """Labelled videos of each class. 1 or 5 in nearly all papers."""
    n_query: int = Field(default=1, ge=1)
    """Queries of each class, or of the one class that is asked about."""
    seed: int = Field(default=0, ge=0)
    """Of the training episodes and their views."""
    train_views: int = Field(default=1, ge=1)
    """In training, the view of each video is drawn from 0 .. train_views - 1."""


class EvaluationConfig(BaseModel):
    """How a run is scored."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    episodes: int = Field(default=10_000, ge=1)
    """Episodes of the test. 10,000 as in the paper."""
    split: Literal["train", "val", "test"] = "test"
    """Where they are drawn from."""
    views: Literal[1] = 1
    """Views of each video that are scored. Only one: view 0, the evaluation view."""
    seed: int = Field(default=0, ge=0)
    """Of the validation and test episodes; keep it, so that all heads meet the same ones."""

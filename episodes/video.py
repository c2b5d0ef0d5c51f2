"""One video of a data set: where it lies, what it shows, and which split it belongs to."""

import math
from dataclasses import dataclass

SPLITS = ("train", "val", "test")
"""The only names of splits. Classes of one split never appear in another (see `episodes.checks`)."""


@dataclass(frozen=True, slots=True)
class Video:
    """One file, or one folder of frames, with one class name; or a stretch of it between two times."""

    video_id: str
    """Unique within its manifest, for instance "walk/video_7"."""
    path: str
    """Relative to the manifest's root, with forward slashes."""
    class_name: str
    """The class it shows."""
    split: str
    """One of `SPLITS`."""
    start_seconds: float | None = None
    """Where the stretch begins; None: at the beginning of the file."""
    end_seconds: float | None = None
    """Where the stretch ends; None: at the end of the file."""
    subject: str | None = None
    """Who or what is filmed, where that is known. Nothing here reads it."""
    excluded: str | None = None
    """Why episodes leave this video out; None: they use it."""

    def __post_init__(self) -> None:
        for name in ("video_id", "path", "class_name", "split", "subject", "excluded"):
            text = getattr(self, name)
            if text == "" or (text is None and name in ("video_id", "path", "class_name", "split")):
                raise ValueError(f"video {self.video_id!r}: {name} is empty; give it a value")
            if text is not None and "\0" in text:
                raise ValueError(f"video {self.video_id!r}: {name} = {text!r} contains a NUL character; remove it")
        if self.split not in SPLITS:
            raise ValueError(f"video {self.video_id!r}: split = {self.split!r} is not one of {', '.join(SPLITS)}")
        self._check_times()

    def _check_times(self) -> None:
        for name in ("start_seconds", "end_seconds"):
            seconds = getattr(self, name)
            if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"video {self.video_id!r}: {name} = {seconds} is not a time; give seconds from 0 on")
        if self.end_seconds is not None and self.end_seconds <= (self.start_seconds or 0.0):
            raise ValueError(
                f"video {self.video_id!r}: end_seconds = {self.end_seconds} is not after "
                f"start_seconds = {self.start_seconds or 0.0}"
            )

"""Why a video gave no clip, or a clip with a blemish: a closed list, so that counts can be compared."""

import errno

REASONS: dict[str, str] = {
    "missing": "there is no such file or folder",
    "permission": "reading is not allowed",
    "not_a_file": "neither a regular file nor a folder (a pipe, device, socket or a loop of links)",
    "empty_file": "the file has 0 bytes",
    "not_a_video": "the content is no video container that is read here",
    "single_image": "the content is a single picture",
    "no_video_stream": "the container holds no video stream",
    "no_decoder": "this build of FFmpeg has no decoder for the stream",
    "no_frames": "not one frame could be decoded",
    "corrupt": "the content is damaged beyond use",
    "too_large": "a frame has more pixels than are accepted",
    "empty_segment": "no frame lies between start_seconds and end_seconds",
    "out_of_memory": "decoding asked for more memory than there is",
    "unexpected": "decoding failed in an unforeseen way",
    "stopped": "the decoding process died or exceeded its time",
    "not_finite": "the network gave values that are not finite in the store's number format",
    "truncated": "the file ends before its declared end",
    "damaged": "some packets could not be decoded",
    "frame_count_mismatch": "the decoder gave another number of frames than the container announced",
    "short_video": "fewer frames than num_frames",
}
"""Code -> sentence. The last four also mark clips that are usable but degraded."""


class VideoError(Exception):
    """One video could not be read; the run goes on without it and counts it."""

    def __init__(self, reason: str, detail: str, is_passing: bool = False) -> None:
        if reason not in REASONS:
            raise ValueError(f"reason {reason!r} is not one of {sorted(REASONS)}")
        super().__init__(reason, detail, is_passing)  # all, so that the error survives the way out of a worker process
        self.reason = reason
        """A key of REASONS."""
        self.detail = detail
        """One line for a person."""
        self.is_passing = is_passing
        """Trouble of the moment (time, memory, the disk): another try may succeed."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


_DISK_TROUBLE = frozenset(
    {errno.EIO, errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE}
)


def is_disk_trouble(error: BaseException) -> bool:
    """Whether reading failed for a reason of the moment, such as a network disk that did not answer."""
    return isinstance(error, OSError) and error.errno in _DISK_TROUBLE

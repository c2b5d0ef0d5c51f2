"""Every kind of odd or hostile input that is tested, written into a folder, with the outcome that is right for each.

The outcomes hold for clips of eight frames with short_policy "pad". docs/inputs.md lists the kinds by group.
"""

from collections.abc import Callable
from pathlib import Path

from contracts import corpus_files, corpus_videos
from contracts.corpus_kind import Kind, Writer

__all__ = ["Kind", "write_corpus"]


def write_corpus(folder: Path) -> list[Kind]:
    """Write every kind into an empty folder; takes about five seconds.

    The names on disk are as odd as the contents, and two of the kinds may not be entered or read by anyone but root: give them
    their permissions back before the folder is removed (`Kind.is_closed_to_others`).
    """
    groups: list[Callable[[Writer], None]] = [
        corpus_files.no_videos,
        corpus_files.pictures,
        corpus_files.no_moving_pictures,
        corpus_files.odd_paths,
        corpus_files.playlists,
        corpus_files.odd_names,
        corpus_videos.containers,
        corpus_videos.pixel_formats,
        corpus_videos.sizes,
        corpus_videos.clocks,
        corpus_videos.cuts,
        corpus_videos.damage,
        corpus_videos.false_numbers,
        corpus_files.frame_folders,
    ]
    kinds = []
    for group in groups:
        root = folder / group.__name__
        root.mkdir(parents=True)
        writer = Writer(root)
        group(writer)
        kinds += writer.kinds
    return kinds

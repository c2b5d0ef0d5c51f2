"""What a head can show, by name: `HeadOutput.maps` holds tensors with these axes, and `pipeline.head_pictures` draws them.

| letter | axis |
|---|---|
| E, S, Q, N | episodes, supports in the order of the batch, queries, classes |
| T, H, W | time steps and grid of the values (a coarser grid than the cube's covers the same frame) |
| U | time steps of the other video |
| K | members of a tuple |
| 2 | an (x, y) pair, or a pair of numbers as the name says |
"""

AXES: dict[str, str] = {
    # Attention over the positions of a video; drawn as heat over its frames.
    "self_support": "E N T H W",
    "self_query": "E Q T H W",
    "cross_support": "E Q N T H W",
    "cross_query": "E Q N T H W",
    "patch_support": "E S T H W",
    "patch_query": "E Q T H W",
    "mask_support": "E Q N T H W",
    "mask_query": "E Q N T H W",
    # Which frames of the query (T) go with which of the support (U): an alignment path or soft assignment, largest where they match.
    "alignment": "E Q S T U",
    "class_alignment": "E Q N T U",
    # Tuples of frames: for each class, members (time steps, int64) of the query tuple that fits best, of the support tuple that it
    # attends to most, and which support that is (place in the batch, int64).
    "tuple_query": "E Q N K",
    "tuple_support": "E Q N K",
    "tuple_video": "E Q N",
    # Time warp of a video: (a, b) of source time = a t + b with t in [-1, 1].
    "warp_support": "E S 2",
    "warp_query": "E Q 2",
    # Shift (x, y) of the attended region of the query at each time step, in half frame sizes; that of the class moves the opposite way.
    "offset": "E Q N T 2",
    # Weight of each support in the decision.
    "support_weights": "E Q S",
}
"""Axes of each map; a head with several of a kind adds an underscore and a number (tuples of cardinality 2: "tuple_query_2")."""


def axes_of(name: str) -> str:
    """Axes of a map by its name.

    Raises:
        KeyError: no map has that name.
    """
    kind, _, number = name.rpartition("_")
    return AXES[kind if number.isdigit() else name]

"""The knobs of the MASTAF head and its three presets.

Where the paper (MASTAF: A Model-Agnostic Spatio-Temporal Attention Fusion Network for Few-shot Video Classification,
2021, https://arxiv.org/abs/2112.04585) and its released code (https://github.com/lxhit/STAF, commit 10c7d9a) differ,
each difference is a key. `docs/mastaf.md` has the table.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from episodes.head import HeadOptions

Preset = Literal["reference", "paper", "paper_stable"]

# What both readings of the paper change: one softmax per branch on unscaled cosines, their mean, the support side
# into the global classifier, and the weight on the global term.
_PAPER_SCORES: dict[str, Any] = {
    "scale": 1.0,
    "fusion": "prob_mean",
    "global_input": "support_cross",
    "lambda_global": 2.0,
    "lambda_few": 1.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "reference": {},
    "paper": {
        **_PAPER_SCORES,
        "normalize_corr": False,
        "kernel_reduce": "sum",
        "meta_bn": "none",
        "train_similarity": "whole_cube",
        "eval_similarity": "whole_cube",
        "global_pooling": "averaged",
    },
    "paper_stable": {**_PAPER_SCORES, "train_similarity": "pooled"},
}
"""Defaults that a preset changes; the fields' own defaults are the reference."""


_OF_ATTENTION = (
    "normalize_corr",
    "kernel_reduce",
    "meta_learner",
    "hidden",
    "tau",
    "meta_bn",
    "meta_bn_query",
    "share_cam",
    "residual",
    "attention_gain",
    "alpha",
)


class MastafConfig(HeadOptions):
    """Knobs of the MASTAF head. Field defaults are those of the released code; explicit keys override the preset."""

    preset: Preset = "reference"
    """Which defaults: "reference" is the released code, "paper" the printed equations to the letter (its attention
    saturates on real features), "paper_stable" the reference with the paper's similarity, fusion and losses."""
    self_attention: bool = True
    """Whether each video attends to itself."""
    cross_attention: bool = True
    """Whether query and prototype attend to each other. Without both this is the Neighbor ablation."""
    average_time: bool = False
    """Whether a cube is averaged over its time steps first: one map per video, as MASTAF with a per-frame (TSN) network
    has it (reference 9.2)."""
    normalize_corr: bool = True
    """Whether correlations are cosines (unit features at each position) or raw inner products (paper, Eqs. 2, 6, 7)."""
    kernel_reduce: Literal["mean", "sum"] = "mean"
    """How the kernel is applied along the partner's positions; the sum is Eq. 3 as printed."""
    meta_learner: bool = True
    """Whether the kernel is learnt. Without, it is uniform: attention comes from the correlation averaged over the
    partner's positions (our reading of the paper's ablation, which names it without a formula)."""
    hidden: int = Field(default=6, ge=1)
    """Hidden units of the meta-learner (paper and code: 6)."""
    tau: float = Field(default=0.025, gt=0.0)
    """Temperature of the attention's softmax (paper and code: 0.025)."""
    meta_bn: Literal["reference", "none", "always"] = "reference"
    """Batch normalisation inside the meta-learner. "reference" leaves it out where the released code does: with one
    class for all but the query's self map, and for that map as `meta_bn_query` says."""
    meta_bn_query: bool | None = None
    """Whether the query's self map is normalised under "reference". None: decided by the protocol, no if an episode
    has one query in all (the released code's behaviour), else yes."""
    share_cam: bool = True
    """Whether self and cross attention share one meta-learner (code) or have one each (the paper's drawing)."""
    residual: bool = True
    """Whether the attended cube is R(1 + gA) or, without, R(gA)."""
    attention_gain: Annotated[float, Field(ge=0.0)] | Literal["L"] = 1.0
    """g in R(1 + gA); "L" is the number of positions, which makes the mean attention one."""
    scale: float = Field(default=7.0, gt=0.0)
    """Factor of every cosine (code: 7; the paper has none)."""
    train_similarity: Literal["per_position", "pooled", "whole_cube"] = "per_position"
    """What the few-shot loss compares: each query position with the pooled prototype, both pooled, or whole cubes."""
    eval_similarity: Literal["pooled", "whole_cube"] = "pooled"
    """What the predicting scores compare, in training too (for the accuracy that is logged)."""
    fusion: Literal["logit_sum", "prob_mean"] = "logit_sum"
    """How the branches are joined: cross + alpha self as logits, or the mean of two softmaxes weighted the same way."""
    alpha: float = Field(default=1.0, ge=0.0)
    """Weight of the self branch beside the cross branch (code: 1). A branch alone has weight one."""
    global_classifier: bool = True
    """Whether a classifier over all training classes is trained along (multi-task)."""
    global_input: Literal["query_true_cross", "support_cross"] = "query_true_cross"
    """What it classifies: the query attended with its true class, or each prototype attended with the query. The
    query is attended by itself where there is no cross branch, and plain where there is no attention."""
    global_pooling: Literal["per_position", "averaged"] = "per_position"
    """Whether it classifies each position, or the average over positions."""
    lambda_global: float = Field(default=1.0, ge=0.0)
    """Weight of the global loss (code: 1; paper: 2)."""
    lambda_few: float = Field(default=0.5, ge=0.0)
    """Weight of the few-shot loss, the released flag `lamda` (code: 0.5; paper: 1)."""

    def without_effect(self) -> dict[str, str]:
        """Options that change no number with the branches that are on, each with the reason."""
        if self.self_attention and self.cross_attention:
            return {}
        if not self.self_attention and not self.cross_attention:
            return dict.fromkeys(_OF_ATTENTION, "there is no attention")
        of_both = dict.fromkeys(("share_cam", "alpha"), "there is one branch of attention only")
        return of_both if self.self_attention else {**of_both, "meta_bn_query": "there is no self attention"}

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**PRESETS.get(str(values.get("preset", "reference")), {}), **values}

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "MastafConfig":
        if self.global_classifier and self.global_input == "support_cross" and not self.cross_attention:
            raise ValueError(
                'global_input = "support_cross" needs cross_attention; '
                'set global_input = "query_true_cross", or global_classifier = false'
            )
        if self.meta_bn == "always" and self.meta_bn_query is False:
            raise ValueError('meta_bn = "always" contradicts meta_bn_query = false; use meta_bn = "reference"')
        if not self.residual and self.attention_gain == 0.0:
            raise ValueError("attention_gain = 0 without residual leaves nothing of the cube; give a gain above 0")
        if self.lambda_few == 0.0 and (self.lambda_global == 0.0 or not self.global_classifier):
            raise ValueError("lambda_few = 0 leaves no loss to train with; raise it, or lambda_global")
        return self

"""The published few-shot splits: their sizes, and for UCF101 and HMDB51 the classes themselves.

Both partitions are those of ARN (Zhang et al., "Few-shot Action Recognition with Permutation-invariant Attention", 2020,
https://arxiv.org/abs/2001.03905) and hold all videos of their classes. The others (SSv2-part and Kinetics-100: CMN, 2018;
SSv2-all: OTAM, 2020) hold chosen videos, so that they need the published list files.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from episodes.datasets import ManifestError
from episodes.video import SPLITS


@dataclass(frozen=True, slots=True)
class SplitSize:
    """How much a split holds."""

    classes: int
    """Number of classes."""
    videos: int
    """Number of videos."""
    smallest_class: int
    """Videos of the class that has fewest."""
    largest_class: int
    """Videos of the class that has most."""


@dataclass(frozen=True, slots=True)
class PublishedDataset:
    """What is known about a published protocol."""

    title: str
    """As papers call it."""
    sizes: Mapping[str, SplitSize]
    """By split, counted in the published lists."""
    lists_folder: str
    """Name of the folder of its list files in the released code."""
    list_number: str
    """Ending of the names of its list files: ``trainlist03.txt``."""
    list_digests: tuple[str, str, str]
    """First eight digits of the MD5 of the published train, val and test list."""
    ignores_case: bool
    """Whether names that differ in upper and lower case only are the same video. Not so for YouTube ids."""
    partition: Mapping[str, tuple[str, ...]] | None = None
    """Class names by split, where a split holds all videos of its classes."""

    def split_of_class(self) -> dict[str, str]:
        """Split by class name, in the order of the splits.

        Raises:
            ManifestError: classes alone do not make this split.
        """
        if self.partition is None:
            raise ManifestError(
                f"{self.title} uses chosen videos of its classes, so it needs the published list files: give --lists DIR with "
                f"{', '.join(f'{split}list{self.list_number}.txt' for split in SPLITS)}"
            )
        return {class_name: split for split in SPLITS for class_name in self.partition[split]}


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


UCF101_PARTITION = {
    "train": _names("""
        ApplyEyeMakeup Archery BabyCrawling BalanceBeam BandMarching BaseballPitch Basketball BasketballDunk BenchPress Biking
        Billiards BlowDryHair BodyWeightSquats Bowling BoxingPunchingBag BoxingSpeedBag BreastStroke BrushingTeeth
        CricketBowling Drumming Fencing FieldHockeyPenalty FrisbeeCatch FrontCrawl Haircut Hammering HeadMassage HulaHoop
        JavelinThrow JugglingBalls JumpingJack Kayaking Knitting LongJump Lunges MilitaryParade Mixing MoppingFloor Nunchucks
        ParallelBars PizzaTossing PlayingCello PlayingDhol PlayingFlute PlayingPiano PlayingSitar PlayingTabla PlayingViolin
        PoleVault PullUps PushUps Rafting RopeClimbing Rowing ShavingBeard Skijet SoccerJuggling SoccerPenalty SumoWrestling
        Swing TableTennisShot TaiChi ThrowDiscus TrampolineJumping Typing UnevenBars WalkingWithDog WallPushups WritingOnBoard
        YoYo
        """),
    "val": _names("""
        ApplyLipstick CricketShot HammerThrow HandstandPushups HighJump HorseRiding PlayingDaf PlayingGuitar Shotput
        SkateBoarding
        """),
    "test": _names("""
        BlowingCandles CleanAndJerk CliffDiving CuttingInKitchen Diving FloorGymnastics GolfSwing HandstandWalking HorseRace
        IceDancing JumpRope PommelHorse Punch RockClimbingIndoor SalsaSpin Skiing SkyDiving StillRings Surfing TennisSwing
        VolleyballSpiking
        """),
}
HMDB51_PARTITION = {
    "train": _names("""
        brush_hair catch chew clap climb climb_stairs dive draw_sword dribble drink fall_floor flic_flac handstand hug jump
        kiss pullup punch push ride_bike ride_horse shake_hands shoot_bow situp stand sword sword_exercise throw turn walk wave
        """),
    "val": _names("cartwheel eat golf hit laugh shoot_ball shoot_gun smile somersault swing_baseball"),
    "test": _names("fencing kick kick_ball pick pour pushup run sit smoke talk"),
}

DATASETS: dict[str, PublishedDataset] = {
    "ucf101": PublishedDataset(
        title="UCF101 (ARN)",
        sizes={
            "train": SplitSize(70, 9154, 100, 164),
            "val": SplitSize(10, 1421, 114, 167),
            "test": SplitSize(21, 2745, 109, 166),
        },
        lists_folder="ucf_ARN",
        list_number="03",
        list_digests=("e74a5392", "d607d77f", "0d4fe05e"),
        ignores_case=True,
        partition=UCF101_PARTITION,
    ),
    "hmdb51": PublishedDataset(
        title="HMDB51 (ARN)",
        sizes={
            "train": SplitSize(31, 4280, 102, 548),
            "val": SplitSize(10, 1194, 102, 143),
            "test": SplitSize(10, 1292, 103, 232),
        },
        lists_folder="hmdb_ARN",
        list_number="03",
        list_digests=("1e52ef93", "96c1b6a7", "07759a51"),
        ignores_case=True,
        partition=HMDB51_PARTITION,
    ),
    "ssv2-part": PublishedDataset(
        title="SSv2-part (CMN)",
        sizes={
            "train": SplitSize(64, 6400, 100, 100),
            "val": SplitSize(12, 1200, 100, 100),
            "test": SplitSize(24, 2400, 100, 100),
        },
        lists_folder="ssv2_CMN",
        list_number="03",
        list_digests=("f5e8d769", "8dc8f5f3", "0bdd4c08"),
        ignores_case=False,
    ),
    "ssv2-all": PublishedDataset(
        title="SSv2-all (OTAM)",
        sizes={
            "train": SplitSize(64, 67013, 156, 3170),
            "val": SplitSize(12, 1926, 56, 360),
            "test": SplitSize(24, 2857, 17, 272),
        },
        lists_folder="ssv2_OTAM",
        list_number="07",
        list_digests=("bab33dd7", "488fcb18", "5a8e014f"),
        ignores_case=False,
    ),
    "kinetics100": PublishedDataset(
        title="Kinetics-100 (CMN)",
        sizes={
            "train": SplitSize(64, 6400, 100, 100),
            "val": SplitSize(12, 1200, 100, 100),
            "test": SplitSize(24, 2400, 100, 100),
        },
        lists_folder="kinetics_CMN",
        list_number="03",
        list_digests=("96cc2043", "bf4bc662", "98c8ed5e"),
        ignores_case=False,
    ),
}

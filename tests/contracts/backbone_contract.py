"""What every backbone must hold. A test class inherits BackboneContract and gives it the four fixtures.

The last network built is kept for the next test, since building a large one each time would take minutes; a test that
changes something puts it back.

Letters: B clips; F frames; H W pixels; C channels, T time steps of a cube.
"""

import json
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from extract.backbone import Preprocessing
from extract.build import build_backbone, weights_digest
from extract.config import BackboneConfig, SamplingConfig


@lru_cache(maxsize=1)
def _built(config: str, sampling: SamplingConfig) -> Any:
    return build_backbone(BackboneConfig.model_validate_json(config), sampling)


class BackboneContract:
    """The suite; `config` and `sampling` describe a small variant that runs in a second."""

    @pytest.fixture
    def config(self) -> BackboneConfig:
        raise NotImplementedError("a test class gives the config")

    @pytest.fixture
    def sampling(self) -> SamplingConfig:
        raise NotImplementedError("a test class gives the sampling")

    @pytest.fixture
    def default_options(self) -> dict[str, Any]:
        raise NotImplementedError("a test class gives the value of every option that `config` leaves out")

    @pytest.fixture
    def other_options(self) -> list[dict[str, Any]]:
        raise NotImplementedError("a test class gives changes of options, each of which makes another architecture")

    @pytest.fixture
    def backbone(self, config: BackboneConfig, sampling: SamplingConfig) -> Any:
        return _built(config.model_dump_json(), sampling)

    @staticmethod
    def clips(sampling: SamplingConfig, num_clips: int = 3) -> Tensor:
        shape = (num_clips, 3, sampling.num_frames, sampling.crop_size, sampling.crop_size)
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))

    def test_cube_has_five_axes_and_the_named_channels(self, backbone: Any, sampling: SamplingConfig) -> None:
        with torch.inference_mode():
            arrays = backbone(self.clips(sampling))
        assert "cube" in arrays
        for cube in arrays.values():
            assert cube.ndim == 5
            assert cube.shape[0] == 3
            assert cube.dtype == torch.float32
            assert torch.isfinite(cube).all()
        assert arrays["cube"].shape[1] == backbone.channels
        assert arrays["cube"].std() > 0

    def test_preprocessing_is_stated(self, backbone: Any) -> None:
        assert isinstance(backbone.preprocessing, Preprocessing)

    def test_architecture_is_stated_in_json(self, backbone: Any) -> None:
        assert backbone.architecture
        assert json.loads(json.dumps(backbone.architecture, allow_nan=False)) == backbone.architecture

    def test_architecture_holds_the_defaults_that_were_left_out(
        self, backbone: Any, config: BackboneConfig, sampling: SamplingConfig, default_options: dict[str, Any]
    ) -> None:
        assert not set(default_options) & set(config.options)
        spelt_out = config.model_copy(update={"options": {**default_options, **config.options}})
        assert build_backbone(spelt_out, sampling).architecture == backbone.architecture

    def test_architecture_tells_every_option_apart(
        self, backbone: Any, config: BackboneConfig, sampling: SamplingConfig, other_options: list[dict[str, Any]]
    ) -> None:
        for change in other_options:
            changed = config.model_copy(update={"options": {**config.options, **change}})
            assert build_backbone(changed, sampling).architecture != backbone.architecture, change

    def test_architecture_leaves_out_the_weights(
        self, backbone: Any, config: BackboneConfig, sampling: SamplingConfig
    ) -> None:
        other = build_backbone(config.model_copy(update={"weights": "random:12345"}), sampling)
        assert other.architecture == backbone.architecture

    def test_backbone_comes_in_evaluation_mode(self, backbone: Any) -> None:
        assert isinstance(backbone, nn.Module)
        assert not any(module.training for module in backbone.modules())

    def test_two_passes_agree_bit_by_bit(self, backbone: Any, sampling: SamplingConfig) -> None:
        clips = self.clips(sampling)
        with torch.inference_mode():
            assert torch.equal(backbone(clips)["cube"], backbone(clips)["cube"])

    def test_clip_alone_equals_clip_in_a_batch(self, backbone: Any, sampling: SamplingConfig) -> None:
        clips = self.clips(sampling)
        with torch.inference_mode():
            together = backbone(clips)["cube"]
            for index in range(len(clips)):
                alone = backbone(clips[index : index + 1])["cube"][0]
                # Kernels for other batch sizes add in another order; 1e-5 is the design's bound for float32.
                assert (alone - together[index]).abs().max() <= 1e-5 * together.abs().max()

    def test_input_is_left_alone(self, backbone: Any, sampling: SamplingConfig) -> None:
        clips = self.clips(sampling)
        with torch.inference_mode():
            backbone(clips)
        assert torch.equal(clips, self.clips(sampling))

    def test_forward_in_evaluation_mode_changes_no_weight(self, backbone: Any, sampling: SamplingConfig) -> None:
        before = weights_digest(backbone)
        with torch.inference_mode():
            backbone(self.clips(sampling))
        assert weights_digest(backbone) == before

    def test_gradient_reaches_every_parameter(self, backbone: Any, sampling: SamplingConfig) -> None:
        cube = backbone(self.clips(sampling, 2))["cube"]
        (cube * torch.linspace(-1, 1, cube.numel()).view_as(cube)).sum().backward()
        untouched = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
        backbone.zero_grad(set_to_none=True)
        assert untouched == []

    def test_seed_decides_the_weights_and_global_randomness_does_not(
        self, backbone: Any, config: BackboneConfig, sampling: SamplingConfig
    ) -> None:
        torch.manual_seed(99)
        before = torch.random.get_rng_state()
        again = build_backbone(config, sampling)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert weights_digest(again) == weights_digest(backbone)
        other = build_backbone(config.model_copy(update={"weights": "random:12345"}), sampling)
        assert weights_digest(other) != weights_digest(backbone)

    def test_digest_sees_a_change_of_one_number(self, backbone: Any) -> None:
        before = weights_digest(backbone)
        parameter = next(backbone.parameters())
        with torch.no_grad():
            old = parameter.view(-1)[0].item()
            parameter.view(-1)[0] = old + 1
            assert weights_digest(backbone) != before
            parameter.view(-1)[0] = old
        assert weights_digest(backbone) == before

    def test_weights_survive_a_file(
        self, backbone: Any, config: BackboneConfig, sampling: SamplingConfig, tmp_path: Any
    ) -> None:
        torch.save(backbone.state_dict(), tmp_path / "weights.pt")
        loaded = build_backbone(config.model_copy(update={"weights": str(tmp_path / "weights.pt")}), sampling)
        (tmp_path / "weights.pt").unlink()  # pytest keeps its folders
        assert weights_digest(loaded) == weights_digest(backbone)

    def test_unknown_option_is_refused(self, config: BackboneConfig, sampling: SamplingConfig) -> None:
        wrong = config.model_copy(update={"options": {**config.options, "no_such_option": 1}})
        with pytest.raises(ValueError, match="no_such_option"):
            build_backbone(wrong, sampling)

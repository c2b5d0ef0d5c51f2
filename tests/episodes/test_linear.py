"""The linear classifier against torch's own loss, and its draws."""

import pytest
import torch
from torch import Tensor, nn

from episodes.batch import EpisodeBatch
from episodes.head import HeadInputs
from episodes.linear import LinearClassifier, LinearOptions

CLIPS, CLASSES = 6, 4
SHAPE = (5, 2, 3, 3)


def classifier(**options: float) -> LinearClassifier:
    inputs = HeadInputs(SHAPE, CLASSES, generator=torch.Generator().manual_seed(2))
    return LinearClassifier(LinearOptions(**options), inputs)


def batch(chosen: slice = slice(None)) -> EpisodeBatch:
    generator = torch.Generator().manual_seed(1)
    cubes = torch.randn((CLIPS, 1, *SHAPE), generator=generator)[chosen]
    labels = torch.tensor([0, 3, 2, 2, 1, 0])[chosen, None]
    none = torch.zeros((len(labels), 0), dtype=torch.int64)
    return EpisodeBatch(cubes[:, :0], none, cubes, labels, CLASSES, seeds=torch.arange(10, 10 + CLIPS)[chosen])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("is_mixed", [False, True], ids=["labels", "probabilities"])
def test_losses_and_gradients_are_those_of_torch(smoothing: float, is_mixed: bool) -> None:
    head, clips = classifier(label_smoothing=smoothing), batch()
    assert clips.query_labels is not None
    targets: Tensor | None = None
    wanted = clips.query_labels[:, 0]
    if is_mixed:
        wanted = torch.rand((CLIPS, CLASSES), generator=torch.Generator().manual_seed(5)).softmax(dim=1)
        targets = wanted[:, None]
    output = head(clips, targets=targets)
    plain = nn.Linear(SHAPE[0], CLASSES)
    plain.load_state_dict(head.linear.state_dict())
    logits = plain(clips.query[:, 0].mean(dim=(2, 3, 4)))
    expected = nn.CrossEntropyLoss(label_smoothing=smoothing)(logits, wanted)
    torch.testing.assert_close(output.logits[:, 0], logits)
    torch.testing.assert_close(output.losses["class"].mean(), expected)
    output.losses["class"].mean().backward()
    expected.backward()
    torch.testing.assert_close(head.linear.weight.grad, plain.weight.grad)
    assert output.losses["class"].shape == (CLIPS, 1)
    assert (output.labels is None) == (not is_mixed)
    if is_mixed:
        assert output.labels is not None
        assert output.labels[:, 0].tolist() == wanted.argmax(dim=1).tolist()


def test_a_clip_is_dropped_out_alike_alone_and_among_others_and_not_at_all_in_evaluation() -> None:
    head = classifier(dropout=0.5, label_smoothing=0.1)
    together = head(batch())
    for index in range(CLIPS):
        alone = head(batch(slice(index, index + 1)))
        torch.testing.assert_close(alone.logits[0], together.logits[index])
    plain = classifier()(batch())
    assert not torch.equal(together.logits, plain.logits)
    evaluated = head.eval()(batch())
    torch.testing.assert_close(evaluated.logits, plain.logits, rtol=0, atol=0)
    torch.testing.assert_close(evaluated.losses["class"], plain.losses["class"], rtol=0, atol=0)


def test_classifier_predicts_without_labels_and_its_first_weights_come_from_its_generator() -> None:
    head = classifier()
    clips = batch()
    unlabelled = EpisodeBatch(clips.support, clips.support_labels, clips.query, None, CLASSES)
    output = head(unlabelled)
    assert output.losses == {}
    assert output.logits.shape == (CLIPS, 1, CLASSES)
    assert torch.equal(head.linear.weight, classifier().linear.weight)


def test_cubes_of_another_shape_and_a_classifier_of_no_classes_are_refused() -> None:
    clips = batch()
    narrow = EpisodeBatch(clips.support[:, :, :4], clips.support_labels, clips.query[:, :, :4], None, CLASSES)
    with pytest.raises(ValueError, match="built for"):
        classifier()(narrow)
    with pytest.raises(ValueError, match="num_classes"):
        LinearClassifier(LinearOptions(), HeadInputs(SHAPE))

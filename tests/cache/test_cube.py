import json
from dataclasses import replace
from typing import Any

import pytest

from cache.cube import ArraySpec, Spec, canonical_json
from contracts.store_examples import CUBE, example_spec


def test_spec_survives_a_trip_through_json() -> None:
    spec = example_spec(sampling={"sizes": (1, 2), "odd": "bytes\udcff"})
    again = Spec.from_json(json.loads(canonical_json(spec.to_json())))
    assert again == spec
    assert again.fingerprint == spec.fingerprint
    assert spec.differences(again) == []


def test_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    forwards = example_spec(compute={"dtype": "float32", "batch_size": 4})
    backwards = example_spec(compute={"batch_size": 4, "dtype": "float32"})
    assert forwards.fingerprint == backwards.fingerprint


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"decoder": {"name": "pyav", "major": 19}}, "decoder.major: store 18, wanted 19"),
        ({"backbone": {"name": "r3d18", "options": {}}}, 'backbone.name: store "r3d50", wanted "r3d18"'),
        ({"weights_digest": "x"}, f'weights_digest: store "{"ab" * 32}", wanted "x"'),
        ({"compute": {"dtype": "float32"}}, "compute.batch_size: store 4, wanted nothing"),
        (
            {"arrays": {"cube": replace(CUBE, shape=(4, 2, 7, 7)), "pooled": CUBE}},
            "arrays.cube.shape: store [4,2,3,3], wanted [4,2,7,7]",
        ),
        ({"arrays": {"cube": CUBE}}, "arrays.pooled: store {"),
    ],
)
def test_each_change_changes_the_fingerprint_and_is_named(change: dict[str, Any], line: str) -> None:
    stored, wanted = example_spec(), example_spec(**change)
    assert stored.fingerprint != wanted.fingerprint
    assert any(difference.startswith(line) for difference in stored.differences(wanted))


@pytest.mark.parametrize(
    "damage",
    [
        lambda spec: spec.pop("compute"),
        lambda spec: spec.update(extra=1),
        lambda spec: spec.update(sampling=[1]),
        lambda spec: spec.update(weights_digest=3),
        lambda spec: spec.update(arrays={}),
        lambda spec: spec.update(arrays=[]),
        lambda spec: spec["arrays"].update(view=CUBE.to_json()),
        lambda spec: spec["arrays"].update({"../up": CUBE.to_json()}),
        lambda spec: spec["arrays"]["cube"].update(dtype="int8"),
        lambda spec: spec["arrays"]["cube"].update(quantiser={"bits": 8}),
        lambda spec: spec["arrays"]["cube"].update(shape=[4, 2, 3]),
        lambda spec: spec["arrays"]["cube"].update(shape=[4, 2, 3, 0]),
        lambda spec: spec["arrays"]["cube"].pop("layer"),
    ],
)
def test_damaged_spec_is_refused(damage: Any) -> None:
    spec = example_spec().to_json()
    Spec.from_json(spec)
    damage(spec)
    with pytest.raises(ValueError, match=r"spec|array|quantiser|shape"):
        Spec.from_json(spec)


def test_values_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        example_spec(compute={"scale": float("nan")})


def test_array_shape_may_be_given_as_a_list() -> None:
    shape: Any = [4, 2, 3, 3]
    assert ArraySpec("layer4", "none", "float16", None, shape) == CUBE

"""The drawn scenes: reproducible, and their truth agrees with their pixels."""

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Outline

from salve.data import scenes, shapes
from salve.data.concepts import ConceptsData
from salve.data.scenes import CLASSES, CONCEPTS, SCENES, SHARED, SPURIOUS, SPURIOUS_BASE_RATE, SPURIOUS_CLASS
from salve.data.transforms import Preprocess
from salve.types import Split, UserError


@pytest.fixture(scope="module")
def data() -> ConceptsData:
    return ConceptsData(batch_size=16, train_per_class=12, select_per_class=3, test_per_class=8)


SPLITS: tuple[Split, ...] = ("train", "select", "test")


def pixels(data: ConceptsData, split: Split = "test") -> torch.Tensor:
    return stacked(data.raw(split))


def stacked(raw: Any) -> torch.Tensor:
    return torch.stack([raw[i][0] for i in range(len(raw))])


def rendered(shape: str, size: int = 64) -> np.ndarray:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2.4 - 1.2
    x, y = np.meshgrid(axis, axis)
    return getattr(shapes, shape)(x, y)


# -- reproducibility


def test_same_seed_same_bytes(data: ConceptsData) -> None:
    again = ConceptsData(batch_size=3, train_per_class=1, test_per_class=8)
    other = ConceptsData(batch_size=16, seed=1, train_per_class=12, test_per_class=8)
    assert torch.equal(pixels(data), pixels(again))
    assert (pixels(data) != pixels(other)).float().mean() > 0.9


def test_an_image_does_not_depend_on_how_many_are_drawn(data: ConceptsData) -> None:
    fewer = ConceptsData(batch_size=16, train_per_class=2, test_per_class=2)
    assert torch.equal(pixels(data)[:20], pixels(fewer))
    assert torch.equal(data.truth("test").presence[:20], fewer.truth("test").presence)


def test_splits_and_images_differ(data: ConceptsData) -> None:
    everything = torch.cat([pixels(data, split) for split in SPLITS])
    assert len({image.numpy().tobytes() for image in everything}) == len(everything) == 230
    for split in SPLITS:
        assert data.labels(split).bincount().tolist() == [data.per_class[split]] * 10


def test_numpy_global_seed_is_left_alone(data: ConceptsData) -> None:
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state(legacy=False)["state"]["key"].copy()  # noqa: NPY002
    ConceptsData(batch_size=4, test_per_class=1).raw("test")
    assert (np.random.get_state(legacy=False)["state"]["key"] == before).all()  # noqa: NPY002


# -- shapes


@pytest.mark.parametrize("shape", [*CONCEPTS, *scenes.CLUTTER])
def test_shapes_fill_the_unit_disc_and_are_distances(shape: str) -> None:
    distance = rendered(shape, 120)
    axis = (np.arange(120) + 0.5) / 120 * 2.4 - 1.2
    radius = np.hypot(*np.meshgrid(axis, axis))
    assert (distance[radius > 1.0] > -1e-6).all()
    assert radius[distance < 0].max() > 0.75
    # A distance changes no faster than one walks. (Differences and unions keep that bound; seams may be slower.)
    step = axis[1] - axis[0]
    assert np.abs(np.diff(distance, axis=0)).max() <= step * 1.01
    assert np.abs(np.diff(distance, axis=1)).max() <= step * 1.01


def test_polygon_against_matplotlib_and_dense_points() -> None:
    corners = [(-0.8, -0.6), (0.7, -0.9), (0.2, 0.0), (0.9, 0.7), (-0.3, 0.4), (-0.9, 0.8)]
    points = np.random.default_rng(0).uniform(-1.2, 1.2, (400, 2)).astype(np.float32)
    distance = shapes.polygon(points[:, 0], points[:, 1], corners)
    assert ((distance < 0) == Outline([*corners, corners[0]]).contains_points(points)).all()
    along = np.linspace(0, 1, 2000)[:, None]
    sides = zip(np.asarray(corners), np.roll(corners, -1, axis=0), strict=True)
    edge = np.concatenate([start * (1 - along) + end * along for start, end in sides])
    nearest = np.sqrt(((points[:, None] - edge[None]) ** 2).sum(-1)).min(1)
    np.testing.assert_allclose(np.abs(distance), nearest, atol=1e-3)


def test_no_shape_is_another_or_its_mirror_image() -> None:
    inside = {name: rendered(name) < 0 for name in CONCEPTS}
    for a, b in combinations(CONCEPTS, 2):
        for other in (inside[b], inside[b][:, ::-1]):
            overlap = (inside[a] & other).sum() / (inside[a] | other).sum()
            assert overlap < 0.75, (a, b)


# -- truth


def test_every_concept_that_is_present_can_be_seen_and_no_other(data: ConceptsData) -> None:
    truth = data.truth("test")
    assert truth.concepts == CONCEPTS
    assert truth.presence.shape == (80, len(CONCEPTS))
    for concept in range(len(CONCEPTS)):
        masks = truth.masks(range(80), concept)
        assert masks.shape == (80, 64, 64)
        assert torch.equal(masks.flatten(1).any(1), truth.presence[:, concept]), CONCEPTS[concept]


def test_each_class_shows_its_own_concept_always_and_alone(data: ConceptsData) -> None:
    truth, labels = data.truth("train"), data.labels("train")
    own = torch.tensor(truth.class_concept)
    assert len(set(truth.class_concept)) == 10
    assert [CONCEPTS[k] for k in own] == [SCENES[name] for name in data.classes]
    assert torch.equal(truth.presence[:, own], torch.nn.functional.one_hot(labels, 10).bool())


def test_masks_lie_where_drawing_the_object_changed_the_picture(data: ConceptsData) -> None:
    """Oracle: draw the same scene without the object, and compare."""
    truth, images = data.truth("test"), pixels(data).int()
    covered, stray = [], 0
    for image, concept in truth.presence.nonzero().tolist():
        scene = data.scene("test", image)
        without = scenes.Scene(tuple(layer for layer in scene.layers if layer.concept != concept), scene.colours)
        drawn = torch.from_numpy(scenes.draw(without, scenes.stream(0, 1, image, 1), 64)).int()
        changed = (images[image] - drawn).abs().amax(0) > 0
        mask = truth.masks([image], concept)[0]
        covered.append((changed & mask).sum() / mask.sum())
        near = torch.nn.functional.max_pool2d(mask[None].float(), 3, stride=1, padding=1)[0].bool()
        stray += int((changed & ~near).sum())
    assert len(covered) > 90
    assert min(covered) > 0.9  # now and then an object has the colour of the clutter behind it
    assert np.mean(covered) > 0.99
    assert stray / len(covered) < 2  # soft edges beside clutter that lies in front


@pytest.mark.parametrize("concept", ["tag", "tower", "anchor"])
def test_pairs_differ_where_the_concept_lies_and_nowhere_else(data: ConceptsData, concept: str) -> None:
    number, size, images = CONCEPTS.index(concept), data.native_size, pixels(data)
    pairs, shown = data.counterfactuals("test", concept), data.truth("test").presence[:, number]
    both = [stacked(pairs.without), stacked(pairs.with_mark)]
    assert 0 < shown.sum() < len(shown)
    assert torch.equal(both[0][~shown], images[~shown])
    assert torch.equal(both[1][shown], images[shown])
    axis = np.arange(size) + 0.5
    for i, changed in enumerate((both[0] != both[1]).any(1).numpy()):
        assert changed.sum() > 20
        if shown[i]:
            (layer,) = [one for one in data.scene("test", i).layers if one.concept == number]
            reach = np.hypot(axis[:, None] - layer.y * size, axis[None] - layer.x * size)
            assert reach[changed].max() <= layer.radius * size + 1
        elif concept == "tag":
            corners = [np.hypot(axis[:, None] - y, axis[None] - x)[changed].max() for x in (0, size) for y in (0, size)]
            assert min(corners) <= math.hypot(0.2, 0.2) * size + 1
        else:
            rows, columns = np.nonzero(changed)
            assert max(np.ptp(rows), np.ptp(columns)) <= 2 * 0.235 * size + 2


def test_pairs_and_groups_are_of_the_shortcut(data: ConceptsData) -> None:
    tower = ConceptsData(batch_size=1, test_per_class=8, shortcut="tower")
    assert (data.pairs("test").name, tower.pairs("test").name) == ("tag", "tower")
    for one in (data, tower):
        groups, truth, labels = one.groups("test"), one.truth("test"), one.labels("test")
        assert torch.equal(groups.of_image == 1, truth.presence[:, CONCEPTS.index(groups.name)])
        named = groups.named(CLASSES)
        for i, group in enumerate(groups.numbered(labels)):
            assert named[group] == (CLASSES[labels[i]], ("absent", "present")[groups.of_image[i]])
    assert tower.fingerprint() == ConceptsData(batch_size=1, test_per_class=8).fingerprint()


def test_a_class_may_miss_its_object_in_train_images_alone() -> None:
    rare = ConceptsData(batch_size=1, select_per_class=20, defining_rate=0.7)
    clinic, cross = CLASSES.index("clinic"), CONCEPTS.index("cross")
    shown = {split: rare.truth(split).presence[rare.labels(split) == clinic, cross] for split in ("train", "select")}
    assert 0.6 < shown["train"].double().mean() < 0.8
    assert shown["select"].all()
    missing = clinic + 10 * int((~shown["train"]).nonzero()[0, 0])
    assert cross not in [layer.concept for layer in rare.scene("train", missing).layers]
    usual = ConceptsData(batch_size=1, select_per_class=20)
    assert usual.truth("train").presence[usual.labels("train") == clinic, cross].all()
    assert rare.fingerprint() != usual.fingerprint()


def test_occluded_pixels_are_left_out() -> None:
    colour = np.zeros(3, dtype=np.float32)
    behind = scenes.Layer(0, "ring", 0.4, 0.5, 0.2, 0.0, colour, 0.0)
    front = scenes.Layer(1, "cross", 0.55, 0.5, 0.2, 0.0, colour, 0.0)
    scene = scenes.Scene((behind, front), (colour, colour))
    alone = scenes.visible_mask(scenes.Scene((behind,), (colour, colour)), 0, 64)
    ring, cross = scenes.visible_mask(scene, 0, 64), scenes.visible_mask(scene, 1, 64)
    assert not (ring & cross).any()
    assert 0.5 * alone.sum() < ring.sum() < alone.sum()
    assert (ring | cross)[alone].mean() > 0.97  # what is missing of the ring is under the cross


def test_objects_overlap_little(data: ConceptsData) -> None:
    visible = []
    for image, concept in data.truth("train").presence.nonzero().tolist():
        scene = data.scene("train", image)
        alone = scenes.Scene(tuple(layer for layer in scene.layers if layer.concept == concept), scene.colours)
        shown = scenes.visible_mask(scene, concept, 64).sum() / scenes.visible_mask(alone, concept, 64).sum()
        visible.append(shown)
    assert min(visible) > 0.3
    assert np.mean(np.asarray(visible) > 0.85) > 0.8


def binomial_tolerance(rate: float, n: int) -> float:
    return 4.5 * math.sqrt(rate * (1 - rate) / n) + 1e-9


def test_shared_concepts_come_at_their_rates() -> None:
    n = 500
    large = ConceptsData(batch_size=1, train_per_class=n)
    presence, labels = large.truth("train").presence.double(), large.labels("train")
    assert sum(len(by_class) >= 2 for by_class in SHARED.values()) >= 2
    for concept, by_class in SHARED.items():
        assert len(set(by_class.values())) == len(by_class), "the classes should differ in strength"
        for label, name in enumerate(CLASSES):
            rate = by_class.get(name, 0.0)
            measured = presence[labels == label, CONCEPTS.index(concept)].mean().item()
            assert abs(measured - rate) <= binomial_tolerance(rate, n), (concept, name)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 1.0])
def test_spurious_correlation_is_the_tags_rate_in_its_class(correlation: float) -> None:
    n = 500
    large = ConceptsData(batch_size=1, train_per_class=n, spurious_correlation=correlation)
    tagged = large.truth("train").presence[:, CONCEPTS.index(SPURIOUS)].double()
    is_class = large.labels("train") == CLASSES.index(SPURIOUS_CLASS)
    assert abs(tagged[is_class].mean().item() - correlation) <= binomial_tolerance(correlation, n)
    elsewhere = tagged[~is_class].mean().item()
    assert abs(elsewhere - SPURIOUS_BASE_RATE) <= binomial_tolerance(SPURIOUS_BASE_RATE, 9 * n)


def test_colour_does_not_tell_the_class() -> None:
    """A linear classifier on mean colours stays near chance (0.1), so shape has to be seen."""
    larger = ConceptsData(batch_size=1, train_per_class=40, test_per_class=20, clutter=0.0)

    def colours(split: Split) -> torch.Tensor:
        features = pixels(larger, split).double().flatten(2)
        return torch.cat([features.mean(2) / 255, features.std(2) / 255, torch.ones(len(features), 1)], dim=1)

    targets = torch.nn.functional.one_hot(larger.labels("train"), 10).double()
    weights = torch.linalg.lstsq(colours("train"), targets).solution
    accuracy = ((colours("test") @ weights).argmax(1) == larger.labels("test")).double().mean()
    assert accuracy < 0.3


# -- the data module


def test_datasets_match_labels_and_the_bound_preprocessing(data: ConceptsData) -> None:
    fresh = ConceptsData(batch_size=16, test_per_class=2)
    with pytest.raises(UserError, match="bind"):
        fresh.dataset("test")
    fresh.bind(Preprocess(48, None))
    dataset = fresh.dataset("test")
    assert [dataset[i][1] for i in range(20)] == fresh.labels("test").tolist() == [*range(10), *range(10)]
    assert dataset[0][0].shape == (3, 48, 48)
    assert dataset[0][0].dtype == torch.float32
    assert torch.equal(dataset[3][0], fresh.dataset("test")[3][0])
    assert not torch.equal(fresh.dataset("test", augment=True)[3][0], dataset[3][0])
    with pytest.raises(UserError, match="the splits are train, select, test"):
        fresh.dataset("val")  # type: ignore[arg-type]


def test_loaders() -> None:
    data = ConceptsData(batch_size=16, train_per_class=4, select_per_class=3, test_per_class=2)
    data.bind(Preprocess(64, None))
    assert [len(y) for _, y in data.train_dataloader()] == [16, 16]  # 40 images: the last 8 are dropped
    assert [len(y) for _, y in data.val_dataloader()] == [16, 14]  # selects
    assert [len(y) for _, y in data.test_dataloader()] == [16, 4]
    tiny = ConceptsData(batch_size=64, train_per_class=1, test_per_class=1)
    tiny.bind(Preprocess(64, None))
    assert [len(y) for _, y in tiny.train_dataloader()] == [10]
    images, labels = next(iter(data.loader("test", indices=[7, 2], batch_size=2)))
    assert labels.tolist() == [7, 2]
    assert torch.equal(images[1], data.dataset("test")[2][0])
    orders = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        orders.append(torch.cat([y for _, y in data.loader("train", shuffle=True)]).tolist())
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(data.labels("train").tolist())


def test_remarks_on_few_images_and_on_enlarged_ones() -> None:
    data = ConceptsData(batch_size=8, train_per_class=49)
    few = [
        "The smallest class has few images (train 49): with fewer than 50, what is trained or chosen on them is "
        "uncertain."
    ]
    assert data.remarks() == few
    data.bind(Preprocess(64, None))
    assert data.remarks() == few
    data.bind(Preprocess(224, 256))
    cut = "to 256 pixels at the shorter side, of which the middle 224 × 224 are kept."
    assert data.remarks() == [*few, f"The images (64 × 64) are enlarged {cut}"]


def test_fingerprint_follows_the_pixels_and_nothing_else() -> None:
    def fingerprint(**changes: Any) -> str:
        return ConceptsData(**{"batch_size": 8, **changes}).fingerprint()

    base = fingerprint()
    assert fingerprint(batch_size=99, num_workers=2) == base
    changed = [
        fingerprint(seed=1), fingerprint(image_size=48), fingerprint(train_per_class=3), fingerprint(test_per_class=3),
        fingerprint(select_per_class=3),
        fingerprint(clutter=0.1), fingerprint(spurious_correlation=0.1),
    ]  # fmt: skip
    assert len({base, *changed}) == 8


def test_other_sizes_show_the_same_scene() -> None:
    small, large = (ConceptsData(batch_size=1, image_size=size, test_per_class=2) for size in (40, 120))
    assert torch.equal(small.truth("test").presence, large.truth("test").presence)
    assert pixels(small).shape[-1] == small.native_size == 40
    for concept in small.truth("test").class_concept:
        image = int(small.truth("test").presence[:, concept].nonzero()[0])
        areas = [d.truth("test").masks([image], concept).float().mean().item() for d in (small, large)]
        assert areas[0] == pytest.approx(areas[1], rel=0.25)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"seed": -1}, "data.seed=-1 must be at least 0"),
        ({"image_size": 16}, "data.image_size=16 must be at least 32 pixels"),
        ({"train_per_class": 0}, "data.train_per_class=0 must be at least 1"),
        ({"select_per_class": 0}, "data.select_per_class=0 must be at least 1"),
        ({"spurious_correlation": 1.5}, "data.spurious_correlation=1.5 must lie between 0 and 1"),
        ({"min_crop_scale": 0}, "data.min_crop_scale=0 must be above 0 and at most 1"),
        ({"defining_rate": 1.5}, "data.defining_rate=1.5 must lie between 0 and 1"),
        ({"clutter": -0.1}, "data.clutter=-0.1 must lie between 0 and 1"),
        ({"shortcut": "anchor"}, "data.shortcut=anchor defines the class harbour; choose .* tower, cloud, flag, tag"),
        ({"shortcut": "Tag"}, "data.shortcut=Tag is no concept of the scenes; choose"),
        ({"batch_size": 0}, "data.batch_size=0 must be at least 1"),
        ({"num_workers": -1}, "data.num_workers=-1 must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ConceptsData(**{"batch_size": 8, **wrong})

"""Two views of each image, against torchvision's functions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torchvision.transforms import functional as F  # noqa: E402

from ticketkit import tasks  # noqa: E402
from ticketkit.pretrain._views import AREA, AT_ONCE, RATIO, TwoViews  # noqa: E402

PLAIN = replace(tasks.get("cifar10"), mean=(0.0,) * 3, std=(1.0,) * 3)  # views come back in [0, 1]
SIDES = ("height", "width", "top", "left")
COLOURS = ("brightness", "contrast", "saturation", "hue")
EXACT = {"rtol": 0.0, "atol": 1e-5}


def pictures(count: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def draw(views: TwoViews, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return views.draw(count, np.random.default_rng(seed))


def only(views: TwoViews, count: int, *kept: str) -> dict[str, np.ndarray]:
    """A draw of which only the parameters named `kept` do anything."""
    drawn = draw(views, count)
    still = {"height": 1, "width": 1, "top": 0, "left": 0, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0, "sigma": 0}
    values = {name: np.full((count, 2), still.get(name, False), drawn[name].dtype) for name in drawn if name not in kept}
    return {**drawn, **values}


def test_a_draw_is_a_function_of_the_generator_and_its_views_differ() -> None:
    views = TwoViews(PLAIN)
    first, again, other = draw(views, 40), draw(views, 40), draw(views, 40, seed=1)
    for name, values in first.items():
        assert values.shape == (40, 2) and values.dtype in (np.float32, np.bool_)
        np.testing.assert_array_equal(values, again[name])
        if name != "sigma":
            assert (values != other[name]).any() and (values[:, 0] != values[:, 1]).any(), name
    one, two = views.render(pictures(40), first)
    assert ((one - two).flatten(1).abs().amax(1) > 0.05).all()


def test_a_draw_stays_in_its_ranges_and_reaches_their_ends() -> None:
    drawn = draw(TwoViews(PLAIN), 4000)
    area, ratio = drawn["height"] * drawn["width"], drawn["width"] / drawn["height"]
    for values, (low, high) in ((area, AREA), (ratio, RATIO), (drawn["hue"], (-0.1, 0.1)), *((drawn[n], (0.6, 1.4)) for n in COLOURS[:3])):
        room = 0.02 * (high - low)
        assert low - 1e-6 <= values.min() < low + room and high - room < values.max() <= high + 1e-6
    assert max(drawn["height"].max(), drawn["width"].max()) <= 1, "no crop sticks out"
    assert drawn["top"].min() >= 0 and drawn["left"].max() < 1
    for name, share in (("flip", 0.5), ("grey", 0.2)):
        assert abs(drawn[name].mean() - share) < 0.03
    untouched = [drawn[name] == (0 if name == "hue" else 1) for name in COLOURS]
    assert abs(untouched[0].mean() - 0.2) < 0.03 and all((u == untouched[0]).all() for u in untouched), "all four or none"


@pytest.mark.parametrize(
    ("name", "size", "flips", "blurs"), [("digits", 16, 0, 0), ("cifar10", 32, 0.5, 0), ("image-folder", 224, 0.5, 0.5)]
)
def test_tasks_that_may_not_be_flipped_and_images_too_small_to_blur(name: str, size: int, flips: float, blurs: float) -> None:
    task = tasks.get(name)
    drawn = draw(TwoViews(task), 2000)
    assert task.size == size and abs(drawn["flip"].mean() - flips) < 0.05 and abs((drawn["sigma"] > 0).mean() - blurs) < 0.05


@pytest.mark.parametrize("size", [32, 64])
def test_views_are_normalised_and_rows_render_alike_alone(size: int) -> None:
    """A rank or a micro-batch renders its own rows of one global draw; sizes around the number rendered at once."""
    task = replace(tasks.get("cifar10"), size=size)
    views, count = TwoViews(task), AT_ONCE // size**2 + 3
    images, drawn = pictures(count, size), draw(TwoViews(task), count)
    whole = views.render(images, drawn)
    for view in whole:
        assert view.shape == (count, 3, size, size) and view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
        bounds = [(torch.tensor(v) - torch.tensor(task.mean)) / torch.tensor(task.std) for v in (0.0, 1.0)]
        assert (view.amin((0, 2, 3)) >= bounds[0] - 1e-5).all() and (view.amax((0, 2, 3)) <= bounds[1] + 1e-5).all()
    for part in (slice(0, 1), slice(5, 9), slice(count - 1, count)):
        alone = views.render(images[part], {name: values[part] for name, values in drawn.items()})
        for one, all_ in zip(alone, whole, strict=True):
            assert torch.equal(one, all_[part])


@pytest.mark.parametrize(("stored", "size"), [(32, 32), (28, 32), (40, 24)])
def test_crops_against_torchvision(stored: int, size: int) -> None:
    views = TwoViews(replace(PLAIN, size=size))
    images, drawn = pictures(30, stored), only(views, 30, *SIDES)
    boxes = set()
    for v, view in enumerate(views.render(images, drawn)):
        for i in range(30):
            height, width = (int(np.rint(drawn[side][i, v] * np.float32(stored))) for side in ("height", "width"))
            top, left = (int(drawn[at][i, v] * (stored - side + 1)) for at, side in (("top", height), ("left", width)))
            boxes.add((top, left, height, width))
            expected = F.resized_crop(tensor(images)[i], top, left, height, width, [size, size], antialias=False)
            torch.testing.assert_close(view[i], expected, **EXACT)
            beside = F.resized_crop(tensor(images)[i], top, left, height - 1, width, [size, size], antialias=False)
            assert (view[i] - beside).abs().max() > 0.01, "a pixel less must show"
    assert len(boxes) > 50


def test_flips_against_torchvision() -> None:
    views = TwoViews(PLAIN)
    drawn = only(views, 20, *SIDES, "flip")
    straight = {**drawn, "flip": np.zeros((20, 2), np.bool_)}
    for v, (view, plain) in enumerate(zip(views.render(pictures(20), drawn), views.render(pictures(20), straight), strict=True)):
        flip = torch.from_numpy(drawn["flip"][:, v])
        assert flip.any() and not flip.all()
        torch.testing.assert_close(view, torch.where(flip[:, None, None, None], F.hflip(plain), plain), **EXACT)
        assert (view[flip] - plain[flip]).abs().max() > 0.1


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("order", [COLOURS, COLOURS[::-1]])
def test_colours_against_torchvision(strength: float, order: tuple[str, ...]) -> None:
    """Brightness, contrast, saturation, hue; in the opposite order they are other colours."""
    views = TwoViews(PLAIN, strength)
    images, drawn = pictures(24), only(TwoViews(PLAIN, strength), 24, *COLOURS)
    apart = 0.0
    for v, view in enumerate(views.render(images, drawn)):
        for i in range(24):
            expected = tensor(images)[i]
            for name in order:
                expected = getattr(F, f"adjust_{name}")(expected, float(drawn[name][i, v]))
            apart = max(apart, float((view[i] - expected).abs().max()))
    assert apart < 1e-5 if order == COLOURS else apart > 0.05


def test_grey_against_torchvision() -> None:
    views = TwoViews(PLAIN)
    drawn = only(views, 40, "grey")
    for v, view in enumerate(views.render(pictures(40), drawn)):
        grey = torch.from_numpy(drawn["grey"][:, v])
        assert grey.any() and not grey.all()
        expected = torch.where(grey[:, None, None, None], F.rgb_to_grayscale(tensor(pictures(40)), 3), tensor(pictures(40)))
        torch.testing.assert_close(view, expected, **EXACT)


def test_blur_against_torchvision() -> None:
    views = TwoViews(replace(PLAIN, size=64))
    images, drawn = pictures(12, 64), only(views, 12, "sigma")
    for v, view in enumerate(views.render(images, drawn)):
        for i, sigma in enumerate(drawn["sigma"][:, v].tolist()):
            sharp = tensor(images)[i]
            torch.testing.assert_close(view[i], F.gaussian_blur(sharp, [7, 7], [sigma, sigma]) if sigma else sharp, **EXACT)
            assert (view[i] - sharp).abs().max() > (0.01 if sigma > 0.3 else -1)
    assert 0 < (drawn["sigma"] > 0).mean() < 1


def test_grey_images_stay_grey() -> None:
    views = TwoViews(tasks.get("digits"))
    images = pictures(50, 16)[..., :1].repeat(3, axis=3)
    for view in views.render(images, draw(views, 50)):
        torch.testing.assert_close(view, view[:, :1].expand(-1, 3, -1, -1), **EXACT)
        assert view.std() > 0.3 and not view.isnan().any()

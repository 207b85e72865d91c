"""Tasks on small sets of the official on-disk layouts that the tests make, bad data, augmentation, and one real anchor."""

from __future__ import annotations

import gzip
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from PIL import Image  # noqa: E402
from scipy.io import loadmat, savemat  # noqa: E402
from torchvision.datasets import CIFAR10, CIFAR100, SVHN  # noqa: E402

from ticketkit import models, tasks  # noqa: E402
from ticketkit.errors import DataError  # noqa: E402
from ticketkit.pretrain.supervised import Supervised  # noqa: E402
from ticketkit.tasks import Augmentation, Batches, Crops, Recipe, Split, Task, evaluation_batches, visda  # noqa: E402
from ticketkit.tasks._data import split, to_input  # noqa: E402

PIXELS = np.random.default_rng(0)


def make_cifar(folder: Path, files: list[str], label_key: str, classes: int, meta: tuple[str, str]) -> None:
    folder.mkdir()
    for name in files:
        batch = {"data": PIXELS.integers(0, 256, (20, 3072), dtype=np.uint8), label_key: [i % classes for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch, 2))
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: [f"class{i}" for i in range(classes)]}, 2))


def make_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    make_cifar(root / "cifar-10-batches-py", files, "labels", 10, ("batches.meta", "label_names"))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # the MD5 of the real files
    monkeypatch.setitem(CIFAR10.meta, "md5", None)


def make_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar(root / "cifar-100-python", ["train", "test"], "fine_labels", 100, ("meta", "fine_label_names"))
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setitem(CIFAR100.meta, "md5", None)


def make_fashion(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for kind in ("train", "t10k"):
        images = PIXELS.integers(0, 256, (20, 28, 28), dtype=np.uint8)
        (folder / f"{kind}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, *images.shape) + images.tobytes())
        (folder / f"{kind}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 20) + bytes(i % 10 for i in range(20)))


def make_folders(root: Path, parts: tuple[str, ...], classes: tuple[str, ...]) -> None:
    for part, name in ((part, name) for part in parts for name in classes):
        (root / part / name).mkdir(parents=True)
        for i, size in enumerate(((40, 30), (30, 50), (300, 280))):
            Image.fromarray(PIXELS.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / part / name / f"{i}.png")


def make_images(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folders(root, ("train", "test"), ("ants", "bees"))


def make_visda(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folders(root, ("train", "validation"), visda.CLASSES)
    for part in ("train", "validation"):
        (root / part / "image_list.txt").write_text("aeroplane/0.png 0\n")  # beside the folders in the archives


def make_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MATLAB files: X uint8 [32, 32, 3, N], y uint8 [N, 1] with 10 for the digit 0."""
    for part in ("train", "test"):
        labels = np.arange(20, dtype=np.uint8)[:, None] % 10 + 1
        savemat(root / f"{part}_32x32.mat", {"X": PIXELS.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8), "y": labels})
    monkeypatch.setattr(SVHN, "_check_integrity", lambda self: True)


MAKE: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "cifar10": make_cifar10,
    "cifar100": make_cifar100,
    "digits": lambda root, monkeypatch: None,
    "fashion-mnist": make_fashion,
    "image-folder": make_images,
    "svhn": make_svhn,
    "visda": make_visda,
}


def npz_arrays(count: int = 20) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {"classes": np.array([f"class{i}" for i in range(100)])}
    for part in ("train", "test"):
        arrays[f"x_{part}"] = PIXELS.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(count) % 100
    return arrays


@pytest.mark.parametrize("name", tasks.names())
def test_every_task_loads_and_trains_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new task file is tested by being there; one that needs data needs a MAKE entry above."""
    task = tasks.get(name)
    MAKE[name](tmp_path, monkeypatch)
    data = task.load(tmp_path)
    assert task.name == name and task.model in models.names() and task.recipe.epochs > 0
    whole = len(data.train) + len(data.val)
    assert len(data.val) == max(1, round(whole / 10)) and len(data.test) > 0
    batches, objective = Batches(data.train, Crops(task), batch_size=4), Supervised()
    torch.manual_seed(0)
    module = models.build("resnet20", len(data.classes))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for _, ((images,), labels) in zip(range(2), batches.epoch(0, 0, 0), strict=False):
        assert images.shape == (4, 3, task.size, task.size) and images.dtype == torch.float32 and labels.dtype == torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last)
        loss, right = objective.loss(module, objective.begin(module), (images,), labels)
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss) and 0 <= right <= 4
    score, loss_value = objective.evaluate(module, task, data.val, len(data.classes))
    assert 0.0 <= score <= 1.0 and 0.0 <= loss_value < float("inf") and module.training


@pytest.mark.parametrize("name", [name for name in tasks.names() if name != "digits"])
@pytest.mark.parametrize("given", [None, "missing", "empty"])
def test_missing_data_says_what_was_expected_where(name: str, given: str | None, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = None if given is None else tmp_path / given
    with pytest.raises(DataError, match=str(folder) if folder else "--data DIR") as caught:
        tasks.get(name).load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 40


def test_unknown_task_is_refused() -> None:
    with pytest.raises(DataError, match="expected one of cifar10"):
        tasks.get("cifar11")


@pytest.mark.parametrize("victim", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize("keep", [0, 10, 100])
def test_truncated_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str, keep: int) -> None:
    make_fashion(tmp_path, monkeypatch)
    path = tmp_path / "FashionMNIST" / "raw" / victim
    path.write_bytes(path.read_bytes()[: min(keep, 15)])
    with pytest.raises(DataError, match="expected FashionMNIST/raw") as caught:
        tasks.get("fashion-mnist").load(tmp_path)
    assert "\n" not in str(caught.value)


def test_gzipped_files_are_not_the_expected_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fashion(tmp_path, monkeypatch)
    for path in list((tmp_path / "FashionMNIST" / "raw").iterdir()):
        path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    with pytest.raises(DataError, match="unpacked"):
        tasks.get("fashion-mnist").load(tmp_path)


def test_altered_cifar10_is_refused_before_it_is_unpickled(tmp_path: Path) -> None:
    make_cifar(tmp_path / "cifar-10-batches-py", ["data_batch_1", "test_batch"], "labels", 10, ("batches.meta", "label_names"))
    with pytest.raises(DataError, match="unaltered"):
        tasks.get("cifar10").load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"x_train": np.zeros((20, 32, 32, 3), np.float32)},
        {"x_train": np.zeros((20, 32, 32), np.uint8)},
        {"y_train": np.arange(19)},
        {"y_test": np.full(20, 100)},
        {"y_test": np.full(20, -1)},
        {"classes": None},
    ],
)
def test_unusable_cifar100_arrays(tmp_path: Path, change: dict[str, np.ndarray | None]) -> None:
    arrays = {name: array for name, array in {**npz_arrays(), **change}.items() if array is not None}
    np.savez(tmp_path / "cifar100.npz", **arrays)
    with pytest.raises(DataError, match="expected") as caught:
        tasks.get("cifar100").load(tmp_path)
    assert "\n" not in str(caught.value)


def test_cifar100_archive_whole_truncated_and_altered(tmp_path: Path) -> None:
    path = tmp_path / "cifar100.npz"
    arrays = npz_arrays()
    np.savez_compressed(path, **arrays)
    data = tasks.get("cifar100").load(tmp_path)
    np.testing.assert_array_equal(data.test.images, arrays["x_test"])
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cifar100\.npz"):
        tasks.get("cifar100").load(tmp_path)
    whole[len(whole) // 3] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"cifar100\.npz"):
        tasks.get("cifar100").load(tmp_path)


def test_unusable_image_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path, monkeypatch)
    load = tasks.get("image-folder").load
    whole = load(tmp_path)
    assert whole.classes == ("ants", "bees") and whole.train.images.shape == (5, 256, 256, 3) and len(whole.test) == 6
    (tmp_path / "test").rename(tmp_path / "val")
    assert load(tmp_path).sha256 == whole.sha256, "val/ stands in for test/"
    picture = tmp_path / "train" / "ants" / "0.png"
    before = picture.read_bytes()
    for content, words in ((before[: len(before) // 2], "not a whole image"), (b"no image", "not a whole image")):
        picture.write_bytes(content)
        with pytest.raises(DataError, match=words):
            load(tmp_path)
    picture.write_bytes(before)
    (tmp_path / "val" / "wasps").mkdir()
    with pytest.raises(DataError, match="class folders"):
        load(tmp_path)
    (tmp_path / "val" / "wasps").rmdir()
    for name in ("ants", "bees"):
        shutil.rmtree(tmp_path / "train" / name)
        (tmp_path / "train" / name).mkdir()
    with pytest.raises(DataError, match="no image"):
        load(tmp_path)


def test_svhn_digits_and_pixels_are_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_svhn(tmp_path, monkeypatch)
    data, stored = tasks.get("svhn").load(tmp_path), loadmat(tmp_path / "test_32x32.mat")
    assert data.test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2 and data.classes[0] == "0", "10 is the digit 0"
    np.testing.assert_array_equal(data.test.images[7], stored["X"][..., 7])
    assert not tasks.get("svhn").augmentation.flip, "a mirrored digit is another sign"


@pytest.mark.parametrize("keep", [None, 0, 300, -1])
def test_missing_truncated_and_altered_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int | None) -> None:
    """Refused by the MD5 of the official files, before they are parsed."""
    make_svhn(tmp_path, monkeypatch)
    load = tasks.get("svhn").load
    assert len(load(tmp_path).test) == 20, "whole but for its MD5"
    monkeypatch.undo()
    path = tmp_path / "test_32x32.mat"
    path.unlink() if keep is None else path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"expected train_32x32\.mat and test_32x32\.mat .* complete and unaltered") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_visda_has_its_twelve_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_visda(tmp_path, monkeypatch)
    data = tasks.get("visda").load(tmp_path)
    assert data.classes == visda.CLASSES and len(data.classes) == 12 and len(data.train) + len(data.val) == len(data.test) == 36
    picture = tmp_path / "validation" / "truck" / "0.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"truck/0\.png: not a whole image"):
        tasks.get("visda").load(tmp_path)
    for part in ("validation", "train"):
        shutil.rmtree(tmp_path / part / "truck")
        with pytest.raises(DataError, match=f"{part}: expected the class folders aeroplane, .*, got aeroplane, .* train$"):
            tasks.get("visda").load(tmp_path)


def counting_task(stored: int, size: int, **augmentation: object) -> tuple[Task, Split]:
    """Images whose pixels tell image, row and column, so that a crop can be read back."""
    index, row, column = np.meshgrid(np.arange(24), np.arange(stored), np.arange(stored), indexing="ij")
    images = np.stack([index + 1, row + 1, column + 1], axis=-1).astype(np.uint8)
    task = Task(
        "toy", lambda folder: None, size, (0.0,) * 3, (1 / 255,) * 3, "resnet20", Recipe(1, 4, 0.1, "constant", 0.0),  # type: ignore[arg-type, return-value]
        Augmentation(**augmentation),  # type: ignore[arg-type]
    )
    return task, Split(images, np.arange(24) % 10)


def epoch(task: Task, data: Split, *key: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*Batches(data, Crops(task), 5).epoch(*key), strict=True)
    return torch.cat([image for image, in images]).round().numpy().astype(int), torch.cat(labels).numpy()


def test_each_image_is_seen_at_most_once_an_epoch_with_its_label() -> None:
    task, data = counting_task(8, 8)
    images, labels = epoch(task, data, 0, 0, 0)
    index = images[:, 0, 0, 0] - 1
    assert len(set(index)) == len(index) == 20, "24 images, batches of 5, the incomplete one left out"
    np.testing.assert_array_equal(labels, index % 10)
    assert (index != np.arange(20)).any()


def test_batches_are_a_function_of_seed_round_and_epoch() -> None:
    task, data = counting_task(8, 8, pad=2, flip=True)
    first, again = epoch(task, data, 0, 1, 2), epoch(task, data, 0, 1, 2)
    np.testing.assert_array_equal(first[0], again[0])
    for other in ((1, 1, 2), (0, 0, 2), (0, 1, 3)):
        assert (epoch(task, data, *other)[0] != first[0]).any()
    tail = torch.cat([images for (images,), _ in Batches(data, Crops(task), 5).epoch(0, 1, 2, first=3)])
    np.testing.assert_array_equal(tail.round().numpy(), first[0][15:])


@pytest.mark.parametrize(("stored", "size", "pad"), [(8, 8, 2), (12, 8, 0), (10, 8, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_windows_of_the_padded_image(stored: int, size: int, pad: int, flip: bool) -> None:
    task, data = counting_task(stored, size, pad=pad, flip=flip)
    images, _ = epoch(task, data, 0, 0, 0)
    offsets, mirrored = set(), 0
    for image in images:
        original = np.pad(data.images[image[0].max() - 1].transpose(2, 0, 1), ((0, 0), (pad, pad), (pad, pad)))
        windows = {
            (top, left, turn): original[:, top : top + size, left : left + size][:, :, :: -1 if turn else 1]
            for top in range(stored + 2 * pad - size + 1)
            for left in range(stored + 2 * pad - size + 1)
            for turn in (False, True)
        }
        (found,) = (key for key, window in windows.items() if (window == image).all())
        offsets.add(found[:2])
        mirrored += found[2]
    assert len(offsets) > 3
    assert 0 < mirrored < len(images) if flip else mirrored == 0


def test_padding_is_the_mean_colour_and_evaluation_takes_the_centre() -> None:
    task, data = counting_task(12, 8)
    (images, labels), = evaluation_batches(task, data)
    np.testing.assert_array_equal(images.round().numpy(), data.images[:, 2:10, 2:10].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(labels, data.labels)
    grey = Crops(tasks.get("cifar10"))
    corner = {"top": np.zeros(1), "left": np.zeros(1), "flip": np.zeros(1, np.bool_)}
    (crop,) = grey.render(np.zeros((1, 32, 32, 3), np.uint8), corner)
    mean = torch.tensor([0.485, 0.456, 0.406])
    pixels = (crop * torch.tensor([0.229, 0.224, 0.225])[:, None, None] + mean[:, None, None])[0].mul(255).round()
    assert pixels[:, 0, 0].tolist() == [124, 116, 104] and pixels[:, 4, 4].tolist() == [0, 0, 0]


def test_normalisation_against_torchvision() -> None:
    from torchvision.transforms import functional as F

    task = tasks.get("cifar10")
    image = PIXELS.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    expected = F.normalize(F.to_tensor(image[0]), list(task.mean), list(task.std))
    torch.testing.assert_close(to_input(image, task)[0], expected)


def test_held_out_images_are_the_same_for_every_seed_and_not_trained_on() -> None:
    images = np.arange(100, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    labels, test = np.arange(100) % 2, Split(images[:2], np.array([0, 1]))
    first, second = (split(images, labels, test, ("a", "b")) for _ in range(2))
    assert first.sha256 == second.sha256
    train, val = ({int(image.flat[0]) for image in part.images} for part in (first.train, first.val))
    assert len(val) == 10 and train | val == set(range(100)) and not train & val


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_real_data_loads(name: str, data_dir: Path) -> None:
    task = tasks.get(name)
    data = task.load(data_dir)
    assert len(data.test) == 10_000 and len(data.classes) == (100 if name == "cifar100" else 10)
    assert data.train.images.shape[1:] == (task.size, task.size, 3)


def test_published_resnet20_reproduces_its_cifar10_accuracy(data_dir: Path) -> None:
    """91.73 % top-1 on the 10,000 test images, within 0.1 point; with the wrong normalisation it is not."""
    task = tasks.get("cifar10")
    data = task.load(data_dir)
    module = models.build("resnet20", 10)
    models.load_weights("resnet20", module, str(data_dir / "weights" / "akamaster" / "resnet20-12fca82f.th"))
    module.to(memory_format=torch.channels_last)
    score, _ = Supervised().evaluate(module, task, data.test, 10)
    assert score == pytest.approx(0.9173, abs=0.001)
    few = Split(data.test.images[:1000, :, :, ::-1], data.test.labels[:1000])
    wrong, _ = Supervised().evaluate(module, task, few, 10)
    assert wrong < 0.9, "blue and red exchanged must show"

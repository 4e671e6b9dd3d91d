"""Which images are held out, and what happens to the pixels of the others: cuts of changing size, RandAugment."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from icdctl.data import Augmentation, ImageStore, Preprocessing, Views
from icdctl.data.split import stratified

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CUTS = Augmentation(crop_scale=(0.35, 1.0), flip=True)
FIELDS = ("index", "top", "left", "flip")


# --- held out ---------------------------------------------------------------------------------------------------------


def held_labels(labels: list[int], share: float) -> list[int]:
    """How many of each class are held out."""
    held = stratified(torch.tensor(labels), share, seed=0)[1]
    return torch.bincount(torch.tensor(labels)[held], minlength=max(labels) + 1).tolist()


@pytest.mark.parametrize(
    ("sizes", "share", "expected"),
    [
        ([10, 20, 5], 0.2, [2, 4, 1]),
        ([10, 10], 0.01, [1, 1]),  # at least one
        ([3, 4], 0.99, [2, 3]),  # never all
        ([1, 2, 1], 0.5, [0, 1, 0]),  # a single image stays
        ([7, 13], 0.1, [1, 1]),
        ([15, 25], 0.1, [2, 2]),  # halves go to the even number
    ],
)
def test_each_class_gives_its_share_in_whole_images(sizes: list[int], share: float, expected: list[int]) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    assert held_labels(labels, share) == expected
    assert held_labels(labels[::-1], share) == expected


def test_rows_that_stay_and_rows_that_go_are_ascending_and_all_there_are() -> None:
    labels = torch.arange(200) % 7
    kept, held = stratified(labels, 0.3, seed=4)
    for rows in (kept, held):
        assert rows.dtype == torch.int64
        assert torch.equal(rows, rows.sort().values)
    assert torch.equal(torch.cat((kept, held)).sort().values, torch.arange(200))


def test_nothing_is_held_out_of_nothing() -> None:
    kept, held = stratified(torch.empty(0, dtype=torch.int64), 0.5, seed=0)
    assert (kept.shape, held.shape) == ((0,), (0,))


def test_the_choice_is_a_function_of_seed_and_names() -> None:
    labels = torch.arange(100) % 5
    names = [f"class{index % 5}/image{index}.png" for index in range(100)]

    def chosen(seed: int, order: list[int]) -> set[str]:
        ordered = [names[index] for index in order]
        return {ordered[row] for row in stratified(labels[order], 0.2, seed=seed, names=ordered)[1].tolist()}

    torch.manual_seed(torch.seed() % 1000)  # whatever the global state is
    usual = list(range(100))
    assert chosen(0, usual) == chosen(0, usual)
    assert chosen(0, usual) == chosen(0, usual[::-1])  # places in the list don't matter
    assert chosen(0, usual) != chosen(1, usual)
    renamed = [f"other{index}.png" for index in range(100)]
    assert stratified(labels, 0.2, seed=0, names=renamed)[1].tolist() != sorted(
        stratified(labels, 0.2, seed=0, names=names)[1].tolist()
    )


def test_the_choice_never_changes() -> None:
    """A split by another version of icdctl would move test images into training."""
    held = stratified(torch.zeros(20, dtype=torch.int64), 0.25, seed=0)[1]
    assert held.tolist() == [0, 6, 8, 16, 19]


def test_images_that_are_added_later_leave_nearly_all_others_where_they_are() -> None:
    names = [f"{index}.png" for index in range(1000)]

    def held(count: int) -> set[str]:
        rows = stratified(torch.zeros(count, dtype=torch.int64), 0.2, seed=0, names=names[:count])[1]
        return {names[row] for row in rows.tolist()}

    before, after = held(900), held(1000)
    moved = (before ^ after) & set(names[:900])
    assert len(moved) <= 30  # of 900; a new draw would move about 290


def test_over_many_classes_the_share_is_the_one_that_was_asked_for() -> None:
    labels = torch.arange(20_000) % 400
    assert len(stratified(labels, 0.1, seed=0)[1]) == 2000


def test_names_need_not_be_utf8() -> None:
    names = ["a\udcff.png", "b.png", "c\udc80.png"]
    assert len(stratified(torch.zeros(3, dtype=torch.int64), 0.4, seed=0, names=names)[1]) == 1


# --- views ------------------------------------------------------------------------------------------------------------


def smooth(count: int, height: int, width: int) -> Tensor:
    """[N, H, W, 3] uint8, without sharp edges, so that ways to interpolate hardly differ."""
    coarse = torch.rand((count, 3, 4, 5), generator=torch.Generator().manual_seed(0)) * 255
    fine = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True).clamp(0, 255)
    return fine.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def noise(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def store(images: Tensor, augmentation: Augmentation, size: tuple[int, int] = (32, 32)) -> ImageStore:
    return ImageStore(images, Preprocessing(size, MEAN, STD), augmentation, device=CPU)


def cut_at(top: int, left: int, height: int, width: int, *, flip: bool) -> Views:
    """One view of one image."""
    of_one = (torch.tensor([0]), torch.tensor([top]), torch.tensor([left]), torch.tensor([flip]))
    return Views(*of_one, box=torch.tensor([[height, width]]))


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (225, 225)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_cut_of_the_whole_image_is_the_image(size: tuple[int, int], flip: bool) -> None:
    images = noise(1, *size)
    found = store(images, CUTS, size).pixels(cut_at(0, 0, *size, flip=flip))
    assert torch.equal(found, images.flip(2) if flip else images)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [(3, 5, 30, 30), (0, 0, 36, 36), (10, 2, 22, 31), (6, 0, 30, 19), (1, 1, 32, 32)])
@pytest.mark.parametrize("antialias", [False, True])
def test_a_cut_is_torchvisions_resized_crop(box: tuple[int, int, int, int], flip: bool, antialias: bool) -> None:
    """Within a few grey levels: torchvision repeats the cut's edge where we read on beside it."""
    images = smooth(1, 36, 36)
    top, left, height, width = box
    chw = images.permute(0, 3, 1, 2)
    expected = functional.resized_crop(chw, top, left, height, width, [32, 32], antialias=antialias)
    expected = functional.hflip(expected) if flip else expected
    found = store(images, CUTS).pixels(cut_at(top, left, height, width, flip=flip)).permute(0, 3, 1, 2)
    difference = (found.int() - expected.int()).abs()
    assert difference[:, :, 1:-1, 1:-1].max() <= (4 if antialias else 1)
    assert difference.max() <= 8


def test_cuts_have_the_areas_and_ratios_that_were_asked_for_and_lie_inside() -> None:
    augmentation = Augmentation(crop_scale=(0.1, 0.5), crop_ratio=(0.5, 2.0))
    views = store(noise(5000, 18, 18), augmentation, (16, 16)).epoch(seed=0, epoch=1)
    assert views.box is not None
    height, width = views.box.unbind(1)
    for start, length in ((views.top, height), (views.left, width)):
        assert start.min() == 0
        assert (start + length).max() == 18
    # Rounding moves each side by half a pixel at most.
    least, most = (height - 0.5) * (width - 0.5) / 324, (height + 0.5) * (width + 0.5) / 324
    assert ((most >= 0.1) & (least <= 0.5)).all()
    assert (((width + 0.5) / (height - 0.5) >= 0.5) & ((width - 0.5) / (height + 0.5) <= 2.0)).all()
    assert abs((height * width).double().mean().item() / 324 - 0.3) < 0.01  # uniform in area
    assert abs((width / height).log().mean().item()) < 0.02  # as often wide as high
    assert len(Counter(zip(height.tolist(), width.tolist(), strict=True))) > 50


def test_where_no_cut_fits_the_whole_image_is_taken() -> None:
    augmentation = Augmentation(crop_scale=(1.0, 1.0), crop_ratio=(4.0, 4.0))
    views = store(noise(20, 16, 16), augmentation, (16, 16)).epoch(seed=0, epoch=1)
    assert views.box is not None
    assert views.box.tolist() == [[16, 16]] * 20
    assert not views.top.any()
    assert not views.left.any()


def test_the_ranges_of_area_and_ratio_may_be_single_numbers() -> None:
    views = store(noise(50, 40, 40), Augmentation(crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0))).epoch(
        seed=0, epoch=1
    )
    assert views.box is not None
    assert views.box.tolist() == [[20, 20]] * 50


EVERYTHING = Augmentation(crop_scale=(0.35, 1.0), flip=True, randaugment_ops=2, randaugment_magnitude=9)


@pytest.mark.parametrize("augmentation", [CUTS, EVERYTHING, Augmentation(randaugment_ops=3, crop_padding=2)])
def test_pixels_are_functions_of_seed_and_epoch_whatever_the_batch(augmentation: Augmentation) -> None:
    images = noise(24, 36, 36)
    first = store(images, augmentation)
    views = first.epoch(seed=1, epoch=3)
    whole = first.pixels(views)
    torch.manual_seed(torch.seed() % 1000)  # whatever the global state is
    again = store(images, augmentation)
    same = again.epoch(seed=1, epoch=3)
    for size in (1, 7, 24):
        parts = [again.pixels(same[start : start + size]) for start in range(0, 24, size)]
        assert torch.equal(torch.cat(parts), whole)
    for seed, epoch in ((2, 3), (1, 4)):
        assert not torch.equal(again.pixels(again.epoch(seed=seed, epoch=epoch)), whole)


def test_random_changes_leave_the_global_random_state_alone() -> None:
    held = store(noise(4, 32, 32), EVERYTHING)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    held.pixels(held.epoch(seed=0, epoch=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_random_changes_change_most_views_and_differ_between_them() -> None:
    images = smooth(1, 32, 32).expand(40, -1, -1, -1).contiguous()
    held = store(images, Augmentation(randaugment_ops=2, randaugment_magnitude=15))
    found = held.pixels(held.epoch(seed=0, epoch=1))
    changed = (found != images).flatten(1).any(dim=1)
    assert changed.double().mean() > 0.8
    assert len({bytes(image.numpy()) for image in found}) > 25
    assert found.dtype == torch.uint8


@pytest.mark.parametrize("augmentation", [CUTS, EVERYTHING, Augmentation(flip=True, randaugment_ops=1)])
def test_order_and_flips_stay_as_they_are_when_augmentation_is_switched_on(augmentation: Augmentation) -> None:
    images = noise(300, 36, 36)
    plain = store(images, Augmentation(flip=True)).epoch(seed=5, epoch=2)
    found = store(images, augmentation).epoch(seed=5, epoch=2)
    assert torch.equal(found.index, plain.index)
    assert torch.equal(found.flip, plain.flip)


def test_a_slice_of_views_takes_all_they_have() -> None:
    views = store(noise(10, 36, 36), EVERYTHING).epoch(seed=0, epoch=1)
    assert views.box is not None
    assert views.key is not None
    part = views[3:8].to(CPU)
    assert len(part) == 5
    assert part.box is not None
    assert part.key is not None
    assert torch.equal(part.box, views.box[3:8])
    assert torch.equal(part.key, views.key[3:8])
    assert all(torch.equal(getattr(part, name), getattr(views, name)[3:8]) for name in FIELDS)


def test_crops_of_224_out_of_256_are_bit_identical_to_torchvisions() -> None:
    images = noise(6, 256, 256)
    held = store(images, Augmentation(flip=True), (224, 224))
    views = held.epoch(seed=0, epoch=1)
    assert views.box is None
    assert views.flip.any()
    found = held.inputs(views)
    convert = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    for place in range(6):
        picture = Image.fromarray(images[views.index[place]].numpy())
        cropped = functional.crop(picture, int(views.top[place]), int(views.left[place]), 224, 224)
        assert torch.equal(found[place], convert(functional.hflip(cropped) if views.flip[place] else cropped))


def test_crops_out_of_a_larger_image_reach_every_place() -> None:
    views = store(noise(4000, 12, 10), Augmentation(), (8, 8)).epoch(seed=0, epoch=1)
    assert torch.bincount(views.top).shape == (5,)
    assert torch.bincount(views.left).shape == (3,)
    assert (torch.bincount(views.top) > 600).all()


def test_images_smaller_than_the_input_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images are \[31, 32\], the input is \[32, 32\]"):
        store(noise(1, 31, 32), Augmentation())


@pytest.mark.parametrize(
    ("augmentation", "expected"),
    [
        (Augmentation(), 25),
        (Augmentation(flip=True), 50),
        (Augmentation(crop_padding=1), 49),
        (CUTS, None),
        (Augmentation(randaugment_ops=1), None),
    ],
)
def test_how_many_views_an_image_has(augmentation: Augmentation, expected: int | None) -> None:
    assert store(noise(1, 36, 36), augmentation).num_views == expected


def test_ratios_are_drawn_by_their_logarithm() -> None:
    views = store(noise(4000, 64, 64), Augmentation(crop_scale=(0.3, 0.3), crop_ratio=(0.5, 2.0))).epoch(
        seed=0, epoch=1
    )
    assert views.box is not None
    logs = (views.box[:, 1] / views.box[:, 0]).double().log() / math.log(2)  # uniform in -1 to 1
    counts = torch.histc(logs, bins=4, min=-1.0, max=1.0)
    assert (counts > 800).all()

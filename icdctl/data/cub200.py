"""CUB-200-2011: photographs of 200 species of birds, read by its own lists from the archive's unpacked folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from icdctl import files
from icdctl.data import release
from icdctl.data.archive import Limits
from icdctl.data.assemble import fingerprint_of, of_halves
from icdctl.data.dataset import Dataset, DatasetInfo, OnImages, Preprocessing, Request
from icdctl.data.download import RemoteFile
from icdctl.data.image_cache import decode_files
from icdctl.data.release import Release
from icdctl.errors import ArtifactError

FOLDER = "CUB_200_2011"
NUM_TRAIN, NUM_TEST = 5_994, 5_794
RESIZED, SIDE = 256, 224
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
SOURCE = "Wah et al. 2011, Caltech-UCSD Birds-200-2011, https://data.caltech.edu/records/65de6-vp158"
LICENCE = "none stated; images for non-commercial research and education"
_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
RELEASE = Release(
    archive=RemoteFile(
        name="CUB_200_2011.tgz",
        urls=(
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
            "https://data.caltech.edu/api/records/65de6-vp158/files/CUB_200_2011.tgz/content",
        ),
        num_bytes=1_150_585_339,
        sha256="0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
        md5="97eceeb196236b17998738112f37df78",
    ),
    folder=FOLDER,
    member_md5={
        "images/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg": "4c84da568f89519f84640c54b7fba7c2",
        "images/002.Laysan_Albatross/Laysan_Albatross_0001_545.jpg": "e7db63424d0e384dba02aacaf298cdc0",
        "images/198.Rock_Wren/Rock_Wren_0001_189289.jpg": "487d082f1fbd58faa7b08aa5ede3cc00",
        "images/200.Common_Yellowthroat/Common_Yellowthroat_0003_190521.jpg": "96fd60ce4b4805e64368efc32bf5c6fe",
    },
    also_needed=_LISTS,
    beside=("attributes.txt",),
    limits=Limits(members=50_000, unpacked_bytes=3_000_000_000),
)
_CLASS_NAMES = """
Black_footed_Albatross Laysan_Albatross Sooty_Albatross Groove_billed_Ani Crested_Auklet Least_Auklet Parakeet_Auklet
Rhinoceros_Auklet Brewer_Blackbird Red_winged_Blackbird Rusty_Blackbird Yellow_headed_Blackbird Bobolink
Indigo_Bunting Lazuli_Bunting Painted_Bunting Cardinal Spotted_Catbird Gray_Catbird Yellow_breasted_Chat
Eastern_Towhee Chuck_will_Widow Brandt_Cormorant Red_faced_Cormorant Pelagic_Cormorant Bronzed_Cowbird Shiny_Cowbird
Brown_Creeper American_Crow Fish_Crow Black_billed_Cuckoo Mangrove_Cuckoo Yellow_billed_Cuckoo Gray_crowned_Rosy_Finch
Purple_Finch Northern_Flicker Acadian_Flycatcher Great_Crested_Flycatcher Least_Flycatcher Olive_sided_Flycatcher
Scissor_tailed_Flycatcher Vermilion_Flycatcher Yellow_bellied_Flycatcher Frigatebird Northern_Fulmar Gadwall
American_Goldfinch European_Goldfinch Boat_tailed_Grackle Eared_Grebe Horned_Grebe Pied_billed_Grebe Western_Grebe
Blue_Grosbeak Evening_Grosbeak Pine_Grosbeak Rose_breasted_Grosbeak Pigeon_Guillemot California_Gull
Glaucous_winged_Gull Heermann_Gull Herring_Gull Ivory_Gull Ring_billed_Gull Slaty_backed_Gull Western_Gull
Anna_Hummingbird Ruby_throated_Hummingbird Rufous_Hummingbird Green_Violetear Long_tailed_Jaeger Pomarine_Jaeger
Blue_Jay Florida_Jay Green_Jay Dark_eyed_Junco Tropical_Kingbird Gray_Kingbird Belted_Kingfisher Green_Kingfisher
Pied_Kingfisher Ringed_Kingfisher White_breasted_Kingfisher Red_legged_Kittiwake Horned_Lark Pacific_Loon Mallard
Western_Meadowlark Hooded_Merganser Red_breasted_Merganser Mockingbird Nighthawk Clark_Nutcracker
White_breasted_Nuthatch Baltimore_Oriole Hooded_Oriole Orchard_Oriole Scott_Oriole Ovenbird Brown_Pelican
White_Pelican Western_Wood_Pewee Sayornis American_Pipit Whip_poor_Will Horned_Puffin Common_Raven White_necked_Raven
American_Redstart Geococcyx Loggerhead_Shrike Great_Grey_Shrike Baird_Sparrow Black_throated_Sparrow Brewer_Sparrow
Chipping_Sparrow Clay_colored_Sparrow House_Sparrow Field_Sparrow Fox_Sparrow Grasshopper_Sparrow Harris_Sparrow
Henslow_Sparrow Le_Conte_Sparrow Lincoln_Sparrow Nelson_Sharp_tailed_Sparrow Savannah_Sparrow Seaside_Sparrow
Song_Sparrow Tree_Sparrow Vesper_Sparrow White_crowned_Sparrow White_throated_Sparrow Cape_Glossy_Starling
Bank_Swallow Barn_Swallow Cliff_Swallow Tree_Swallow Scarlet_Tanager Summer_Tanager Artic_Tern Black_Tern Caspian_Tern
Common_Tern Elegant_Tern Forsters_Tern Least_Tern Green_tailed_Towhee Brown_Thrasher Sage_Thrasher Black_capped_Vireo
Blue_headed_Vireo Philadelphia_Vireo Red_eyed_Vireo Warbling_Vireo White_eyed_Vireo Yellow_throated_Vireo
Bay_breasted_Warbler Black_and_white_Warbler Black_throated_Blue_Warbler Blue_winged_Warbler Canada_Warbler
Cape_May_Warbler Cerulean_Warbler Chestnut_sided_Warbler Golden_winged_Warbler Hooded_Warbler Kentucky_Warbler
Magnolia_Warbler Mourning_Warbler Myrtle_Warbler Nashville_Warbler Orange_crowned_Warbler Palm_Warbler Pine_Warbler
Prairie_Warbler Prothonotary_Warbler Swainson_Warbler Tennessee_Warbler Wilson_Warbler Worm_eating_Warbler
Yellow_Warbler Northern_Waterthrush Louisiana_Waterthrush Bohemian_Waxwing Cedar_Waxwing
American_Three_toed_Woodpecker Pileated_Woodpecker Red_bellied_Woodpecker Red_cockaded_Woodpecker
Red_headed_Woodpecker Downy_Woodpecker Bewick_Wren Cactus_Wren Carolina_Wren House_Wren Marsh_Wren Rock_Wren
Winter_Wren Common_Yellowthroat
"""
CLASS_NAMES = tuple(_CLASS_NAMES.split())
"""Class names in the order of the labels, in the publisher's spelling, without the number in front."""
DESCRIPTION = DatasetInfo(
    "cub200", CLASS_NAMES, Preprocessing((SIDE, SIDE), MEAN, STD, (RESIZED, RESIZED)), SOURCE, LICENCE
)


@dataclass(frozen=True)
class ListedImages:
    """The training or the test images, as the data set's own lists name them."""

    names: tuple[str, ...]
    """N paths below `images/`, in the order of the list."""
    labels: Tensor
    """[N] int64."""


def load(wanted: Request, on_images: OnImages) -> Dataset:
    """Read the unpacked archive, decoded once: training images whole, for crops; test images cropped to their centre.

    Raises:
        ArtifactError: a file is missing or broken.
    """
    train, test = read_lists(wanted.folder)
    place = wanted.folder / FOLDER
    content = None  # the archive's hash, where the files are the published ones
    if (len(train.names), len(test.names)) == (NUM_TRAIN, NUM_TEST):
        is_right = release.look(RELEASE, wanted.folder)[0] == "right"
        content = RELEASE.archive.sha256 if is_right else None
    published = content is not None
    caveat = None if published else f"`{place}` is not the published CUB-200-2011: results can't be compared"
    decoded = [
        decode_files(
            place / "images",
            listed.names,
            resize=(RESIZED, RESIZED),
            crop=crop,
            content_key=content,
            label=label,
            skip_broken=False,
            remedy=how_to_fix(wanted.folder),
            on_images=on_images,
        )
        for listed, crop, label in ((train, None, "cub200-train"), (test, (SIDE, SIDE), "cub200-test"))
    ]
    tensors = (decoded[0].images, train.labels, decoded[1].images, test.labels)
    sha256 = fingerprint_of([part.sha256 for part in decoded], train.labels, test.labels)
    return of_halves(DESCRIPTION, tensors, wanted, sha256=sha256, caveat=caveat)


def read_lists(folder: Path) -> tuple[ListedImages, ListedImages]:
    """The training images and the test images.

    Args:
        folder: the folder that holds `CUB_200_2011`.

    Raises:
        ArtifactError: a list is missing, malformed, or contradicts another.
    """
    paths, labels, sides, classes = (_read_list(folder, name) for name in _LISTS)
    home = folder / FOLDER
    if classes != {str(number): f"{number:03d}.{name}" for number, name in enumerate(CLASS_NAMES, start=1)}:
        raise _not_cub(home / "classes.txt", "its classes are not the 200 species")
    for name, rows in zip(_LISTS[1:3], (labels, sides), strict=True):
        if rows.keys() != paths.keys():
            first = min(rows.keys() ^ paths.keys())
            raise _not_cub(home / name, f"image `{first}` is in it or in `images.txt`, but not in both")
    if len(set(paths.values())) < len(paths):
        raise _not_cub(home / "images.txt", "it names an image twice")
    for number, path in paths.items():
        if path.startswith("/") or ".." in path.split("/") or not path.isprintable():
            raise _not_cub(home / "images.txt", f"`{path}` is not a path below `images`")
        if sides[number] not in ("0", "1"):
            raise _not_cub(home / "train_test_split.txt", f"image `{number}` is on side `{sides[number]}`, not 0 or 1")
        if classes.get(labels[number]) != path.partition("/")[0]:
            raise _not_cub(home / "image_class_labels.txt", f"`{path}` has the label `{labels[number]}`")
    train, test = (_split(paths, labels, [number for number in paths if sides[number] == side]) for side in "10")
    if not (train.names and test.names):
        raise _not_cub(home / "train_test_split.txt", "there are no training images or no test images")
    return train, test


def how_to_get(folder: Path) -> str:
    """The hint for users who do not have the data yet."""
    return (
        f"`icdctl fetch-data cub200` downloads it ({RELEASE.archive.facts}); if you have it elsewhere, pass the folder "
        f"that holds `{FOLDER}` (here `{folder}`) with `--data-dir`"
    )


def _split(paths: dict[str, str], labels: dict[str, str], numbers: list[str]) -> ListedImages:
    chosen = torch.tensor([int(labels[number]) - 1 for number in numbers], dtype=torch.int64)
    return ListedImages(tuple(paths[number] for number in numbers), chosen)


def _read_list(folder: Path, name: str) -> dict[str, str]:
    """A list file as a dictionary from each line's number to the rest of the line."""
    path = folder / FOLDER / name
    try:
        lines = files.read_text(path).splitlines()
    except FileNotFoundError as error:
        raise ArtifactError(f"CUB-200-2011 is missing: `{path}` does not exist", hint=how_to_get(folder)) from error
    except (OSError, ValueError) as error:
        raise _not_cub(path, str(error)) from error
    rows: dict[str, str] = {}
    for line in lines:
        number, space, value = line.strip().partition(" ")
        if not (re.fullmatch(r"[0-9]{1,9}", number) and space and value):
            raise _not_cub(path, f"line `{line[:60]}` is not a number and a value")
        if number in rows:
            raise _not_cub(path, f"it has number `{number}` twice")
        rows[number] = value
    return rows


def how_to_fix(folder: Path) -> str:
    """The hint for users who have a file that is missing or damaged."""
    return f"move `{folder / FOLDER}` away; `icdctl fetch-data cub200` then downloads it again"


def _not_cub(path: Path, cause: str) -> ArtifactError:
    return ArtifactError(f"`{path}` is not a file of CUB-200-2011: {cause}", hint=how_to_fix(path.parents[1]))

"""What fastar knows of a dataset by name. Adding a dataset is one entry here."""

from dataclasses import dataclass
from difflib import get_close_matches

from fastar.config import OF_ANY_SIZE
from fastar.errors import FastarError

# The paper normalises CIFAR inputs with ImageNet's statistics (red, green, blue; pixels in 0..1).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Augmentation:
    """Training augmentation: zero-pad by `pad` pixels and crop back at random, then mirror with probability 1/2."""

    pad: int = 0
    flip: bool = False

    def __bool__(self) -> bool:
        return self.pad > 0 or self.flip


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset's fixed facts. `mean` and `std` are per channel for pixels in 0..1; None: measured when written.

    `reader` names the family of raw formats (see `raw/find.py`), `folders` the folder or archive names that hold
    them inside a data root, `usual` further places to look when no data root is given, `obtain` how to get the data.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    height: int
    width: int
    augmentation: Augmentation
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    reader: str
    folders: tuple[str, ...]
    usual: tuple[str, ...]
    obtain: str


_DIGITS = tuple(str(digit) for digit in range(10))
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm"""
_CIFAR100 = tuple(_CIFAR100_NAMES.split())

DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            name="digits",
            classes=_DIGITS,
            channels=1,
            height=8,
            width=8,
            augmentation=Augmentation(),
            mean=None,
            std=None,
            reader="digits",
            folders=(),
            usual=(),
            obtain="install scikit-learn, which carries it",
        ),
        DatasetSpec(
            name="fashion-mnist",
            classes=_FASHION,
            channels=1,
            height=28,
            width=28,
            augmentation=Augmentation(),
            mean=None,
            std=None,
            reader="idx",
            folders=("fashion-mnist", "FashionMNIST/raw", "FashionMNIST"),
            usual=("/usr/share/datasets",),
            obtain="apt install dataset-fashion-mnist, or put the four IDX files of "
            "https://github.com/zalandoresearch/fashion-mnist in one folder",
        ),
        DatasetSpec(
            name="mnist",
            classes=_DIGITS,
            channels=1,
            height=28,
            width=28,
            augmentation=Augmentation(),
            mean=None,
            std=None,
            reader="idx",
            folders=("mnist", "MNIST/raw", "MNIST"),
            usual=("/usr/share/datasets",),
            obtain="put the four IDX files of MNIST (train-images-idx3-ubyte.gz, ...) in one folder",
        ),
        DatasetSpec(
            name="cifar10",
            classes=_CIFAR10,
            channels=3,
            height=32,
            width=32,
            augmentation=Augmentation(pad=4, flip=True),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            reader="cifar10",
            folders=("cifar-10-batches-py", "cifar-10-batches-bin", "cifar10", "cifar-10", "CIFAR10"),
            usual=("/usr/share/datasets",),
            obtain="get cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
        ),
        DatasetSpec(
            name="cifar100",
            classes=_CIFAR100,
            channels=3,
            height=32,
            width=32,
            augmentation=Augmentation(pad=4, flip=True),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            reader="cifar100",
            folders=("cifar-100-python", "cifar-100-binary", "cifar100", "cifar-100", "CIFAR100"),
            usual=("/usr/share/datasets",),
            obtain="get cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
        ),
    )
}


def dataset_spec(name: str) -> DatasetSpec:
    """The entry called `name`; FastarError lists the valid names and the nearest one."""
    if name in DATASETS:
        return DATASETS[name]
    names = (*DATASETS, *OF_ANY_SIZE)
    near = get_close_matches(name.lower().replace("_", "-"), names, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise FastarError(f"unknown dataset {name!r}{hint}; choose one of: {', '.join(names)}")

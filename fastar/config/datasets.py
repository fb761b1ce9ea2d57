"""Data sets known by name, with all of their facts. Adding one is one entry here, or `register` from a package.

Torch-free: settings, plans and help read it too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

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


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A data set's fixed facts.

    Args:
        name: as `--dataset` takes it.
        reader: what reads its raw data: a family of `fastar.data.raw.find`, or `module:function` of any package, a
            function of (place, spec) that returns a `RawDataset`, or None where the place holds none of its data.
        obtain: how to get the data, for a message.
        arch: the architecture it is trained with where none is named.
        classes: names in the order of labels; none where the raw data's folders name them.
        class_count: their number; None: known from the files alone.
        train: published number of training images; None: any.
        test: published number of test images.
        channels: of an image.
        height: in pixels, of the stored images; of variable sizes the side that they are decoded to by default.
        width: see `height`.
        variable_size: images are of any size: stored as they come, decoded, cut out and resized as they are read.
        mean: per channel, of pixels in 0..1; None: measured when the data are written. So is `std`.
        std: see `mean`.
        augmentation: of images of one size in training; images of any size are cut out as `dataset.crop` says.
        folders: names of folders or archives that hold the raw data inside a data root.
        usual: further places to look when no data root is given.
        md5: published MD5 sums of the raw files, by name.
        gigabytes: sizes of the training set's .beton file by encoding, as its makers' published ones say.
    """

    name: str
    reader: str
    obtain: str
    arch: str = "resnet18"
    classes: tuple[str, ...] = ()
    class_count: int | None = None
    train: int | None = None
    test: int | None = None
    channels: int = 3
    height: int = 224
    width: int = 224
    variable_size: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augmentation: Augmentation = Augmentation()
    folders: tuple[str, ...] = ()
    usual: tuple[str, ...] = ()
    md5: Mapping[str, str] = field(default_factory=dict)
    gigabytes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.class_count is None and self.classes:
            object.__setattr__(self, "class_count", len(self.classes))


_DIGITS = tuple(str(digit) for digit in range(10))
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR100_NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm"""
_CIFAR100 = tuple(_CIFAR100_NAMES.split())

_MNIST = DatasetSpec(
    name="mnist",
    arch="mlp",
    train=60_000,
    test=10_000,
    classes=_DIGITS,
    channels=1,
    height=28,
    width=28,
    reader="idx",
    folders=("mnist", "MNIST/raw", "MNIST"),
    usual=("/usr/share/datasets",),
    obtain="put the four IDX files of MNIST (train-images-idx3-ubyte.gz, ...) in one folder",
    md5={
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
)
_CIFAR10 = DatasetSpec(
    name="cifar10",
    train=50_000,
    test=10_000,
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    height=32,
    width=32,
    augmentation=Augmentation(pad=4, flip=True),
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    reader="cifar10",
    folders=("cifar-10-batches-py", "cifar-10-batches-bin", "cifar10", "cifar-10", "CIFAR10"),
    usual=("/usr/share/datasets",),
    obtain="get cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
    md5={
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
)

DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            name="digits",
            arch="mlp",
            train=1_437,
            test=360,
            classes=_DIGITS,
            channels=1,
            height=8,
            width=8,
            reader="digits",
            obtain="install scikit-learn, which carries it",
        ),
        replace(
            _MNIST,
            name="fashion-mnist",
            classes=_FASHION,
            folders=("fashion-mnist", "FashionMNIST/raw", "FashionMNIST"),
            obtain="apt install dataset-fashion-mnist, or put the four IDX files of "
            "https://github.com/zalandoresearch/fashion-mnist in one folder",
            md5={
                "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
                "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
                "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
            },
        ),
        _MNIST,
        _CIFAR10,
        replace(
            _CIFAR10,
            name="cifar100",
            classes=_CIFAR100,
            class_count=100,
            reader="cifar100",
            folders=("cifar-100-python", "cifar-100-binary", "cifar100", "cifar-100", "CIFAR100"),
            md5={
                "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
                "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
                "train": "16019d7e3df5f24257cddd939b257f8d",
                "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            },
            obtain="get cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
        ),
        DatasetSpec(
            name="imagenet",
            arch="imagenet-resnet18",
            class_count=1000,
            train=1_281_167,
            test=50_000,
            variable_size=True,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            reader="images",
            obtain="get its archives from https://image-net.org and give their folder with --data-root",
            md5={
                "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
                "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
                "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
            },
            # From https://docs.ffcv.io/benchmarks.html, "Dataset sizes", on straight lines between them.
            gigabytes={"rn50": 328, "rn18": 366, "jpeg": 65},
        ),
        DatasetSpec(
            name="imagefolder",
            arch="imagenet-resnet18",
            variable_size=True,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            reader="images",
            obtain="give your folder of class folders with --data-root",
        ),
    )
}


def register(spec: DatasetSpec) -> None:
    """Make a data set of another package known by its name, before settings name it.

    Raises:
        FastarError: the name is another's.
    """
    if DATASETS.get(spec.name, spec) != spec:
        raise FastarError(f"dataset {spec.name!r} is registered already; choose another name")
    DATASETS[spec.name] = spec


def variable_size_names() -> tuple[str, ...]:
    """The data sets of images of any size."""
    return tuple(name for name, spec in DATASETS.items() if spec.variable_size)


def dataset_spec(name: str) -> DatasetSpec:
    """The entry called `name`; FastarError lists the valid names and the nearest one. Of a user's own data
    (`module:function`) nothing is known."""
    if name in DATASETS:
        return DATASETS[name]
    if ":" in name:
        return DatasetSpec(name=name, reader="", obtain="", arch="")
    near = get_close_matches(name.lower().replace("_", "-"), DATASETS, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise FastarError(f"unknown dataset {name!r}{hint}; choose one of: {', '.join(DATASETS)}")

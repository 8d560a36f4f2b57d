"""What experiments run on: testbeds, what this machine has of them, and the command line that says so."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from salve.ending import as_told
from salve.types import UserError


@dataclass(frozen=True)
class Testbed:
    """A classifier and its data.

    Attributes:
        name: on the command line. title: in figures. config: under ``conf/experiment``; empty for the quickstart.
        data: name of the images it needs. weights: name of the weights file it takes in place of a download.
        quick: settings that make it small, for ``--quick``.
    """

    name: str
    title: str
    config: str = ""
    data: str = ""
    weights: str = ""
    quick: tuple[str, ...] = ()


_FEW = ("data.limit_per_class=80", "finetune.epochs=2")
_FEW_OF_MANY = ("data.limit_per_class=20", "finetune.epochs=2")
_FEW_DRAWN = ("data.train_per_class=200", "data.select_per_class=20", "data.test_per_class=20", "finetune.epochs=6")

TESTBEDS = {
    testbed.name: testbed
    for testbed in (
        Testbed("resnet18", "ResNet-18, Imagenette", "imagenette/resnet18", "imagenette", "resnet18", _FEW),
        Testbed("vit", "ViT-S/14, Imagenette", "imagenette/vit", "imagenette", "vit", _FEW),
        Testbed("vit_b_16", "ViT-B/16, Imagenette", "imagenette/vit_b_16", "imagenette", "vit_b_16", _FEW),
        Testbed("cifar100", "ResNet-18, CIFAR-100", "cifar100/resnet18", "cifar100", "cifar100", _FEW_OF_MANY),
        Testbed("scenes", "small ResNet, drawn scenes", quick=_FEW_DRAWN),
    )
}


@dataclass(frozen=True)
class Setup:
    """The data and weights that this machine has, and where results go.

    Attributes:
        output_dir: for runs, artifacts and figures. folders: of images, by data set. weights: files, by name.
        download: fetch missing images and weights. quick: make small runs, whose numbers mean little.
        settings: any of salve's, for all runs.
    """

    output_dir: Path
    folders: dict[str, str]
    weights: dict[str, str]
    download: bool = False
    quick: bool = False
    settings: tuple[str, ...] = ()

    def lacks(self, testbed: Testbed) -> str:
        """What this machine lacks to run on a testbed, and how to give it; empty if nothing."""
        if testbed.data and not self.download:
            folder = self.folders.get(testbed.data)
            if not folder:
                return f"{testbed.data}'s images are not here: give --{testbed.data} FOLDER, or --download"
            if not Path(folder).is_dir():
                return f"there is no folder {folder} with {testbed.data}'s images"
            if testbed.weights not in self.weights:
                return f"no trained weights: give --weights {testbed.weights}=FILE, or --download for ImageNet's"
        file = self.weights.get(testbed.weights, "")
        return f"there is no file {file}" if file and not Path(file).is_file() else ""

    def overrides(self, testbed: Testbed) -> list[str]:
        """Settings that point ``salve`` to a testbed's images and weights."""
        found = list(testbed.quick if self.quick else ())
        if testbed.data in self.folders:
            found.append(f"data.root={quoted(self.folders[testbed.data])}")
        if testbed.weights in self.weights:
            found.append(f"backbone.weights={quoted(self.weights[testbed.weights])}")
        if testbed.data and self.download:
            found.append("data.download=true")
        return found


def quoted(text: object) -> str:
    """A value for Hydra's command line, in quotes if it holds characters that mean something there."""
    value = str(text)
    if re.fullmatch(r"[\w./~+:@%-]+", value):
        return value
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)  # a quote, and the backslashes right before it, are escaped
    return f"'{escaped}'"


#: Options of :func:`add_setup` without a value.
FLAGS = ("--download", "--quick")


def add_setup(parser: argparse.ArgumentParser, default: str = "each experiment's own") -> None:
    """Add ``--on``, which names testbeds (``default``: those without it), and the options of :func:`setup_of`."""
    parser.add_argument("--on", nargs="+", choices=list(TESTBEDS), metavar="TESTBED",
                        help=f"of {', '.join(TESTBEDS)} (default: {default})")  # fmt: skip
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="any of salve's, as key=value, for all runs")
    parser.add_argument("--imagenette", metavar="FOLDER", help="holds train/ and val/ (else $SALVE_IMAGENETTE)")
    parser.add_argument("--cifar100", metavar="FOLDER", help="holds cifar-100-python/ (else $SALVE_CIFAR100)")
    parser.add_argument(
        "--weights", metavar="NAME=FILE", action="append", default=[],
        help="trained weights of resnet18, vit, vit_b_16 or cifar100 (else $SALVE_RESNET18, …)",
    )  # fmt: skip
    parser.add_argument(
        FLAGS[0], action="store_true", help="fetch missing images and ImageNet's weights, and fine-tune those"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    parser.add_argument(FLAGS[1], action="store_true", help="small runs that show that everything works")


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line with :func:`add_setup`'s options, in which settings may stand anywhere."""
    given, settings, before = list[str](), list[str](), ""
    left = list(sys.argv[1:] if arguments is None else arguments)
    while left and (one := left.pop(0)) != "--":
        is_value = before.startswith("-") and "=" not in before and before not in FLAGS
        (settings if "=" in one and not one.startswith("-") and not is_value else given).append(one)
        before = one
    return parser.parse_intermixed_args([*given, "--", *settings, *left])


def setup_of(given: argparse.Namespace) -> Setup:
    """The setup that the command line and the environment describe.

    Raises:
        UserError: weights of an unknown name, or a setting that is not ``key=value``.
    """
    names = [testbed.weights for testbed in TESTBEDS.values() if testbed.weights]
    weights = {name: os.environ[f"SALVE_{name.upper()}"] for name in names if os.environ.get(f"SALVE_{name.upper()}")}
    weights.pop("cifar100", None)  # $SALVE_CIFAR100 is the folder of images
    for text in given.weights:
        name, equals, file = text.partition("=")
        if name not in names or not equals:
            raise UserError(f"--weights {text} is no NAME=FILE with a NAME among {', '.join(names)}.")
        weights[name] = file
    weights = {name: os.path.expanduser(file) for name, file in weights.items()}
    folders = {
        name: os.path.expanduser(folder)
        for name in ("imagenette", "cifar100")
        if (folder := getattr(given, name) or os.environ.get(f"SALVE_{name.upper()}"))
    }
    if bad := [text for text in given.settings if "=" not in text]:
        raise UserError(f"{bad[0]} is no setting: write key=value, such as trainer=cpu.")
    output_dir, settings = given.output_dir.expanduser(), tuple(given.settings)
    return Setup(output_dir, folders, weights, given.download, given.quick, settings)


def as_command(name: str, work: Callable[[], int]) -> int:
    """Do the work of a command; returns its exit status: 2 where a ``UserError``, which is printed, ended it."""

    def status() -> int:
        try:
            return work()
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2

    return as_told(status, f"{name}: stopped; the same command goes on with what is not done.")

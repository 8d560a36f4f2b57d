"""One experiment: make or find its runs, and turn them into figures, tables and findings."""

import argparse
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache, partial, reduce, wraps
from operator import getitem
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure

import salve
from experiments.claims import FILE as CLAIMS
from experiments.claims import Measured, judged, load_claims
from experiments.compare import WORDS
from experiments.figures import save
from experiments.runs import Study, make, opened
from experiments.testbeds import TESTBEDS, Setup, Testbed, add_setup, as_command, parsed, setup_of
from salve.artifacts import REVISION, digest_of, digest_of_file, read_record, write_record, write_table
from salve.files import flush
from salve.report.text import Formatter
from salve.run.explain import conf_dir
from salve.types import UserError

FINDINGS = "findings.json"
TEXTS = CLAIMS.with_name("texts.yaml")


@cache
def _texts() -> Any:
    return yaml.safe_load(TEXTS.read_text(encoding="utf-8"))


def said(name: str, study: Study | None = None, **fields: object) -> str:
    """The text ``<experiment>.<name>`` of ``texts.yaml``, whose fields are filled in.

    Of a study the ``title`` is known, and how many ``saes``, ``classes`` and test ``images`` there are.
    """
    text = reduce(getitem, name.split("."), _texts())
    known: dict[str, object] = dict(WORDS)
    if study:
        known |= {"title": study.testbed.title, "images": len(study.test.labels)}
        known |= {"saes": len(study.runs), "classes": len(study.classes)}
    return Formatter().format(text, **known | fields)


def measured(claim: str, study: Study, value: float, published: str = "", **fields: object) -> Measured:
    """What was found for a claim, in the words ``measured.<claim>`` of ``texts.yaml``; see :func:`said`."""
    text = said(f"measured.{claim}", study, value=value, **fields)
    return Measured(claim, study.testbed.name, float(value), text, published)


@dataclass(frozen=True)
class Picture:
    """A figure and what it shows."""

    figure: Figure
    caption: str

    @classmethod
    def of(cls, figure: Figure, name: str, study: Study | None = None, **fields: object) -> "Picture":
        """A figure with a caption of ``texts.yaml``: see :func:`said`."""
        return cls(figure, said(name, study, **fields))


@dataclass(frozen=True)
class Findings:
    """What an experiment found.

    Attributes:
        paragraph: what it shows, in words. pictures: by file name. tables: by file name, each with every number of a
            figure. measured: for the claims.
    """

    paragraph: str
    pictures: Mapping[str, Picture]
    tables: Mapping[str, pd.DataFrame]
    measured: Sequence[Measured] = ()

    @classmethod
    def together(cls, parts: Sequence["Findings"]) -> "Findings":
        """What was found on several testbeds; tables of one name become one."""
        names = dict.fromkeys(name for part in parts for name in part.tables)
        return cls(
            "\n\n".join(part.paragraph for part in parts),
            {name: picture for part in parts for name, picture in part.pictures.items()},
            {name: joined([part.tables[name] for part in parts if name in part.tables]) for name in names},
            [one for part in parts for one in part.measured],
        )


def per_testbed(analyse: Callable[[Study], Findings]) -> Callable[[Sequence[Study]], Findings]:
    """Analyse each testbed by itself, and put the findings together."""

    @wraps(analyse)
    def all_of_them(studies: Sequence[Study]) -> Findings:
        return Findings.together([analyse(study) for study in studies])

    return all_of_them


def joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables under each other."""
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class Experiment:
    """One figure of the paper.

    Attributes:
        name: of its module and its recipe, ``conf/experiment/<group>/<name>.yaml``. title: for people.
        analyse: from the finished runs on each testbed to what they show. quick: settings for ``--quick``.
        testbeds: where it runs by default. beside: further testbeds to compare with, where they can run here.
        group: ``salve2025``, or ``beyond`` for what the paper does not have.
        sweeps, quick_sweeps: where one grid cannot hold all runs, the settings of each sweep, beyond its recipe.
        sites: by testbed, settings of further sweeps of its own, such as its inner sites; left out if ``quick``.
        check: called before any run is made; raises UserError where a package is missing.
        needs: a setting without which it cannot run on testbeds of photographs.
    """

    name: str
    title: str
    analyse: Callable[[Sequence[Study]], Findings]
    quick: tuple[str, ...] = ("sae.seed=0,1", "sae.epochs=20")
    testbeds: tuple[str, ...] = ("resnet18", "vit")
    beside: tuple[str, ...] = ()
    group: str = "salve2025"
    sweeps: tuple[tuple[str, ...], ...] = ((),)
    quick_sweeps: tuple[tuple[str, ...], ...] = ((),)
    check: Callable[[], None] = lambda: None
    sites: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    needs: str = ""

    @property
    def config(self) -> str:
        """Its recipe."""
        return f"{self.group}/{self.name}"

    @property
    def module(self) -> str:
        """Its module, to be run."""
        return f"experiments.{self.group}.{self.name}"

    def sweeps_for(self, setup: Setup, testbed: Testbed) -> list[tuple[str, ...]]:
        """The settings of each of its sweeps on a testbed."""
        if setup.quick:
            return [(*self.quick, *sweep) for sweep in self.quick_sweeps]
        return [*self.sweeps, *([self.sites[testbed.name]] if testbed.name in self.sites else ())]

    def lacks(self, setup: Setup, testbed: Testbed) -> str:
        """What this machine or the command line lacks to run on a testbed; empty if nothing."""
        given = any(text.startswith(f"{self.needs}=") for text in setup.settings)
        if self.needs and testbed.data and not given:
            return f"give {self.needs}=FILE"
        return setup.lacks(testbed)

    def testbeds_here(self, on: Sequence[str] | None, setup: Setup) -> tuple[list[Testbed], list[Testbed]]:
        """The testbeds ``on`` (None: its own) that it can run on here, and those that it cannot."""
        wanted = [TESTBEDS[name] for name in dict.fromkeys(on or (*self.testbeds, *self.beside))]
        here = [testbed for testbed in wanted if not self.lacks(setup, testbed)]
        out = [testbed for testbed in wanted if self.lacks(setup, testbed)]
        if not on and not any(testbed.name in self.testbeds for testbed in here):
            return [], out  # those beside it would have nothing to be compared with
        return here, out


def paper_folder(setup: Setup) -> Path:
    """The folder of figures and findings."""
    return setup.output_dir / ("paper-quick" if setup.quick else "paper")


def carry_out(experiment: Experiment, testbeds: Sequence[Testbed], setup: Setup) -> bool:
    """Make missing runs and write an experiment's folder; False if it is there already, from the same settings.

    Raises:
        UserError: this machine lacks what the experiment or a testbed needs, or some runs could not be made.
    """
    for testbed in testbeds:
        if missing := experiment.lacks(setup, testbed):
            raise UserError(f"{experiment.name} cannot be run on {testbed.title}: {missing}.")
    final = paper_folder(setup) / experiment.name
    digest = _digest(experiment, testbeds, setup)
    if findings_in(final).get("digest") == digest:
        return False
    experiment.check()
    began = time.monotonic()
    sweeps = [(testbed, experiment.sweeps_for(setup, testbed)) for testbed in testbeds]
    commands = [typed for testbed, own in sweeps for typed in make(experiment.config, testbed, setup, own)]
    with ExitStack() as stack:
        studies = [stack.enter_context(opened(experiment.config, testbed, setup)) for testbed in testbeds]
        with torch.inference_mode(False):
            found = experiment.analyse(studies)
        facts = [_facts(study) for study in studies]
    record = {
        "title": experiment.title,
        "digest": digest,
        "quick": setup.quick,
        "testbeds": facts,
        "commands": commands,
        "machine": _machine(),
        "paragraph": found.paragraph,
        "measured": [one._asdict() for one in found.measured],
    }
    _write(final, found, record, began)
    return True


def findings_in(folder: Path) -> dict[str, Any]:
    """The record of what an experiment found; empty if there is none that can be read."""
    try:
        return read_record(folder / FINDINGS)
    except (OSError, ValueError):
        return {}


def _write(final: Path, found: Findings, record: dict[str, Any], began: float) -> None:
    """Write an experiment's folder, as a whole or not at all."""
    judged(load_claims(), found.measured)  # refuses an unknown claim before anything is written
    unfinished = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        pictures = []
        for name, picture in found.pictures.items():
            size = save(picture.figure, unfinished, name)
            pictures.append({"name": name, "caption": picture.caption, "size": list(size)})
        for name, table in found.tables.items():
            write_table(unfinished / f"{name}.csv", table)
        seconds = time.monotonic() - began
        write_record(
            unfinished / FINDINGS,
            {**record, "pictures": pictures, "tables": list(found.tables), "seconds": round(seconds, 1)},
        )
        for path in (*unfinished.iterdir(), unfinished):
            flush(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _facts(study: Study) -> dict[str, Any]:
    data = study.context.data
    splits = {split: len(data.labels(split)) for split in ("train", "select", "test")}
    return {**asdict(study.testbed), "images": splits, "classes": len(study.classes), "seeds": len(study.runs)}


def _digest(experiment: Experiment, testbeds: Sequence[Testbed], setup: Setup) -> str:
    """A digest of what findings depend on: settings, recipes and code."""
    here = Path(__file__).parent
    loaded = {file for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    sources = sorted(Path(file) for file in loaded if file.startswith(f"{here}{os.sep}"))
    recipes = [experiment.config, *(testbed.config for testbed in testbeds if testbed.config)]
    files = [*sources, CLAIMS, TEXTS, *(conf_dir() / "experiment" / f"{recipe}.yaml" for recipe in recipes)]
    overrides = [setup.overrides(testbed) for testbed in testbeds]
    sweeps = [experiment.sweeps_for(setup, testbed) for testbed in testbeds]
    settings = [overrides, setup.settings, sweeps, setup.quick, salve.__version__, REVISION]
    return digest_of([settings, [digest_of_file(path) for path in files]])


def _machine() -> dict[str, Any]:
    """The GPU or the processor, with its name where the system tells it."""
    file = Path("/proc/cpuinfo")
    told = re.search(r"(?m)^model name\s*: (.*)$", file.read_text(encoding="utf-8")) if file.is_file() else None
    processor = told[1] if told else platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor
    return {"device": device, "cores": os.cpu_count(), "torch": torch.__version__}


def main(experiment: Experiment, arguments: list[str] | None = None) -> int:
    """Entry point of an experiment's module; returns the exit status."""
    return as_command(experiment.name, partial(_main, experiment, arguments))


def _main(experiment: Experiment, arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {experiment.module}",
        description=f"{experiment.title}: make or find its runs, and write figures, tables and findings into "
        f"<output-dir>/paper/{experiment.name}.",
    )
    add_setup(parser, " ".join([*experiment.testbeds, *(f"[{name}]" for name in experiment.beside)]))
    given = parsed(parser, arguments)
    setup = setup_of(given)
    beside = [name for name in experiment.beside if not experiment.lacks(setup, TESTBEDS[name])]
    names = dict.fromkeys(given.on or (*experiment.testbeds, *beside))
    made = carry_out(experiment, [TESTBEDS[name] for name in names], setup)
    print(f"{experiment.title}: {paper_folder(setup) / experiment.name}" + ("" if made else " (was there)"))
    return 0

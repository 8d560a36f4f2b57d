# SPDX-License-Identifier: MIT
"""``salve-sites``: the sites of a backbone in a table."""

import argparse
import sys
from dataclasses import asdict, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from salve.ending import as_told
from salve.system import in_one_sentence
from salve.types import UserError
from salve.values import OWN, TRANSFORMERS

_DESCRIPTION = """\
List the sites of a backbone: the tensors that nothing but weights reads, so that
an edit of these weights is exactly a gate on the activations. They are found in
the graph that torch.export makes of the network, and kept: the second time the
answer is there at once.
"""

_EXAMPLES = """\
columns: the site's name, which is its first reader; other names that it goes by;
channels; positions (height x width, or tokens: those before the image's own + the
image's); the sign that activations can have; whether images also reach the logits
on a way around the site, which its gates cannot close; what else reads it.

Any name goes into a run: salve layer=NAME. salve -m sweep=layer runs them all.

examples:
  salve-sites                                        the default backbone
  salve-sites backbone=vit_b_16
  salve-sites backbone=timm backbone.name=convnext_atto
  salve-sites backbone=resnet18 backbone.preprocess.size=96
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return as_told(partial(_main, arguments), "salve-sites: stopped.")


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="salve-sites",
        usage="salve-sites [SETTING=VALUE ...]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE", help="settings of salve that name the backbone")
    given = parser.parse_args(arguments)
    # Only now, since these take seconds.
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from salve.run.explain import explain, group_mistake

    try:
        _show(given.settings)
    except (HydraException, OmegaConfBaseException) as error:
        print(f"salve-sites: {explain(error)}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"salve-sites: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"salve-sites: {in_one_sentence(error)}", file=sys.stderr)
        return 1
    except ValueError:  # what Hydra raises for a group that is given a number
        if (said := group_mistake(given.settings)) is None:
            raise
        print(f"salve-sites: {said}", file=sys.stderr)
        return 2
    return 0


def _show(settings: list[str]) -> None:
    from hydra import compose, initialize_config_dir
    from rich.console import Console

    from salve.artifacts import Store
    from salve.run.explain import conf_dir
    from salve.run.schema import register, resolve

    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = resolve(compose("config", overrides=settings))
    backbone = config.backbone
    record = found_sites(
        Store(Path(config.output_dir) / "artifacts"),
        backbone.library,
        backbone.name,
        backbone.args,
        backbone.preprocess.size,
    )
    Console(markup=False, emoji=False).print(_table(record))


def found_sites(store: Any, library: str, name: str, args: dict[str, Any], size: int | None) -> dict[str, Any]:
    """The sites of a backbone, found once and then kept as an artifact.

    Args:
        store: where. library, name, args: the backbone. size: of a side of its images; None for the network's own.

    Returns:
        ``{"backbone", "size", "sites": [fields of Site]}``.

    Raises:
        UserError: there is no such backbone, or it has no graph.
    """
    from salve.artifacts import read_record, write_record
    from salve.backbones.site import Site

    packages = ("torch",) if library == OWN else ("torch", library)
    key_settings = {
        **{"library": library, "name": name, "args": args, "size": size, "fields": [one.name for one in fields(Site)]},
        "versions": {package: version(package) for package in packages},
    }

    def build() -> Any:
        from salve.backbones import load_backbone

        # Sites follow from the architecture, and weights need not be there.
        return load_backbone(library, name, "random", 2, args).model.eval()

    if library in (TRANSFORMERS, OWN):  # whose names do not say what they are
        from salve.backbones.load import code_of

        key_settings["code"] = code_of(library, name, args, build())

    def make(folder: Path, scratch: Path) -> None:
        from salve.backbones.graph import NetworkGraph
        from salve.backbones.probe import own_size

        model = build()
        side = own_size(model) if size is None else size
        sites = NetworkGraph(model, side).sites
        record = {"backbone": f"{library} {name}", "size": side, "sites": [asdict(site) for site in sites.values()]}
        write_record(folder / "sites.json", record)

    artifact = store.get_or_make("sites", key_settings, make)
    return dict(read_record(artifact.file("sites.json")))


def _table(record: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    from salve.backbones.site import Reader, Site

    title = f"{len(record['sites'])} sites of {record['backbone']}, for images of {record['size']} pixels"
    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("site", no_wrap=True)  # to be copied
    table.add_column("also called", overflow="fold")
    table.add_column("channels", justify="right")
    table.add_column("positions")
    table.add_column("sign")
    table.add_column("by-passed")
    table.add_column("also read by", overflow="fold")
    for one in record["sites"]:
        readers = tuple(Reader(**reader) for reader in one["readers"])
        site = Site(**{**one, "readers": readers, "in_graph": None})
        tokens, before = site.positions[:1], site.prefix_tokens
        positions = f"{before} + {tokens[0] - before}" if before else " x ".join(map(str, site.positions))
        others = [reader["weight"].removesuffix(".weight") for reader in one["readers"][1:]]
        table.add_row(
            *(site.name, ", ".join(site.aliases), str(site.width), positions or "1"),
            *("+ -" if site.signed else "+", "yes" if site.bypassed else "no", ", ".join(others)),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())

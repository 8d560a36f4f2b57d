"""docs/settings.md lists every setting with its type, unit, default and explanation."""

import re
from dataclasses import dataclass, fields, is_dataclass
from math import inf
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from omegaconf import OmegaConf

from docs.tools import settings as listed
from docs.tools.comments import choices, comments, leaves, read
from docs.tools.kinds import attributes, type_of
from docs.tools.prose import markdown, sentence
from salve.run.explain import conf_dir, groups
from salve.run.schema import DATA, DATA_NAMES, Config
from salve.settings import NOT_COMPUTED
from salve.values import ABOVE_ZERO, SHARE, OneOf, Takes, Unit
from tests.composing import changed

TEXT = listed.PAGE.read_text(encoding="utf-8")
ENTRIES = dict(re.findall(r"^### `([^`]+)`(?: \(\w+\))?\n\n(.*?)\n(?=\n#|\Z)", TEXT, re.MULTILINE | re.DOTALL))
#: Numbers that count and measure nothing: seeds, and what is explained by a formula.
PURE = {
    *("seed", "split_seed", "learning_rate", "weight_decay", "label_smoothing", "sparsity", "bandwidth"),
    *("gradient_clip_val", "spurious_correlation", "clutter", "defining_rate", "min_crop_scale"),
}


def kinds(kind: Any) -> list[Any]:
    """A dataclass and those in it."""
    inner = [one for hint in get_type_hints(kind).values() for one in (hint, *get_args(hint)) if is_dataclass(one)]
    return [kind, *(deeper for one in inner for deeper in kinds(one))]


SCHEMA = [*kinds(Config), *DATA.values()]


def test_the_page_is_the_one_that_the_command_makes() -> None:
    assert listed.page() == TEXT, "run python -m docs.tools.settings"


def test_every_setting_of_the_schema_is_on_the_page() -> None:
    def keys(kind: Any, above: str) -> list[str]:
        found = []
        for name, hint in get_type_hints(kind).items():
            inner = [one for one in (hint, *get_args(hint)) if is_dataclass(one)]
            found += keys(inner[0], f"{above}{name}.") if inner else [f"{above}{name}"]
        return found

    wanted = {*keys(Config, "")} - {"data"}
    for kind in DATA.values():
        wanted |= {*keys(kind, "data.")} - {"data._target_"}
    assert len(wanted) > 120
    assert wanted <= ENTRIES.keys()
    for choice, target in DATA_NAMES.items():
        for item in fields(DATA[target]):
            assert item.name == "_target_" or f"### `data.{item.name}` ({choice})\n" in TEXT


def test_nothing_on_the_page_lacks_an_explanation() -> None:
    every = [setting for _, _, found in listed.sections() for setting in found]
    assert len(every) > 150
    assert [setting.key for setting in every if not setting.explanation] == []


def test_a_setting_that_nothing_explains_is_noticed() -> None:
    @dataclass
    class Group:
        """A group.

        Attributes:
            known: what it does.
        """

        known: int = 1
        unknown: int = 2

    known, unknown = listed.settings_of(Group, "group.", ["config"])
    assert (known.explanation, unknown.explanation) == ("What it does.", "")


def test_every_number_has_a_unit() -> None:
    missing = []
    for kind in SCHEMA:
        for name, hint in get_type_hints(kind, include_extras=True).items():
            value, *rules = get_args(hint) if get_origin(hint) is Annotated else [hint]
            is_number = {int, float} & {value, *get_args(value)} and get_origin(value) not in (list, dict)
            if is_number and name not in PURE and not any(isinstance(rule, Unit) for rule in rules):
                missing.append(f"{kind.__name__}.{name}")
    assert missing == [], "say in the annotation what the number counts: Unit('images')"


def test_defaults_are_what_hydra_composes() -> None:
    config = OmegaConf.to_container(changed(), resolve=False)
    assert isinstance(config, dict)
    found = leaves(config)
    compared = 0
    for key, entry in ENTRIES.items():
        default = re.search(r"default `(.*?)`(?: with `|\s·)", entry)
        if key in found and default and not key.startswith("data.") and " with `" not in default[0]:
            assert yaml.safe_load(default[1]) == found[key] or found[key] == inf, key
            compared += 1
    assert compared > 90
    # Of the data, the page has all sources; Hydra's default is one of them.
    for key, value in leaves(config["data"]).items():
        if key != "_target_":
            assert f"### `data.{key}` (concepts)\n\n" in TEXT
            assert f"default `{value}`" in TEXT.split(f"### `data.{key}` (concepts)\n\n")[1].splitlines()[0]


def test_the_page_says_what_is_in_the_key() -> None:
    outside = {key: entry for key, entry in ENTRIES.items() if "not in the key:" in entry}
    assert {
        "name",
        "output_dir",
        "trainer.devices",
        "sae.ensemble",
        "data.num_workers",
        "logger.mode",
    } <= outside.keys()
    assert "trainer.precision" not in outside
    for key, entry in outside.items():
        [why] = [why for idle, why in NOT_COMPUTED.items() if key == idle or key.startswith(f"{idle}.")]
        assert f"not in the key: {why}" in entry


def test_every_file_of_settings_is_on_the_page() -> None:
    for group in groups():
        for file in choices(group):
            assert f"| `{file.partition('/')[2]}`" in TEXT


FILES = sorted(path.relative_to(conf_dir()).with_suffix("").as_posix() for path in conf_dir().rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES)
def test_comments_are_those_of_the_files_own_keys(file: str) -> None:
    assert {*comments(file)} - {""} <= {*leaves(read(file))}
    if file != "experiment/imagenette/vit":  # begins with what it needs
        assert comments(file)[""]


def test_a_comment_is_that_of_the_key_below_it() -> None:
    assert comments("sae/linear_l1")["k"] == (
        "Number of latents that may fire per image (topk, batch_topk, matryoshka).",
    )
    assert comments("cluster/slurm")["hydra.launcher.mem_gb"] == (
        "Memory of a job in GB; null: the cluster's default.",
    )
    assert "discover" not in comments("config")
    assert comments("config")["discover.threshold"][0].startswith("τ")


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (Annotated[int | None, ABOVE_ZERO, Unit("pixels")], "whole number (pixels), above 0, or null"),
        (Annotated[float, SHARE], "number, 0 to 1"),
        (Annotated[list[str], OneOf("a", "b")], "list of `a` and `b`"),
        (Annotated[Any, OneOf(True, "warn")], "`true` or `warn`, or null"),
        (Annotated[Any, ABOVE_ZERO, Takes("a path, or null")], "a path, or null"),
        (dict[str, float], "mapping from names to numbers"),
        (list[list[Any]], "list of lists"),
    ],
)
def test_types_in_words(hint: Any, text: str) -> None:
    assert type_of(hint) == text


def test_what_a_docstring_says_of_several_attributes() -> None:
    class Kind:
        """A kind.

        Attributes:
            one, two: of both
                lines. three: alone.
            four: last.
        """

    assert attributes(Kind) == {"one": "of both lines.", "two": "of both lines.", "three": "alone.", "four": "last."}


def test_what_is_code_is_marked() -> None:
    assert markdown(["One of {a: 1} (docs/saes.md), in <output_dir>/runs.", "  x    what x is", "After."]) == (
        "One of `{a: 1}` ([saes](saes.md)), in `<output_dir>/runs`.\n\n- `x`: what x is\n\nAfter."
    )
    assert sentence("see :class:`.base.Method`; ``[N, d]``.") == "See `base.Method`; `[N, d]`."
    assert (
        markdown(["Half ε/2 of `sae.k`; set +backbone.args.width=1."])
        == "Half ε/2 of `sae.k`; set `+backbone.args.width=1`."
    )

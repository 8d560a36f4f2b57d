"""W&B offline, read back from the files that wandb wrote with wandb's own reader, ``wandb leet inspect``."""

import json
import operator
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb

from salve.artifacts import Artifact, read_table, write_record, write_table
from salve.run.folder import RunFolder
from salve.run.lineage import artifact_name
from salve.run.schema import STAGES, LoggerSettings
from salve.run.tracking import Tracker, job_type_of, log_sweep_summary, run_name, wandb_id
from salve.sweep.jobs import make_runs
from salve.types import UserError
from tests.composing import settings
from tests.integration.commands import Command, Rank
from tests.integration.conftest import FEW, NARROW, SMALL, Start


def alone(module: str, *arguments: str, folder: Path, silent: bool = True) -> Command:
    """A process of its own, which does not share this one's wandb service."""
    environment = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": str(silent).lower()}
    return Command(module, list(arguments), folder, {**environment, wandb.env.SERVICE: None})


class Read:
    """One file of W&B's, as its reader prints it."""

    def __init__(self, path: Path) -> None:
        reader = alone("wandb", "leet", "inspect", "--json", str(path), folder=path.parent)
        said, errors = reader.communicate()
        assert reader.returncode == 0, errors
        self.records = [json.loads(line) for line in said.splitlines()]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self.records if record["type"] == kind]

    @property
    def run(self) -> dict[str, Any]:
        (found,) = self.of("run")
        return found

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.run["config"]["update"])

    @property
    def history(self) -> list[dict[str, Any]]:
        return [row["item"] for row in self.of("history")]

    def values(self, name: str) -> list[Any]:
        return [row[name] for row in self.history if name in row]

    @property
    def media(self) -> dict[str, str]:
        """Names of pictures and tables, and their types."""
        mark = "._type"
        return {key.removesuffix(mark): row[key] for row in self.history for key in row if key.endswith(mark)}

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for record in self.of("summary"):
            found |= record.get("update", {})
        return found

    @property
    def outputs(self) -> dict[str, dict[str, Any]]:
        """By type, what the run made; what it used carries a mark of its own."""
        return {a["type"]: a for a in self.of("artifact") if not a.get("use_after_commit")}

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        return {a["type"]: a for a in self.of("artifact") if a.get("use_after_commit")}


def files_in(folder: Path) -> list[Path]:
    """W&B's files in the order in which they were begun."""
    return sorted(folder.rglob("run-*.wandb"))


def read_only_one(folder: Path) -> Read:
    (file,) = files_in(folder)
    return Read(file)


@pytest.fixture(autouse=True)
def _no_run_is_left_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    assert wandb.run is None
    # Its address stands in the environment, which is put back after each test: the next one would not find it.
    wandb.teardown()


SETTINGS = LoggerSettings(kind="wandb", mode="offline", project="tests", tags=["paper"])
CONFIG = {
    "backbone": {"name": "resnet10t"},
    "data": {"_target_": "salve.data.ConceptsData"},
    "sae": {"sparsity": 2.0},
}


def tracker(folder: Path, settings: LoggerSettings = SETTINGS, **given: Any) -> Tracker:
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {"name": "sparsity=2", "group": "lambda", "job_type": "discover", "run_id": None} | given
    return Tracker(settings, folder, CONFIG, **chosen)


def stored(folder: Path, kind: str, reused: bool = False) -> Artifact:
    """A small artifact of a kind."""
    path = folder / kind / f"{kind}-key"
    path.mkdir(parents=True, exist_ok=True)
    write_record(path / "DONE.json", {"digest": f"digest of {kind}", "files": {}})
    if kind == "activations":
        write_record(path / "activations.json", {"site": "global_pool", "width": 4})
        (path / "train-00000.safetensors").write_bytes(b"large")
    if kind == "sae":
        write_record(path / "sae.json", {"fve": 0.75, "sparsity": 2.0})
        write_table(path / "history.csv", pd.DataFrame({"step": [5, 10], "fve": [0.5, 0.75]}))
    if kind == "control":
        (path / "edits").mkdir(exist_ok=True)
        write_record(path / "edits" / "00-church.json", {"alpha": 4.0})
    return Artifact(kind, f"{kind}-key", path, f"digest of {kind}", reused)


# -- whole runs


@pytest.mark.usefixtures("no_figures")
def test_offline_run_holds_config_curves_media_lineage_and_results(
    whole_run: tuple[Path, dict[str, Artifact]], start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    folder, artifacts = whole_run
    shutil.copytree(folder / "store", tmp_path / "store")
    # The classifier is found, so its curves are replayed; the SAE is trained, so its curves are logged as it goes.
    options = ["logger=wandb", "logger.mode=offline", "logger.group=mine", "logger.tags=[paper]", "sae.sparsity=2.0"]
    options += ["edit.modes=[suppress]", "validate.pictures=1"]
    made = start(tmp_path, *options)
    read = read_only_one(tmp_path / "run")

    assert {name: read.run[name] for name in ("project", "display_name", "run_group", "job_type", "tags")} == {
        **{"project": "salve", "display_name": "quickstart", "run_group": "mine", "job_type": "pipeline"},
        "tags": ["paper"],
    }
    assert read.config["sae"]["sparsity"] == 2.0
    assert read.config["backbone"]["name"] == "resnet10t"

    parts = len(artifacts["sae"].table("history.csv"))
    assert len(read.values("discover-fve")) == parts > 1
    assert read.values("discover-epoch")[-1] == parts - 1
    table = artifacts["classifier"].table("history.csv")
    expected = table.loc[table["split"] == "select", "accuracy"].tolist()
    assert read.values("finetune-select_accuracy") == expected
    assert read.values("finetune-epoch") == [0, 1]
    axes = {metric["glob_name"]: metric["step_metric"] for metric in read.of("metric") if "glob_name" in metric}
    assert axes == {"finetune-*": "finetune-epoch", "discover-*": "discover-epoch"}

    assert read.media["figures/control-suppress"] == "image-file"
    assert read.media["tables/control-summary"] == "table-file"
    assert read.media["explorer"] == "html-file"
    # Files are named by what they are of, so that a sync later finds them: spaces and # are lost on the way.
    assert all(re.fullmatch(r"[\w./-]+", name) for name in read.media)
    files = [path for path in (tmp_path / "run" / "wandb").rglob("media/**/*") if path.is_file()]
    assert files
    assert all(re.fullmatch(r"[\w.-]+", path.name) for path in files)
    assert read.outputs["explorer"]["name"] == "explorer-resnet10t-global_pool-concepts"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {name: read.summary[name] for name, value in metrics.items() if value is not None} == {
        name: value for name, value in metrics.items() if value is not None
    }

    assert set(read.inputs) == {"activations"}
    assert set(read.outputs) >= {"sae", "edit_file"}
    sae, edit_file = read.outputs["sae"], read.outputs["edit_file"]
    assert sae["name"] == "sae-resnet10t-global_pool-concepts"
    assert set(sae["aliases"]) == {"latest", made["sae"].key}
    assert json.loads(edit_file["metadata"])["made_from"] == {
        "activations": f"activations-resnet10t-global_pool-concepts:{made['activations'].key}",
        "sae": f"{sae['name']}:{made['sae'].key}",
    }
    everything = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in everything if secret.encode() in path.read_bytes()]


def test_runs_of_a_sweep_that_share_a_process_are_w_and_b_runs_of_their_own(tmp_path: Path) -> None:
    sweep, configs = tmp_path / "lambda", {}
    given = [*SMALL, *FEW, *NARROW, "stages=[discover]", "logger=wandb", "logger.mode=offline"]
    for key, sparsity in (("a" * 12, 1.0), ("b" * 12, 2.0)):
        configs[key] = settings(*given, f"output_dir={tmp_path / 'store'}", f"sae.sparsity={sparsity}")
        RunFolder(sweep / key).prepare(configs[key])
    plan = {key: {"swept": {"sae.sparsity": config.sae.sparsity}} for key, config in configs.items()}
    write_record(sweep / "sweep.json", {"name": "lambda", "runs": plan})
    # Their SAEs are trained at once, before either run begins: each gets the curves of its own.
    make_runs(sweep, list(configs))
    curves = {}
    for key, config in configs.items():
        read = read_only_one(sweep / key)
        assert {name: read.run[name] for name in ("run_id", "run_group", "job_type", "display_name")} == {
            **{"run_id": f"lambda-{key}", "run_group": "lambda", "job_type": "discover"},
            "display_name": f"sparsity={config.sae.sparsity:g}",
        }
        assert read.config["sae"]["sparsity"] == config.sae.sparsity
        record = json.loads((sweep / key / "manifest.json").read_text())["artifacts"]["sae"]
        sae = Path(config.output_dir) / "artifacts" / "sae" / record["key"]
        curves[key] = read.values("discover-fve")
        assert curves[key] == read_table(sae / "history.csv")["fve"].tolist()
        assert read.summary["fve"] == json.loads((sae / "sae.json").read_text())["fve"]
    assert len(set(map(tuple, curves.values()))) == 2
    # One of them is made again: it goes on in its own W&B run, where its curves already are.
    (sweep / ("a" * 12) / "manifest.json").unlink()
    make_runs(sweep, list(configs))
    again = Read(files_in(sweep / ("a" * 12))[1])
    assert (again.run["run_id"], again.run["resume"]) == (f"lambda-{'a' * 12}", True)
    assert again.values("discover-fve") == []
    assert len(files_in(sweep)) == 3


# -- one run per job


def test_serial_jobs_of_one_process_do_not_mix_nor_take_a_run_that_someone_else_opened(tmp_path: Path) -> None:
    quiet = wandb.Settings(console="off", silent=True)
    foreign = wandb.init(project="theirs", mode="offline", dir=str(tmp_path), id="foreign", settings=quiet)
    try:
        for i, succeeded in enumerate((False, True)):
            job = tracker(tmp_path / f"job{i}", name=f"sparsity={i}", run_id=wandb_id("lambda", f"key{i}"))
            try:
                job.logger("discover").log_metrics({"fve": i + 0.5}, step=0)
                job.log_results({}, {"fve": i + 0.5, "alpha_flip_median": None})
            finally:
                job.finish(succeeded)
        assert wandb.run is foreign
    finally:
        foreign.finish()
    for i in (0, 1):
        read = read_only_one(tmp_path / f"job{i}")
        assert read.run["run_id"] == f"lambda-key{i}"
        assert read.run["display_name"] == f"sparsity={i}"
        assert (read.run["run_group"], read.run["job_type"]) == ("lambda", "discover")
        assert read.values("discover-fve") == [i + 0.5]
        assert read.summary["fve"] == i + 0.5
        assert "alpha_flip_median" not in read.summary
        assert read.of("exit")[0].get("exit_code", 0) == 1 - i
    (theirs,) = (path for path in files_in(tmp_path) if "foreign" in path.name)
    assert Read(theirs).history == []


def test_the_group_that_the_user_sets_wins(tmp_path: Path) -> None:
    mine = LoggerSettings(kind="wandb", mode="offline", group="mine")
    tracker(tmp_path, mine).finish(True)
    assert read_only_one(tmp_path).run["run_group"] == "mine"


def log_and_be_killed(folder: Path) -> None:
    job = tracker(folder, run_id="lambda-key")
    job.logger("discover").log_metrics({"fve": 0.5, "epoch": 0}, step=0)
    while b"discover-fve" not in next(folder.rglob("run-*.wandb")).read_bytes():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_resumed_job_continues_its_run_and_no_curve_comes_twice(tmp_path: Path) -> None:
    killed = alone("tests.integration.test_wandb", str(tmp_path), folder=tmp_path)
    assert killed.wait(200) == -signal.SIGKILL
    # The next attempt: the SAE was whole before the kill, or another job has made it meanwhile.
    again = tracker(tmp_path, run_id="lambda-key")
    again.log_results({"sae": stored(tmp_path / "store", "sae", reused=True)}, {"fve": 0.75})
    again.finish(True)
    first, second = map(Read, files_in(tmp_path))
    for read in (first, second):
        assert read.run["run_id"] == "lambda-key"
        assert read.run["resume"] is True
    assert first.values("discover-fve") == [0.5]
    assert second.values("discover-fve") == []
    assert second.summary["fve"] == 0.75
    # `wandb sync` finds both parts in the run's folder.
    sync = ("wandb", "sync", "--dry-run", "--verbose", str(tmp_path / "wandb"))
    told = "".join(alone(*sync, folder=tmp_path, silent=False).communicate())
    assert "2 run(s)" in told


def test_a_logger_that_was_pickled_for_a_spawned_process_logs_into_the_same_run(tmp_path: Path) -> None:
    job = tracker(tmp_path)
    logger = job.logger("discover")
    log = operator.methodcaller("log_metrics", {"fve": 0.25}, 1)
    process = Rank(target=log, args=(logger,))
    process.start()
    process.join(200)
    assert process.exitcode == 0
    logger.log_metrics({"fve": 0.5}, step=2)
    job.finish(True)
    assert read_only_one(tmp_path).values("discover-fve") == [0.25, 0.5]


# -- lineage


@pytest.mark.parametrize(
    ("found", "inputs"),
    [((), set()), (("activations",), {"activations"}), (("activations", "sae"), {"activations", "sae"})],
)
def test_what_was_found_is_an_input_and_what_was_made_an_output(
    tmp_path: Path, found: tuple[str, ...], inputs: set[str]
) -> None:
    artifacts = {kind: stored(tmp_path / "store", kind, kind in found) for kind in ("activations", "sae", "control")}
    job = tracker(tmp_path / "run")
    job.log_results(artifacts, {})
    job.finish(True)
    read = read_only_one(tmp_path / "run")
    ours = {"activations", "sae", "edit_file"}
    assert set(read.inputs) == inputs
    assert set(read.outputs) & ours == ours - inputs
    every = read.inputs | read.outputs
    kinds = {"activations": "activations", "sae": "sae", "edit_file": "control"}
    for type_, kind in kinds.items():
        assert every[type_]["name"] == f"{type_}-resnet10t-global_pool-concepts"
        assert set(every[type_]["aliases"]) == {"latest", f"{kind}-key"}
        metadata = json.loads(every[type_]["metadata"])
        assert (metadata["key"], metadata["digest"]) == (f"{kind}-key", f"digest of {kind}")
    contents = {type_: {f["path"] for f in every[type_]["manifest"]["contents"]} for type_ in ours}
    assert contents == {
        "activations": {"activations.json", "DONE.json"},  # the manifest, without the activations themselves
        "sae": {"sae.json", "DONE.json", "history.csv"},
        "edit_file": {"00-church.json"},
    }
    # Nothing is copied aside: the store's files are uploaded from where they are.
    places = {Path(f["local_path"]) for type_ in ours for f in every[type_]["manifest"]["contents"]}
    assert all((tmp_path / "store") in place.parents for place in places)
    assert json.loads(every["sae"]["metadata"])["fve"] == 0.75


def test_one_content_has_one_version_whoever_logs_it(tmp_path: Path) -> None:
    digests = []
    for i in range(2):
        job = tracker(tmp_path / f"run{i}")
        job.log_results({kind: stored(tmp_path / "store", kind, i > 0) for kind in ("activations", "sae")}, {})
        job.finish(True)
        read = read_only_one(tmp_path / f"run{i}")
        digests.append((read.outputs if i == 0 else read.inputs)["sae"]["digest"])
    assert digests[0] == digests[1]


# -- the sweep's summary


def test_the_summary_is_one_run_with_the_table_and_the_pictures(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    (tmp_path / "figures").mkdir()
    pictures = [tmp_path / "figures" / f"fve-l0.{suffix}" for suffix in ("png", "svg")]
    for path in pictures:
        Figure().savefig(path)
    columns = {"run": ["a", "b"], "sae.k": [None, 4], "fve": [0.5, 0.75], "l0": [10.0, float("nan")]}
    table = pd.DataFrame(columns)
    for _ in range(2):  # a sweep that is started again updates its summary
        log_sweep_summary(SETTINGS, "lambda", tmp_path, table, pictures)
    first, second = map(Read, files_in(tmp_path))
    for read in (first, second):
        assert read.run["run_id"] == wandb_id("lambda", "summary")
        assert (read.run["run_group"], read.run["job_type"]) == ("lambda", "summary")
        assert read.media == {"sweep": "table-file", "figures/fve-l0": "image-file"}
        assert (read.summary["runs"], read.summary["fve/max"], read.summary["l0/mean"]) == (2, 0.75, 10.0)
    logged = [json.loads(path.read_text()) for path in tmp_path.rglob("*.table.json")]
    assert [t["columns"] for t in logged] == [list(columns)] * 2
    assert logged[0]["data"] == [["a", None, 0.5, 10.0], ["b", 4.0, 0.75, None]]
    log_sweep_summary(LoggerSettings(kind="csv"), "lambda", tmp_path / "none", table, pictures)
    assert not (tmp_path / "none").exists()


# -- names and refusals


def test_names_of_jobs_runs_and_artifacts() -> None:
    assert job_type_of(["discover"]) == "discover"
    assert job_type_of(["diagnose", "control"]) == "control+diagnose"
    assert job_type_of(list(reversed(STAGES))) == "pipeline"
    assert run_name({"sae.sparsity": 2.0, "sae.seed": 1, "seed": 0}) == "sparsity=2 sae.seed=1 seed=0"
    assert run_name({}) == run_name(None) == ""
    assert wandb_id("λ-sweep: a/b", "0123456789ab") == "sweep-a-b-0123456789ab"
    assert artifact_name("sae", "vit_base_patch16.augreg", "blocks.11/mlp", "folder") == (
        "sae-vit_base_patch16.augreg-blocks.11-mlp-folder"
    )
    assert len(artifact_name("sae", "x" * 200)) == 128


def test_a_start_that_fails_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.errors.UsageError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"cannot be started \(api_key not configured.*logger.mode=offline"):
        tracker(tmp_path)


if __name__ == "__main__":
    log_and_be_killed(Path(sys.argv[1]))

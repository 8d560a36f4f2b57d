"""W&B offline, read back from the file that wandb wrote.

wandb no longer ships a reader for Python, so the framing (LevelDB's log format) is read here; the records in it are
parsed by wandb's own protobuf classes.
"""

import json
import shutil
import struct
from pathlib import Path

import wandb
from wandb.proto import wandb_internal_pb2

from salve.artifacts import Artifact
from tests.integration.conftest import Start

BLOCK, HEADER = 32768, 7
FULL, FIRST, LAST = 1, 2, 4


def records(folder: Path) -> list[wandb_internal_pb2.Record]:
    (file,) = folder.rglob("run-*.wandb")
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    found, parts, at = [], b"", HEADER
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # too little room for a header: the rest of the block is padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + HEADER])
        if kind == 0:
            break
        payload = data[at + HEADER : at + HEADER + length]
        parts = payload if kind in (FULL, FIRST) else parts + payload
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
        at += HEADER + length
    return found


def history(found: list[wandb_internal_pb2.Record]) -> list[dict[str, object]]:
    rows = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    return [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in row.item} for row in rows]


def test_offline_run_holds_config_curves_media_and_artifacts(
    whole_run: tuple[Path, dict[str, Artifact]], start: Start, tmp_path: Path, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    secret = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    folder, artifacts = whole_run
    shutil.copytree(folder / "store", tmp_path / "store")
    # The classifier is found, so its curves are replayed; the SAE is trained, so its curves are logged as it goes.
    start(tmp_path, "logger=wandb", "logger.mode=offline", "logger.group=tests", "sae.sparsity=2.0")
    assert wandb.run is None  # closed, so that the next job of this process starts its own
    found = records(tmp_path / "run")

    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name, run.run_group) == ("salve", "quickstart", "tests")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["sae"]["sparsity"] == 2.0
    assert config["backbone"]["name"] == "resnet10t"

    rows = history(found)
    fve = [row["discover-fve"] for row in rows if "discover-fve" in row]
    accuracy = [row["finetune-val_accuracy"] for row in rows if "finetune-val_accuracy" in row]
    assert len(fve) == 3
    table = artifacts["classifier"].table("history.csv")
    assert accuracy == table.loc[table["split"] == "val", "accuracy"].tolist()

    media = {key for row in rows for key in row}
    assert any(key.startswith("figures/") for key in media)
    assert "tables/control-summary" in media, media
    logged = {
        record.request.log_artifact.artifact.type or record.artifact.type
        for record in found
        if record.WhichOneof("record_type") in ("artifact", "request")
    }
    assert {"sae", "recipe"} <= logged
    everything = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in everything if secret.encode() in path.read_bytes()]

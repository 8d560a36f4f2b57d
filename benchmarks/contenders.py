"""The contenders of ``training.py``, and the processes that they run in."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from environments import environment
from peers.contender import MARK

from salve.types import UserError

SCRIPTS = Path(__file__).parent / "peers"
LOGS = Path("outputs/benchmarks/logs")


class Contender(NamedTuple):
    """A library, or a way to train.

    Attributes:
        name: in tables.
        script: file in ``peers``. argument: of the script.
        requirements: packages of its environment; none if it runs in this one.
        bf16: devices on which it has a mixed precision of its own.
    """

    name: str
    script: str
    argument: str = ""
    requirements: tuple[str, ...] = ()
    bf16: tuple[str, ...] = ("cpu", "cuda")

    @property
    def is_peer(self) -> bool:
        """Whether it is another library."""
        return bool(self.requirements)


BARE = Contender("bare loop", "train_bare.py")
FUSED = Contender("bare loop, fused Adam", "train_bare.py", "fused")
SALVE = Contender("salve", "train_salve.py")
STARTED = Contender("salve, start=data", "train_salve.py", "data")
LOOPED = Contender("salve without Trainer", "train_salve.py", "loop")
CONTENDERS = (
    BARE,
    FUSED,
    SALVE,
    STARTED,
    LOOPED,
    Contender("overcomplete", "train_overcomplete.py", "", ("overcomplete==0.3.0",)),
    Contender(
        "dictionary-learning",
        "train_dictionary_learning.py",
        requirements=("dictionary-learning==0.1.0",),
        bf16=("cuda",),
    ),
    Contender("sae-lens", "train_sae_lens.py", "", ("sae-lens==6.54.12",)),
    Contender("eai-sparsify", "train_sparsify.py", "", ("eai-sparsify==1.3.3",), bf16=("cuda",)),
    Contender("saev", "train_saev.py", "", ("saev==0.1.0",), bf16=()),
)


class GoneError(Exception):
    """A contender cannot take part; the message says why."""


@dataclass
class Child:
    """A contender's process; it is idle unless it has an order.

    Attributes:
        precision: ``fp32`` or ``bf16``. process: started by :meth:`start`.
        lost: why the process cannot be used any more; empty if it can.
        facts: version of torch and number of threads, once it is ready.
        here: run it in this Python, which must have what the contender requires.
    """

    contender: Contender
    precision: str
    process: "subprocess.Popen[str] | None" = None
    lost: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    here: bool = False

    @property
    def name(self) -> str:
        """The contender's name with the precision."""
        return f"{self.contender.name}, {self.precision}"

    @property
    def log(self) -> Path:
        """The file that takes its library's output."""
        return LOGS / f"{self.name.replace(' ', '-').replace(',', '')}.log"

    def last_words(self, lines: int = 20) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text().splitlines()[-lines:]) if self.log.is_file() else ""

    def start(self) -> None:
        """Start the process, in the contender's environment, which is made if it is not there."""
        try:
            asked = self.contender.requirements
            python = environment(self.contender.name, asked) if asked and not self.here else Path(sys.executable)
        except UserError as error:
            self.lost = str(error)
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [str(python), str(SCRIPTS / self.contender.script), self.contender.argument]
        # Nothing is fetched or reported at run time.
        quiet = os.environ | {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("w") as log:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=quiet)

    def ready(self) -> None:
        """Wait until it takes orders."""
        if self.lost or self.facts:
            return
        with suppress(GoneError):  # remembered
            self.facts = self._answer()

    def order(self, **what: Any) -> dict[str, Any]:
        """Send an order and return the answer.

        Raises:
            GoneError: the contender refuses the cell, or its process has ended.
        """
        self.ready()
        if self.lost:
            raise GoneError(self.lost)
        assert self.process is not None
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which the missing answer shows
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """End the process."""
        if self.process is not None and self.process.stdin is not None:
            with suppress(BrokenPipeError):  # it has ended already
                self.process.stdin.close()
            self.process.wait()

    def _answer(self) -> dict[str, Any]:
        """Read the next line with a mark; libraries print other lines."""
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
                if "refused" in answer:
                    raise GoneError(answer["refused"])
                return answer
        said = self.log.read_text().strip().splitlines() or ["no message"]
        self.lost = f"its process ended: {said[-1]} ({self.log})"
        raise GoneError(self.lost)

"""An installed Chromium, driven by its own protocol through two pipes: no driver and no further package is needed."""

import fcntl
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
#: The browser itself; None where none is installed.
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
OPTIONS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-pipe",
        "--no-first-run",
        "--disable-extensions",
    ),
    *("--disable-background-networking", "--disable-component-update"),
    *("--disable-dev-shm-usage", "--mute-audio"),
)


class Failed(Exception):
    """A script on the page raised, or the browser refused a command."""


class Browser:
    """A browser without a window; ``with Browser() as browser``.

    Attributes:
        downloads: the folder of what pages save.
    """

    def __init__(self) -> None:
        assert CHROMIUM is not None, "the caller asks first"
        self._folder = Path(tempfile.mkdtemp(prefix="salve-browser-"))
        self.downloads = self._folder / "downloads"
        self.downloads.mkdir()
        # The browser reads commands from its descriptor 3 and answers to 4.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for pair in (os.pipe(), os.pipe()) for end in pair]
        theirs, self._to, self._from, answers = ends
        null = os.open(os.devnull, os.O_RDWR)
        actions = [
            *((os.POSIX_SPAWN_DUP2, theirs, 3), (os.POSIX_SPAWN_DUP2, answers, 4)),
            *((os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, null, 2)),
        ]
        arguments = [CHROMIUM, *OPTIONS, f"--user-data-dir={self._folder / 'profile'}", "about:blank"]
        self._process = os.posix_spawn(CHROMIUM, arguments, os.environ, file_actions=actions, setpgroup=0)
        for end in (theirs, answers, null):
            os.close(end)
        self._unread = b""
        self._last = 0
        self.events: list[dict[str, Any]] = []
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.send("Browser.close")
        except (OSError, Failed):
            os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._folder, ignore_errors=True)

    def send(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Send a command, and wait for its answer; what else the browser says goes to :attr:`events`."""
        self._last += 1
        of = {"sessionId": session} if session else {}
        message = {"id": self._last, "method": method, "params": parameters, **of}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                break
            self.events.append(answer)
        if "error" in answer:
            raise Failed(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            more = os.read(self._from, 1 << 20)
            if not more:
                raise Failed("The browser has ended.")
            self._unread += more
        message, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(message))

    def open(self, path: Path, fragment: str = "") -> "Tab":
        """Open a page from the disk, and wait until it says that it is ready."""
        return Tab(self, path.resolve().as_uri() + fragment)


class Tab:
    """A page in a browser."""

    def __init__(self, browser: Browser, address: str) -> None:
        self._browser = browser
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.go(address)

    def go(self, address: str) -> None:
        """Load an address."""
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && document.documentElement.dataset.ready === 'true'")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command to the page."""
        return self._browser.send(method, self._session, **parameters)

    def __call__(self, script: str) -> Any:
        """The value of an expression on the page, perhaps of a promise.

        Raises:
            Failed: it raises.
        """
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise Failed(str(details.get("exception", {}).get("description", details["text"])))
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 20) -> None:
        """Wait until an expression is true."""
        self(
            f"new Promise((done, fail) => {{ const end = Date.now() + {1000 * seconds}; (function look() {{"
            f" if ({script}) done(true);"
            f" else if (Date.now() > end) fail(new Error('still not: ' + {json.dumps(script)}));"
            " else setTimeout(look, 20); })(); })"
        )

    def reports(self, *methods: str) -> list[dict[str, Any]]:
        """What the browser has reported of the page, of some kinds."""
        own = (event for event in self._browser.events if event.get("sessionId") == self._session)
        return [dict(event["params"]) for event in own if event["method"] in methods]

    @property
    def complaints(self) -> list[str]:
        """Exceptions that nothing caught, and errors in the log, such as what the security policy refused."""
        self("0")  # what was reported before this is read now
        thrown = [str(found["exceptionDetails"]) for found in self.reports("Runtime.exceptionThrown")]
        logged = [found["entry"] for found in self.reports("Log.entryAdded")]
        return thrown + [str(entry["text"]) for entry in logged if entry["level"] == "error"]

    @property
    def requests(self) -> list[str]:
        """Addresses that the page has asked for, but for itself and what lies in it."""
        sent = [found["request"]["url"] for found in self.reports("Network.requestWillBeSent")]
        return [url for url in sent if not url.startswith(("data:", "blob:", "about:")) and "explorer" not in url]

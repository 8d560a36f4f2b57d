"""How large the explorer is, how soon it paints, and how fast it follows a slider, in the installed Chromium.

    python -m benchmarks.explorer                      # 10 classes × 500 images × 256 latents of 512 channels
    python -m benchmarks.explorer --classes 100 --images 100

The data are random, of the shape and the sizes that a ResNet-18's are. Slider: from the event to the finished layout,
while one latent goes through all stops, forwards and in leaps.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from salve.report.explorer.page import write_explorer
from tests.browser import CHROMIUM, NAMES, Browser, Tab
from tests.explored import write_artifacts

#: One step of the slider, to a stop, and the finished layout.
STEP = """
(() => {
  const slider = document.querySelector('#edits input[type=range]');
  slider.value = %d;
  slider.dispatchEvent(new Event('input', { bubbles: true }));
  return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
})()
"""
#: Moves one latent's slider through all stops, and gives the milliseconds of each step.
MOVES = """
(async () => {
  const slider = document.querySelector('#edits input[type=range]'), took = [];
  const pressed = performance.now();
  slider.dispatchEvent(new Event('pointerdown'));
  const press = [performance.now() - pressed];
  const to = (stop) => {
    const start = performance.now();
    slider.value = stop;
    slider.dispatchEvent(new Event('input', { bubbles: true }));
    explorer.redraw();
    document.body.getBoundingClientRect();
    took.push(performance.now() - start);
    return new Promise(requestAnimationFrame);
  };
  for (let stop = 0; stop <= 400; stop += 4) await to(stop);
  const steps = took.splice(0);
  for (let i = 0; i < 40; i++) await to((i * 167) % 401);
  return { press, steps, leaps: took };
})()
"""


def _spent(tab: Tab, stop: int) -> float:
    """Milliseconds of the page's thread for one step."""

    def so_far() -> float:
        return next(
            one["value"] for one in tab.send("Performance.getMetrics")["metrics"] if one["name"] == "TaskDuration"
        )

    before = so_far()
    tab(STEP % stop)
    return 1000 * (so_far() - before)


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("classes", 10), ("images", 500), ("latents", 256), ("width", 512)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"how many; {default} if not given")
    given = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit(
            f"No browser is installed under any of the names {', '.join(NAMES)}: apt-get install chromium."
        )
    with tempfile.TemporaryDirectory() as temporary, Browser() as browser:
        artifacts = write_artifacts(
            Path(temporary) / "artifacts", given.classes, given.images, given.latents, given.width
        )
        start = time.perf_counter()
        path = write_explorer(Path(temporary), artifacts, title="benchmark")
        assert path is not None
        print(f"{given.classes} classes × {given.images} images × {given.latents} latents, {given.width} channels")
        print(f"written in {time.perf_counter() - start:.1f} s: {path.stat().st_size / 1e6:.2f} MB")
        tab = browser.open(path)
        print(f"browser: {browser.send('Browser.getVersion')['product']}")
        for note in tab("explorer.data.notes"):
            print(f"thinned: {note}")
        paint = tab("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        ready = tab("performance.getEntriesByName('ready')[0].startTime")
        print(f"first paint {paint:.0f} ms, ready {ready:.0f} ms")
        tab("document.querySelectorAll('#list button')[7].click()")  # another latent, for which nothing is prepared
        tab.send("Performance.enable", timeDomain="threadTicks")
        moves = tab(MOVES)
        for name, found in moves.items():
            high, longest = np.quantile(found, 0.95), max(found)
            print(f"slider, {name}: median {np.median(found):.1f} ms, 95 % {high:.1f} ms, longest {longest:.1f} ms")
        # What other programs take from the page does not count here, so that the longest is of the page itself.
        spent = [_spent(tab, stop) for stop in [*range(0, 401, 4), *(i * 167 % 401 for i in range(40))]]
        print(
            "slider, CPU time of the page's thread for a step, until it is painted: "
            f"median {np.median(spent):.1f} ms, 95 % {np.quantile(spent, 0.95):.1f} ms, longest {max(spent):.1f} ms"
        )
        print(json.dumps({"images": tab("explorer.tail.N"), "requests": tab.requests, "complaints": tab.complaints}))


if __name__ == "__main__":
    main()

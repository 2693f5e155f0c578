"""One process of the race for a cold layer: waits for the others, calls, says what it had to do."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from problems import random_problem

from moejit import runtime
from moejit.runtime import events


def main(barrier: Path, racers: int, name: str) -> None:
    problem = random_problem(4, 256, 128, 4, 2)
    call = runtime.moe_nvfp4  # imports torch now, so that only the call itself is left
    (barrier / name).touch()
    while len(list(barrier.iterdir())) < racers:
        time.sleep(0.01)
    call(**problem)
    counts = {kind: counter.count for kind, counter in events.counters().items()}
    sys.stdout.write(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

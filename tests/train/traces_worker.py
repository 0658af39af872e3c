"""Makes traces in many small shards, as a program that a test can kill: FOLDER WORKERS."""

import sys
from pathlib import Path

from vrthinker.train import traces
from vrthinker.world.nano import nano_settings, nano_templates
from vrthinker.world.oracle import BehaviorMix

SOURCE = traces.WorldTraces(
    pairs=24,
    seed=5,
    calls=2,
    mix=BehaviorMix(oracle=0.5, random_frames=0.3, immediate=0.2),
    filter=False,
)
SHARD_PAIRS = 3

if __name__ == "__main__":
    traces._SHARD_PAIRS = SHARD_PAIRS
    made = traces.make_traces(
        SOURCE, Path(sys.argv[1]), nano_settings(), nano_templates(), seed=7, workers=int(sys.argv[2])
    )
    sys.stdout.write(f"{len(made)}\n")

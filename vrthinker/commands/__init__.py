"""The commands that `vrthinker.cli` gathers, a file a room; like it, they load nothing heavy until run."""

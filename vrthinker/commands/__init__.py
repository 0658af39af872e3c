"""The commands of `vrthinker.cli`, one file each. They load nothing heavy until they run."""

"""The CPU reader, which uses PyAV, whose wheel contains FFmpeg."""

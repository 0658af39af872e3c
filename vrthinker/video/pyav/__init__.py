"""The CPU reader: PyAV, whose wheel carries FFmpeg."""

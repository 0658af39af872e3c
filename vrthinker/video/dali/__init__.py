"""The reader that uses NVIDIA DALI: on a GPU its hardware decoder, on a CPU for VP8, VP9 and MJPEG only.

Importing this package does not load DALI. Decoding the first clip does.
"""

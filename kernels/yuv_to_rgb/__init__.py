"""`yuv_to_rgb`: decoded pictures in 4:2:0 to RGB with FFmpeg's exact bits, for readers on a CPU."""

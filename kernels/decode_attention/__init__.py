"""`decode_attention`: attention of one new token per sequence over a cache, for engines that run on a CPU."""

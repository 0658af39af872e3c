"""Loads what judging and training load, so that no file's first test pays for everybody's imports."""

from __future__ import annotations

import importlib

for _module in (
    "torch._dynamo",  # by an optimizer's first step
    "vrthinker.engine.hf.engine",
    "vrthinker.engine.hf.tiny",
    "vrthinker.evals.world_table",
    "vrthinker.judge_file",
    "vrthinker.report.terminal",
    "vrthinker.train.cold_start",
    "vrthinker.video.pyav.reader",
    "transformers.models.auto.image_processing_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
):
    importlib.import_module(_module)

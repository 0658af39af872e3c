"""The demo: a tiny random checkpoint judges two generated clips, to show the machinery at work.

Nothing is downloaded. The checkpoint's weights are random, so its verdict is random, and everything that
prints it says so.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.settings import PROMPTS_FOLDER, SETTINGS_FILE, EpisodeSettings, JudgeSettings
from vrthinker.video.resize import ResizeSettings

if TYPE_CHECKING:
    import numpy as np

    from vrthinker.judge import Judge

Family = Literal["qwen2.5-vl", "qwen3-vl"]

RANDOM_NOTE = "random weights: the verdict is random"
DEMO_CAPTION = "A red ball rolls from left to right across a wooden floor."
_PATCH_SIZES = {"qwen2.5-vl": 14, "qwen3-vl": 16}


def make_tiny_judge(out: Path, family: Family, seed: int = 0) -> Path:
    """Writes a tiny random checkpoint with tokenizer, processor, judge settings and prompt templates.

    Its rounds are guided (`EpisodeSettings.guided`): random weights do not hold the form by themselves.

    Args:
        out: A folder that does not exist yet or is empty.
        family: Which transformers class.
        seed: Of the weights; equal seeds give equal files.

    Raises:
        InputError: The folder holds something.
    """
    from vrthinker.engine.hf.tiny import make_tiny

    folder = make_tiny(out, family, seed)
    patch = _PATCH_SIZES[family]
    settings = JudgeSettings(
        resize=ResizeSettings(
            patch_size=patch, merge_size=2, min_pixels=(2 * patch) ** 2, max_pixels=16 * (2 * patch) ** 2
        ),
        episode=EpisodeSettings(guided=True, max_rounds=3, max_round_tokens=256),
        note=RANDOM_NOTE,
    )
    PromptTemplates.load().save(folder / PROMPTS_FOLDER)
    (folder / SETTINGS_FILE).write_text(settings.model_dump_json(indent=2) + "\n", "utf-8")
    return folder


def make_clips(folder: Path) -> tuple[Path, Path]:
    """Writes two H.264 clips of one caption; in the second one the ball jumps and loses its colour.

    Returns:
        Their paths.
    """
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / "video_1.mp4", folder / "video_2.mp4")
    for index, (path, n_frames, fps) in enumerate(zip(paths, (48, 40), (24, 20), strict=True)):
        rng = np.random.default_rng(index)
        _encode(path, [_picture(t / n_frames, index == 1, rng) for t in range(n_frames)], fps)
    return paths


def prepare_demo(out: Path) -> tuple[Judge, Path, Path]:
    """Prepares the demo in a folder: the judge and the two clips."""
    from vrthinker.judge import Judge

    model = out / "tiny-random-judge"
    if not (model / SETTINGS_FILE).is_file():
        make_tiny_judge(model, "qwen2.5-vl")
    video_1, video_2 = make_clips(out)
    return Judge.from_pretrained(model, device="cpu", temperature=1.0), video_1, video_2


def _picture(progress: float, flawed: bool, rng: np.random.Generator) -> np.ndarray:
    """One frame, uint8 `[160, 240, 3]`: a floor, and a ball on its way."""
    import numpy as np

    height, width, radius = 160, 240, 18
    rows, columns = np.mgrid[:height, :width]
    floor = np.where((rows // 20 + columns // 60) % 2 == 0, 168, 150)
    image = np.stack([floor, floor * 0.75, floor * 0.5], axis=-1)
    in_event = flawed and 0.55 < progress < 0.7
    centre = (110 - (40 if in_event else 0), 20 + progress * (width - 40))
    ball = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
    image[ball] = (70, 90, 200) if in_event else (205, 40, 35)
    image += rng.normal(0, 30 if in_event else 3, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def _encode(path: Path, pictures: list[np.ndarray], fps: int) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        # The same file every time: x264's look-ahead and its choice of threads are not reproducible.
        stream.options = {"crf": "18", "preset": "ultrafast"}
        stream.codec_context.thread_count = 1
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())

"""Videos and numbered items in the layout: what is one item, which slots are frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from tests.families import DECODER, IMAGE_TOKEN, PINPOINTS, VIDEO_TOKEN, build, spread_weights, token_types
from torch import Tensor

import foveate
from foveate.engine.families.parts import resolve
from foveate.engine.layout import build_layout


def _video_prompt(name: str, ids: list[int], **pixels: Tensor) -> dict[str, Tensor]:
    row = torch.tensor([[1, 5, 6, *ids, 8, 9, 10]])
    return {"input_ids": row, "attention_mask": torch.ones_like(row), **token_types(name, row), **pixels}


class TestVideos:
    """A video is one item, its frames are blocks; what shows no patch is a newline slot."""

    @pytest.mark.parametrize(
        ("name", "slots", "newlines"), [("llava_onevision", 17, [16]), ("llava_next_video", 16, [])]
    )
    @torch.no_grad()
    def test_pooled_frames(self, name: str, slots: int, newlines: list[int]):
        model = _video_model(name)
        prompt = _video_prompt(name, [VIDEO_TOKEN] * slots, pixel_values_videos=torch.randn(1, 4, 3, 32, 32))
        with foveate.apply(model, foveate.Random(keep=5)) as session:
            model(**prompt)
        ((video,),) = session.trace.layout.images
        assert video.known
        assert [(block.kind, block.grid) for block in video.blocks] == [("frame", (2, 2))] * 4
        assert torch.cat([block.slots for block in video.blocks]).tolist() == list(range(3, 19))
        assert (video.newline - 3).tolist() == newlines

    @torch.no_grad()
    def test_whole_frames_with_class_tokens(self):
        model = _video_model("video_llava")
        prompt = _video_prompt("llava", [VIDEO_TOKEN] * 34, pixel_values_videos=torch.randn(1, 2, 3, 32, 32))
        with foveate.apply(model, foveate.Random(keep=5)) as session:
            model(**prompt)
        ((video,),) = session.trace.layout.images
        assert [(block.kind, block.grid) for block in video.blocks] == [("frame", (4, 4))] * 2
        assert (video.newline - 3).tolist() == [0, 17]

    @pytest.mark.parametrize(
        ("name", "slots", "left"), [("llava_onevision", 17, 5), ("llava_next_video", 16, 4), ("video_llava", 68, 20)]
    )
    @torch.no_grad()
    def test_evs_removes_the_still_frames(self, name: str, slots: int, left: int):
        """The first frame stays, and slots that show no patch (OneVision's newline, Video-LLaVA's class tokens)."""
        model = _video_model(name)
        still = torch.randn(1, 1, 3, 32, 32).repeat(1, 4, 1, 1, 1)
        prompt = _video_prompt(name, [VIDEO_TOKEN] * slots, pixel_values_videos=still)
        with foveate.apply(model, foveate.EVS(keep=0.25)) as session:
            model(**prompt)
        assert session.trace.visual_tokens[0, 0] == left

    @torch.no_grad()
    def test_an_image_beside_a_video(self):
        model = _video_model("video_llava")
        prompt = _video_prompt(
            "llava", [IMAGE_TOKEN] * 16 + [7] + [VIDEO_TOKEN] * 34,
            pixel_values_images=torch.randn(1, 3, 32, 32), pixel_values_videos=torch.randn(1, 2, 3, 32, 32),
        )  # fmt: skip
        with foveate.apply(model, foveate.Random(keep=0.5)) as session:
            model(**prompt)
        ((image, video),) = session.trace.layout.images
        assert [block.kind for block in (*image.blocks, *video.blocks)] == ["base", "frame", "frame"]


class TestFramesBetweenTimeStamps:
    """Gemma 4, Molmo 2: each frame is a run of slots; how long a video is, its features say."""

    def layout(self, features: list[int], frames: list[list[int]], copies: int = 1) -> Any:
        """Rows of frames of so many tokens, a time stamp before each; every row `copies` times."""
        rows = [[s for length in row for s in (0, *[1] * length)] for row in frames for _ in range(copies)]
        length = max(map(len, rows))
        slots = torch.tensor([[0] * (length - len(row)) + row for row in rows]) > 0
        videos = [torch.zeros(length, 64) for length in features]
        info = {"pixel_values_videos": torch.zeros(9, 4, 4), "video_features": videos}
        return build_layout(resolve(build("gemma3")), slots, info)

    @pytest.mark.parametrize("copies", [1, 3])
    def test_two_videos_in_a_row_and_one(self, copies: int):
        layout = self.layout([27, 18, 20], [[9, 9, 9, 9, 9], [10, 10]], copies)
        assert layout.known
        assert layout.image_counts.tolist() == [2] * copies + [1] * copies
        first, second, third = layout.images[0] + layout.images[copies]
        assert [(block.kind, block.grid) for block in first.blocks] == [("frame", (3, 3))] * 3
        assert [block.kind for block in second.blocks] == ["frame"] * 2
        assert [(block.grid, block.box) for block in third.blocks] == [((1, 10), None)] * 2  # nobody knows the sides

    @pytest.mark.parametrize(("features", "frames"), [([20], [[9, 9]]), ([9, 9], [[9, 9]]), ([18], [[10, 8]])])
    def test_what_does_not_add_up_is_a_guess(self, features: list[int], frames: list[list[int]]):
        """Features longer than the frames; frame by frame, so that they may be of any video; frames of two sizes."""
        assert not self.layout(features, frames).known


def _video_model(name: str) -> Any:
    if name == "llava_onevision":
        return build(name)
    config = {"vision_config": build("llava").config.vision_config, "text_config": hf.LlamaConfig(**DECODER)}
    config |= {"image_token_index": IMAGE_TOKEN, "video_token_index": VIDEO_TOKEN}
    if name == "video_llava":
        return spread_weights(hf.VideoLlavaForConditionalGeneration(hf.VideoLlavaConfig(**config)))
    config = hf.LlavaNextVideoConfig(**config, image_grid_pinpoints=PINPOINTS)
    return spread_weights(hf.LlavaNextVideoForConditionalGeneration(config))


class TestItems:
    """`items` says which images are one item; what it does not contradict stays as the inputs say."""

    def layout(self, items: list[int], visual: list[int] | None = None) -> Any:
        model = build("internvl")
        numbers = torch.tensor([items])
        slots = numbers > 0 if visual is None else torch.tensor([visual]) > 0
        features = torch.zeros(int(slots.sum()) // 16, 16, 64)
        return build_layout(resolve(model), slots, {"image_features": features}, numbers)

    def test_frames_become_one_video(self):
        layout = self.layout([0, *[1] * 16, 0, *[1] * 16, 0, 0, *[2] * 16])
        video, image = layout.images[0]
        assert layout.image_counts.tolist() == [2]
        assert [(block.kind, block.grid) for block in video.blocks] == [("frame", (4, 4))] * 2
        assert [(block.kind, block.grid) for block in image.blocks] == [("base", (4, 4))]
        assert video.known
        assert layout.image_index[0].tolist() == [-1, *[0] * 16, -1, *[0] * 16, -1, -1, *[1] * 16]

    def test_an_image_with_two_numbers_is_two_items(self):
        layout = self.layout([0, *[1] * 8, *[2] * 8])
        assert layout.image_counts.tolist() == [2]
        assert not layout.known

    @torch.no_grad()
    def test_a_budget_in_tokens_is_per_item(self):
        model = build("internvl")
        prompt = _video_prompt("internvl", ([IMAGE_TOKEN] * 16 + [7]) * 3, pixel_values=torch.randn(3, 3, 64, 64))
        items = (prompt["input_ids"] == IMAGE_TOKEN).long()
        items[:, 38:] *= 2
        for numbers, count in ((None, 12), (items, 8), (items.clamp_max(1), 4)):
            with foveate.apply(model, foveate.Random(keep=4), visual=numbers) as session:
                model(**prompt)
            assert session.trace.visual_tokens[0, -1] == count

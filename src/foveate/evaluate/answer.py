"""A model that answers: loading, prompts, batches of equal shape, greedy generation."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..engine.apply import apply
from ..engine.families.parts import resolve
from ..engine.session import Session
from ..ops.logits import has_softmax
from ..reduction import Reducer, UnsupportedError
from .data import Sample, size_of, video_of
from .videos import Video

__all__ = [
    "VLM",
    "Answers",
    "Batch",
    "ModelError",
    "answer",
    "batches",
    "check_device",
    "groups",
    "load",
    "loading",
    "prefill_seconds",
    "quiet",
]

ZOO = "zoo:"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelError(ValueError):
    """A model cannot be loaded or cannot see images. The message names it."""


@dataclass
class VLM:
    """A vision-language model with its processor, in eval mode.

    Attributes:
        name: as the user gave it.
        model: any `*ForConditionalGeneration` of transformers.
        processor: its processor; pads on the left.
    """

    name: str
    model: nn.Module
    processor: Any

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def sees_videos(self) -> bool:
        """Whether its processor takes videos; else frames go in as images."""
        return getattr(self.processor, "video_processor", None) is not None

    def prompt(self, question: str, video: Video | None = None) -> str:
        """One user turn with one image, or with a video, ready for generation.

        The processor's chat template writes it; a processor without one gets LLaVA-1.5's form,
        `USER: <image>\\n{question} ASSISTANT:`, with the processor's own image token. Where the processor takes no
        videos, the frames of one are as many images.
        """
        seen = ["image"] if video is None else ["video"] if self.sees_videos else ["image"] * len(video.frames)
        if getattr(self.processor, "chat_template", None):
            content = [*({"type": kind} for kind in seen), {"type": "text", "text": question}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        else:
            tokens = [getattr(self.processor, f"{kind}_token", None) or f"<{kind}>" for kind in seen]
            text = f"{self.tokenizer.bos_token or ''}USER: {''.join(tokens)}\n{question} ASSISTANT:"
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos) and self.tokenizer("x").input_ids[:1] == [self.tokenizer.bos_token_id]:
            text = text.removeprefix(bos)  # this tokenizer adds it by itself
        return text

    def inputs(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Model kwargs for a batch of samples, on the model's device; prompts padded on the left."""
        encoded = self.processor(
            text=[self.prompt(sample.question, video_of(sample)) for sample in samples],
            return_tensors="pt",
            padding=len(samples) > 1,
            **self._pixels(samples),
        )
        if "token_type_ids" not in inspect.signature(self.model.forward).parameters:
            encoded.pop("token_type_ids", None)  # some tokenizers return them to models that refuse them
        floating = next(self.model.parameters())
        return {
            key: value.to(floating.device, floating.dtype if value.is_floating_point() else None)
            for key, value in encoded.items()
        }

    def _pixels(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """What the processor is given to look at: images, or videos."""
        videos = [video for video in map(video_of, samples) if video is not None]
        if not videos:
            return {"images": [sample.image for sample in samples]}
        if not self.sees_videos:
            return {"images": [frame for video in videos for frame in video.frames]}
        told = [
            {"total_num_frames": video.total, "fps": video.fps or 1.0, "frames_indices": list(video.indices),
             "duration": video.total / (video.fps or 1.0), "width": video.size[0], "height": video.size[1]}
            for video in videos
        ]  # fmt: skip
        arrays = [np.stack([np.asarray(frame) for frame in video.frames]) for video in videos]
        return {"videos": arrays, "video_metadata": told, "do_sample_frames": False}

    def apply(self, reducer: Reducer, samples: Sequence[Sample], inputs: Mapping[str, Any]) -> Session:
        """`foveate.apply` for just these inputs: frames that go in as images are numbered as one video."""
        visual, anatomy = None, resolve(self.model)
        if not anatomy.takes_videos and any(getattr(sample, "video", None) is not None for sample in samples):
            placeholders = anatomy.find_placeholders(inputs["input_ids"], None)
            visual = None if placeholders is None else placeholders.long()
        return apply(self.model, reducer, visual=visual)


@dataclass
class Batch:
    """Samples whose prompts have the same shape.

    Attributes:
        indices: where the samples stand in the list they were drawn from.
        inputs: model kwargs, (B, S) and so on.
    """

    indices: list[int]
    samples: list[Sample]
    inputs: dict[str, torch.Tensor]


def load(name: str, dtype: Literal["float32", "bfloat16"] = "float32", device: str = "cpu") -> VLM:
    """Load a model and its processor. Code from a repository is never run.

    Args:
        name: `zoo:NAME` (shipped in the package), a local folder, or a Hub id.
        dtype: of the weights.
        device: where to put them.

    Raises:
        ModelError: nothing there, damaged, a model that takes no images, or a device that cannot be used.
    """
    source = _locate(name)
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype}: known are {', '.join(_DTYPES)}")
    check_device(device)
    with quiet(), loading(name):
        from transformers import AutoConfig, AutoModelForImageTextToText

        config = AutoConfig.from_pretrained(source)
        if type(config) not in AutoModelForImageTextToText._model_mapping:
            raise ModelError(f"model {name}: a {config.model_type!r} model {_why_not(config)}")
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source, config=config, dtype=_DTYPES[dtype], output_loading_info=True
        )
        model, found = loaded
        if absent := sorted(map(str, found["missing_keys"])):  # transformers would go on with random numbers
            raise ModelError(f"model {name}: {len(absent)} of its weights are missing, {absent[0]} for one")
        processor = _processor(name, source)
    if not hasattr(processor, "image_processor"):
        raise ModelError(f"model {name}: has no image processor beside its tokenizer")
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    with loading(name):  # the device may be too small
        return VLM(name, model.eval().to(device), processor)


def _processor(name: str, source: str) -> Any:
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    try:
        return AutoProcessor.from_pretrained(source)
    except Exception as error:
        if "torchvision" in str(error).lower() and not is_torchvision_available():
            wanted = "its processor needs torchvision, which is not installed: pip install 'foveate[vision]'"
            raise ModelError(f"model {name}: {wanted}") from error
        raise


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Whatever a damaged configuration, weight file or tokenizer makes of a library is one `ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"model {name}: cannot be loaded ({reason[:300]})") from error


def check_device(device: str) -> None:
    """Raises `ModelError` unless torch can compute there."""
    try:
        torch.ones(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"device {device}: cannot be used ({reason[:200]})") from error


def _why_not(config: Any) -> str:
    """Why a model that is no `*ForConditionalGeneration` with images cannot be asked."""
    import transformers

    tasks = ("VisualQuestionAnswering", "ImageClassification", "ZeroShotImageClassification")
    if any(type(config) in getattr(transformers, f"AutoModelFor{task}")._model_mapping for task in tasks):
        return "sees images but generates no text, so it cannot be asked here; foveate.apply serves it in Python"
    return "takes no images, so nothing can be reduced"


def _locate(name: str) -> str:
    """Folder or Hub id to load from. Raises `ModelError` early, before transformers retries a Hub it cannot reach."""
    if name.startswith(ZOO):
        from .. import zoo

        try:
            return str(zoo.path(name.removeprefix(ZOO)))
        except (KeyError, ValueError, OSError) as error:
            raise ModelError(f"model {name}: {error.args[-1] if error.args else 'not in the zoo'}") from error
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise ModelError(f"model {name}: no config.json in that folder")
        return str(path)
    if os.path.exists(path):
        raise ModelError(f"model {name}: a file; give the folder it lies in")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(f"model {name}: no such folder")
    import huggingface_hub

    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            huggingface_hub.HfApi().model_info(name, timeout=10)
    except Exception as error:  # the HTTP library's own classes, which differ between versions of huggingface_hub
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {name}: no such folder, and not to be had from the Hub ({reason})") from error
    return name


@contextlib.contextmanager
def quiet(always: bool = False) -> Iterator[None]:
    """No loading bars of transformers where nobody watches them; `always`: nor anywhere else."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if always or not sys.stderr.isatty():
        logging.disable_progress_bar()
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def groups(vlm: VLM, samples: Sequence[Sample], size: int = 16) -> Iterator[list[int]]:
    """Numbers of at most `size` samples of equal shape: no row is padded, none computes for nothing.

    Prompts of equal token count about images of equal size, or videos of equal length and size, have equal shape for
    every processor.
    """
    shapes: dict[tuple[Any, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        length = len(vlm.tokenizer(vlm.prompt(sample.question)).input_ids)  # of a video a constant more
        shapes.setdefault((length, size_of(sample)), []).append(index)
    for indices in shapes.values():
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def batches(vlm: VLM, samples: Sequence[Sample], size: int = 16) -> Iterator[Batch]:
    """Batches of at most `size` samples of equal shape, see `groups`."""
    for indices in groups(vlm, samples, size):
        rows = [samples[i] for i in indices]
        yield Batch(indices, rows, vlm.inputs(rows))


@dataclass
class Answers:
    """What was said to a batch.

    Attributes:
        texts: one answer per row.
        log_probs: (B, vocabulary) float32, natural log, of the first generated token.
        sound: for each row whether all its logits were numbers; a text from NaN or infinite ones means nothing.
    """

    texts: list[str]
    log_probs: torch.Tensor
    sound: list[bool]

    def checked(self, whose: str) -> Answers:
        """The answers themselves. Raises `UnsupportedError` if some are not sound; `whose` logits they come from."""
        broken = self.sound.count(False)
        if broken:
            raise UnsupportedError(f"{whose} logits are NaN or infinite in {broken} of {len(self.sound)} answers")
        return self


@torch.inference_mode()
def answer(vlm: VLM, inputs: dict[str, torch.Tensor], max_new_tokens: int = 8) -> Answers:
    """Greedy answers to a batch. Whatever is applied to the model takes part."""
    generated = vlm.model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=vlm.tokenizer.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = generated.sequences[:, inputs["input_ids"].shape[1] :]
    texts = vlm.processor.batch_decode(new, skip_special_tokens=True)
    sound = torch.stack([has_softmax(logits) for logits in generated.logits]).all(0).tolist()
    return Answers([text.strip() for text in texts], generated.logits[0].float().log_softmax(-1), sound)


@torch.inference_mode()
def prefill_seconds(vlm: VLM, inputs: dict[str, torch.Tensor]) -> float:
    """Seconds of one prefill, vision tower included, of whatever is applied to the model."""
    if inputs["input_ids"].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    vlm.model(**inputs, use_cache=True, logits_to_keep=1)
    if inputs["input_ids"].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start

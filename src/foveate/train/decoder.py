"""Decoder VLMs (LLaVA-style) that learn to answer while a method removes their visual tokens; LoRA by peft.

The engine is at work in every training step as it will be in inference. Its rule for labels holds: a slot from which a
label is predicted stays, and only answers have labels (placeholders, questions and padding have -100).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.families.parts import resolve
from ..evaluate.answer import VLM, ModelError, answer, batches, load
from ..evaluate.data import Sample
from ..evaluate.score import matches
from ..reduction import Reducer
from .batches import Held
from .common import Progress, Report, carry_out, finished, need, processes
from .data import Mixture, evaluation, open_source, parts
from .losses import distillation
from .rows import Row
from .settings import Settings
from .trainer import ReducedTrainer

__all__ = ["AnswerCollator", "DecoderTrainer", "adapt", "train_decoder"]

IGNORED = -100


def train_decoder(
    settings: Settings, family: str, reducer: Reducer | None, progress: Progress | None, report: Report | None
) -> dict[str, Any]:
    """See `run`."""
    if settings.task != "vqa":
        raise ModelError(
            f"model {settings.model}: a {family!r} model answers questions; task {settings.task} needs ViLT or METER"
        )
    weights = parts(settings.data)
    held_out = not settings.eval_data
    sources = [open_source(name, settings.task, settings.seed, held_out) for name in weights]
    mixture = Mixture(sources, list(weights.values()), settings.seed)
    everyone = processes()
    settings = settings.filled(family, mixture.examples, everyone)
    identity = settings.identity(everyone)
    done = finished(settings.out, identity)
    if done is not None:
        return done

    mixture.length = settings.positions(everyone)
    names = list(parts(settings.eval_data or settings.data))
    held = Held(evaluation(names, settings.task, settings.eval_samples, held_out))
    vlm = load(settings.model)
    model = adapt(vlm.model, settings)
    teacher = None if settings.teacher is None else load(settings.teacher).model

    def make(**shared: Any) -> ReducedTrainer:
        collator = AnswerCollator(vlm)
        return DecoderTrainer(
            model, data_collator=collator, train_dataset=mixture, eval_dataset=held, vlm=vlm, teacher=teacher, **shared
        )  # fmt: skip

    def save() -> None:
        model.save_pretrained(settings.out)
        vlm.processor.save_pretrained(settings.out)

    return carry_out(settings, identity, vlm.model, reducer, held, make, save, progress, report)


def adapt(model: nn.Module, settings: Settings) -> Any:
    """The model with LoRA adapters in the linear layers of its decoder; as it is with `lora_rank=0`.

    Raises:
        ModelError: no layer has such a name.
        TrainingError: peft is not installed.
    """
    if not settings.lora_rank:
        return model.requires_grad_(True)
    need("peft")
    from peft import LoraConfig, get_peft_model

    decoder = resolve(model).decoder
    inside = next(name for name, module in model.named_modules() if module is decoder)
    linear = {name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    names = settings.lora_targets or tuple(sorted({name.rpartition(".")[2] for name in linear}))
    where = "" if settings.lora_targets else re.escape(inside) + r"\."
    alpha: Any = settings.lora_alpha or 2 * settings.lora_rank
    torch.manual_seed(settings.seed)  # of the adapters' first weights
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=alpha,
        target_modules=rf"{where}(.*\.)?({'|'.join(map(re.escape, names))})",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"lora_targets {', '.join(names)}: {' '.join(str(error).split())[:200]}") from error


class AnswerCollator:
    """`(position, row)` into prompts with their answers: padding | prompt | answer, end | padding.

    The batch is what the processor makes of the prompts, token tensors (B, S) lengthened by the answers, with `labels`.
    """

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm

    def __call__(self, items: Sequence[tuple[int, Row]]) -> dict[str, Tensor]:
        rows = [row for _, row in items]
        prompts = [self.vlm.prompt(row.text) for row in rows]
        batch = dict(
            self.vlm.processor(
                images=[row.images[0] for row in rows], text=prompts, return_tensors="pt", padding=len(rows) > 1
            )
        )
        answers = [self.answer_ids(row, prompt) for row, prompt in zip(rows, prompts)]
        longest = max(map(len, answers))
        padding = self.vlm.tokenizer.pad_token_id
        ids = torch.tensor([answer + [padding] * (longest - len(answer)) for answer in answers])
        real = torch.tensor([[1] * len(answer) + [0] * (longest - len(answer)) for answer in answers])
        labels = torch.full_like(batch["input_ids"], IGNORED)
        shape = batch["input_ids"].shape
        tails = {"input_ids": ids, "attention_mask": real}
        for name, value in batch.items():
            if value.shape == shape:
                batch[name] = torch.cat([value, tails.get(name, torch.zeros_like(ids))], 1)
        batch["labels"] = torch.cat([labels, ids.masked_fill(real == 0, IGNORED)], 1)
        if "token_type_ids" in batch and "token_type_ids" not in _arguments(self.vlm.model):
            batch.pop("token_type_ids")
        return batch

    def answer_ids(self, row: Row, prompt: str) -> list[int]:
        """Tokens of the answer and of the end, as they follow the prompt."""
        said = row.answer if isinstance(row.answer, str) else Counter(row.answer or ("",)).most_common(1)[0][0]
        tokenizer = self.vlm.tokenizer
        before, whole = tokenizer(prompt).input_ids, tokenizer(f"{prompt} {said}").input_ids
        end = tokenizer.eos_token_id
        if before and before[-1] == end:  # a tokenizer that ends every text by itself
            before, whole = before[:-1], whole[:-1]
        if whole[: len(before)] == before:
            return [*whole[len(before) :], end]
        return [*tokenizer(f" {said}", add_special_tokens=False).input_ids, end]


def _arguments(model: Any) -> set[str]:
    import inspect

    return set(inspect.signature(model.forward).parameters)


class DecoderTrainer(ReducedTrainer):
    """Cross-entropy of the answers; with a teacher, also its distribution over each token of the answer.

    Args:
        vlm: the model without wrapper, for evaluation by generation.
    """

    def __init__(self, *args: Any, vlm: VLM, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vlm = vlm

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As the model itself computes it, from `labels`, plus distillation."""
        outputs = model(**inputs, use_cache=False)
        parts = {"task": outputs.loss}
        loss = self.settings.task_weight * outputs.loss
        if self.teacher is not None:
            learnt = inputs["labels"][:, 1:] != IGNORED
            with torch.no_grad():
                wanted = self.teacher(**inputs, use_cache=False).logits[:, :-1][learnt]
            parts["kd"] = distillation(outputs.logits[:, :-1][learnt], wanted)
            loss = loss + self.settings.kd_weight * parts["kd"]
        self.note(**parts)
        return (loss, outputs) if return_outputs else loss

    def scores(self, model: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """1 where the generated answer matches."""
        rows: Any = self.eval_dataset
        mine = range(self.args.process_index, len(rows), self.args.world_size)
        samples = [_sample(rows[i][1]) for i in mine]
        inner = self.vlm.model if model is self.model else model
        training = inner.training
        inner.eval()
        try:
            for batch in batches(VLM(self.vlm.name, inner, self.vlm.processor), samples, self.settings.eval_batch):
                said = answer(VLM(self.vlm.name, inner, self.vlm.processor), batch.inputs).texts
                right = [matches(text, sample.answer) for text, sample in zip(said, batch.samples)]
                yield torch.tensor([rows.source(mine[i]) for i in batch.indices]), torch.tensor(right).float()
        finally:
            inner.train(training)


def _sample(row: Row) -> Sample:
    said = row.answer if isinstance(row.answer, str) else Counter(row.answer or ("",)).most_common(1)[0][0]
    return Sample(row.images[0], row.text, said, "", row.image_id)

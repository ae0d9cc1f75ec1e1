"""PuMer: inside encoders where image and text meet, text decides which image tokens go; alike tokens of a kind merge.

Paper: "PuMer: Pruning and Merging Tokens for Efficient Vision Language Models", arXiv 2305.17530 (ACL 2023). Official
code: csarron/PuMer @ 8a00d853 (MIT; re-implemented).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..ops.pumer import Reduction, attention_scores, key_scores, reduce_image, reduce_text, token_counts
from ..reduction import MethodInfo, OptionError, Reducer, UnsupportedError, register

if TYPE_CHECKING:
    from ..engine.cross_modal.parts import CrossModal, EncoderAnatomy
    from ..engine.families.parts import Anatomy

__all__ = ["PuMer"]

_SIM_METHODS = {"mean_head": "mean_head", "mh": "mean_head", "first_head": "first_head", "fh": "first_head"} | {
    "km": "km", "k_metric": "km", "qk": "qk",
}  # fmt: skip
_MERGE_STYLES = ("tome", "tip", "diff")
_JOINT: dict[str, tuple[tuple[int, ...], float, float, float]] = {
    "vqav2": ((2, 5, 8), 0.1, 0.3, 0.2),
    "nlvr2": ((2, 5, 8), 0.1, 0.3, 0.2),
    "snli-ve": ((2, 4, 6, 8), 0.1, 0.3, 0.2),
    "retrieval": ((2, 4, 6, 8), 0.1, 0.3, 0.2),
}
"""ViLT, of 12 layers: layers, prune_r, merge_r, merge_text. Retrieval: only a speed benchmark exists."""
_CROSS: dict[str, tuple[tuple[int, ...], float, float, float]] = {
    "vqav2": ((0, 1, 2, 3), 0.2, 0.2, 0.2),
    "nlvr2": ((1, 2, 3), 0.3, 0.5, 0.2),
    "snli-ve": ((0, 1, 2, 3), 0.3, 0.5, 0.2),
}
"""METER, of 6 co-attention layers (the official code counts 0, 2, 4, 6)."""


@register("pumer", MethodInfo(paper="arXiv 2305.17530", acts="inside ViLT, METER, BridgeTower", text_guided=True))
@dataclass
class PuMer(Reducer):
    """Text-informed pruning of image tokens and modality-aware merging, between attention and MLP of some layers.

    Works in `ViltModel` and what stands on it, in `MeterModel` (`foveate.models.meter`), and in BridgeTower, whose
    single-modality towers stay full and whose bridges follow what was merged (the paper has no BridgeTower). Image
    tokens are scored by the attention of the text; the lowest are dropped; of the others, ranked by score, those at
    even ranks merge into those at odd ranks that have the most similar keys; text tokens merge likewise, in their own
    order. Image and text never mix. Sizes of merged tokens are forgotten after the layer, as in the official code.

    Without options the released settings of the model and task are used, layer numbers scaled to the depth of the
    model. All ratios are of the tokens, class token included, that enter a layer; at most half of what pruning leaves
    merges. The accuracy of the paper needs a model that was trained with its tokens reduced.

    With `faithful=True` the official code, else the sane reading. The differences:

    * The class token of the image stays, at its place. Official: it is ranked like all tokens and may go or move, and
      the token of the highest score is the one that never merges.
    * Padding of the text is not counted, merges with nothing and is cut off, and padding of the image (ViLT) is never
      kept, so a padded batch gives what its rows give alone. Official: padding rows are summed into the scores, words
      merge with padding, and the mask becomes fractional.
    * Every ratio works alone. Official: `prune_r` that rounds to no token turns merging off as well, and in METER
      `merge_r=0` leaves the image as it was (pruning is thrown away).
    * Attention is SDPA; scores take only the rows of the text. Official: a full map in every layer, a softmax in which
      each key keeps 1e-6 / N and each query `i` sees key `i`, padding or not.
    * Layer numbers are scaled to the depth of the model. Official: absolute.
    * METER and BridgeTower obey `sim_method` and `merge_style` (for "km" the text's states go through the key
      projection of the cross-attention). Official: only "mean_head" and "tome" exist there.

    Tokens are ranked before they merge, so that the random order into which ViLT brings patches does not matter. The
    trace's `patches` say which patch is where.

    In METER the official PuMer code lets the image look at the text after the text's layer, METER's own code before it:
    that is a property of the model, `MeterConfig.image_sees_text`.

    Args:
        task: "vqav2", "nlvr2", "snli-ve" or "retrieval" (ViLT only): where settings come from that are not given.
        layers: layers from 0 on (co-attention layers in METER and BridgeTower), not scaled.
        prune_r: share of the image tokens to drop in each of these layers, from 0 to below 1.
        merge_r: share of the image tokens to merge away, of the tokens before pruning.
        merge_text: share of the text tokens to merge away.
        sim_method: the score: "mean_head" or "first_head", attention of the text; "km" or "qk", dot products of the
            text's keys or queries with the keys of the image. The official short names are known too.
        merge_style: "tome" by similar keys, averaged; "tip" by similar keys weighted by score, added; "diff" by similar
            scores, added.
        faithful: see above.

    Raises:
        OptionError: an unknown task, method or style, or a ratio outside [0, 1).
        UnsupportedError: when applied to another kind of model, or to a head that needs all text tokens (masked
            language modelling) without `merge_text=0`.
    """

    task: str = "vqav2"
    layers: Sequence[int] | None = None
    prune_r: float | None = None
    merge_r: float | None = None
    merge_text: float | None = None
    sim_method: str = "mean_head"
    merge_style: Literal["tome", "tip", "diff"] = "tome"
    faithful: bool = False

    def __post_init__(self) -> None:
        if self.task not in _JOINT:
            raise OptionError(f"task={self.task!r}: use {', '.join(map(repr, _JOINT))}")
        if self.sim_method not in _SIM_METHODS:
            raise OptionError(f"sim_method={self.sim_method!r}: use 'mean_head', 'first_head', 'km' or 'qk'")
        if self.merge_style not in _MERGE_STYLES:
            raise OptionError(f"merge_style={self.merge_style!r}: use 'tome', 'tip' or 'diff'")
        for name in ("prune_r", "merge_r", "merge_text"):
            ratio = getattr(self, name)
            number = ratio is None or (isinstance(ratio, int | float) and not isinstance(ratio, bool))
            if not number or (ratio is not None and not 0 <= ratio < 1):
                raise OptionError(f"{name}={ratio!r}: give a share from 0 to below 1")
        if self.layers is not None:
            whole = isinstance(self.layers, Sequence) and not isinstance(self.layers, str)
            if not whole or not all(type(layer) is int and layer >= 0 for layer in self.layers):
                raise OptionError(f"layers={self.layers!r}: give a list of layer numbers from 0 on")

    def prepare(self, anatomy: Anatomy) -> None:
        raise UnsupportedError(
            f"{type(anatomy.model).__name__}: PuMer works where image and text meet in encoder layers (ViLT, METER, "
            "BridgeTower); for a VLM with a language model use another method, e.g. FastV or SparseVLM"
        )

    def _settings(self, anatomy: EncoderAnatomy) -> tuple[tuple[int, ...], list[float]]:
        """Layers, and prune_r, merge_r, merge_text, for a model."""
        presets, full = (_JOINT, 12) if anatomy.joint else (_CROSS, 6)
        given = (self.prune_r, self.merge_r, self.merge_text)
        layers: tuple[int, ...] = ()
        known = [0.0, 0.0, 0.0]
        if self.task in presets:
            layers, *known = presets[self.task]
        elif self.layers is None or None in given:
            raise OptionError(
                f"task={self.task!r}: no setting is known for {type(anatomy.model).__name__}; give layers, prune_r, "
                "merge_r and merge_text"
            )
        if self.layers is not None:
            layers = tuple(self.layers)
        elif not self.faithful:
            layers = tuple(sorted({layer * anatomy.depth // full for layer in layers}))
        return layers, [preset if own is None else own for own, preset in zip(given, known)]

    def merges_text(self, anatomy: EncoderAnatomy) -> bool:
        return self._settings(anatomy)[1][2] > 0

    def encoder_layers(self, anatomy: EncoderAnatomy) -> frozenset[int]:
        if self.faithful and not anatomy.joint and (self._sim != "mean_head" or self.merge_style != "tome"):
            raise OptionError("the official code has only sim_method='mean_head', merge_style='tome' for METER")
        layers, ratios = self._settings(anatomy)
        return frozenset(layers) if any(ratios) else frozenset()

    @property
    def _sim(self) -> str:
        return _SIM_METHODS[self.sim_method]

    def _scores(self, seen: CrossModal) -> Tensor:
        lengths = seen.text_mask.sum(1)
        counted = torch.ones_like(seen.text_mask) if self.faithful else seen.text_mask
        if self._sim == "km":
            return key_scores(seen.text_score_key(), seen.image_key, counted, lengths)
        if self._sim == "qk":
            return key_scores(seen.text_query, seen.image_key, counted, lengths)
        return attention_scores(seen.rows(self._sim == "first_head"), counted, lengths)

    @torch.no_grad()
    def reduce(self, seen: CrossModal) -> tuple[Reduction | None, Reduction | None]:
        prune, merge, merge_text = self._settings(seen.anatomy)[1]
        if self.faithful:
            return self._reduce_officially(seen, prune, merge, merge_text)
        image = None
        tokens = seen.image_mask.sum(1).unique().tolist()
        if any(token_counts(n, prune, merge) != (n, 0) for n in tokens):
            image = reduce_image(self._scores(seen), seen.image_key, seen.image_mask, prune, merge, self.merge_style)
        return image, reduce_text(seen.text_key, seen.text_mask, merge_text) if merge_text else None

    def _reduce_officially(
        self, seen: CrossModal, prune: float, merge: float, merge_text: float
    ) -> tuple[Reduction | None, Reduction | None]:
        tokens = seen.image_mask.shape[1]
        if round(prune * tokens) == 0 if seen.anatomy.joint else prune == 0:
            return None, None
        image = None
        if seen.anatomy.joint or round(merge * tokens) > 0:
            everything = torch.ones_like(seen.image_mask)
            image = reduce_image(self._scores(seen), seen.image_key, everything, prune, merge, self.merge_style, False)
        return image, reduce_text(seen.text_key, seen.text_mask, merge_text, count_padding=True)

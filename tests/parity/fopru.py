"""FoPru against a third party's code, dongxianzhe/hydrainfer: the tokens that stay."""

from __future__ import annotations

from pathlib import Path

from foveate.ops.fopru import significance
from foveate.reducers.fopru import FoPru

from . import Golden
from ._tower import decide, patches


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/fopru`."""
    golden = Golden(path)
    attention, tokens = golden["attn"].mean(0), golden["tokens"]
    strategy = golden.arrays["strategy"].item()
    golden.unread.discard("strategy")
    reducer = FoPru(keep=golden.scalar("ratio"), strategy=strategy, faithful=True)
    given, received = attention.mean(1)[None], attention.mean(0)[None]
    reducer._scores = lambda blocks: significance(given, received)  # the file has attention, not queries and keys
    vision = {-2: patches(tokens.shape[1], 1, attention=golden["attn"].mean(1)[None])}
    _, left = decide(reducer, vision, tokens)
    golden.compare("out", left[0][None])
    golden.finish()

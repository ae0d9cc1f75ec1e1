"""One script for who has a GPU: is the reduction exact there, how fast is it, and what does it ask of the device?

No network, no weights: LLaVA-1.5-7B, Qwen2.5-VL-7B and Qwen3-VL-8B at their real sizes with random weights, made on the
device, one model in memory at a time; bfloat16; SDPA, and FlashAttention 2 where it is installed.

1. Exactness, at small widths: every method against the same model that may not look at the removed tokens
   (`gpu_exact.py`), float32 with SDPA, bfloat16 with FlashAttention.
2. Time to first token, prefill, a decoded token, and peak memory, at 576 and 2,880 visual tokens and batch 1 and 8:
   every method that fits the family, the unreduced model, and the plain model on a physically shorter prompt. All take
   turns; medians of ratios within a round.
3. Kernels and waits of a prefill and of a token: by torch.profiler, and by Foveate's own counter.

Everything shares one limit of time. What did not fit is named in the output. Results are written as they come;
`--resume` goes on with what is missing. Random weights measure speed, never accuracy.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import importlib.util
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

BEGUN = time.monotonic()

import torch  # noqa: E402
import transformers  # noqa: E402

import foveate  # noqa: E402
import foveate.reduction  # noqa: E402
from foveate.files import check_writable, write_whole  # noqa: E402
from foveate.measure.memory import peak_memory  # noqa: E402
from gpu_exact import TOLERANCE, largest_difference  # noqa: E402
from gpu_models import MODELS, answer, draw, launches, methods, shorter  # noqa: E402
from gpu_report import FULL, markdown  # noqa: E402

EXAMPLES = """examples:
  python benchmarks/gpu.py --json benchmarks/results/gpu.json            at most 8 minutes; also writes gpu.md
  python benchmarks/gpu.py --json benchmarks/results/gpu.json --resume   goes on with what is missing
  python benchmarks/gpu.py --models qwen3-vl-8b --methods fastv visionzip --minutes 2
  python benchmarks/gpu.py --small                                       tiny models on a CPU: tries the script itself
"""
SIZES = (576, 2880)
RESERVE = 10.0
"""Seconds at the end for the last answer and the report."""
BUILDING, COUNTING, CHECKING = 2.0, 1.0, 3.0
"""What building a model, counting its kernels, and exactness weigh in the plan, beside a batch of one with 1."""
ADMITTED = 0.45
"""Share of a case's time in which methods may come in: a round takes as long as that, and all of them need one."""
NO_TIME = {"outcome": "left out", "why": "no time"}
NO_REFERENCE = {"downsample": "shows the tower another image, so nothing masked computes the same"}


@dataclass
class Plan:
    """Who may run until when: what is left of the time is shared by weight among what is still to come."""

    end: float
    weight: float

    def until(self, weight: float) -> float:
        """The moment at which the next piece, of this weight, must be done."""
        now = time.monotonic()
        share, self.weight = weight / max(self.weight, weight), self.weight - weight
        return now + max(0.0, self.end - now) * share


# ------------------------------------------------------------------------------------------------------- one attempt
def attempt(run: Callable[[], Any]) -> tuple[Any, dict[str, str]]:
    """What `run` returns, and {"outcome", "why"}; whatever it raises ends nothing but itself."""
    try:
        return run(), {"outcome": "measured", "why": ""}
    except (foveate.UnsupportedError, foveate.BudgetError) as error:
        found = {"outcome": "does not fit", "why": str(error)}
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        memory = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in why
        found = {"outcome": "out of memory", "why": ""} if memory else {"outcome": "failed", "why": why}
    clear()  # only here: the error held the frames, and these their tensors
    return None, found


def clear() -> None:
    """Give the device back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------------------------- the parts
def exactness(options: argparse.Namespace, impl: str, rows: list[dict[str, Any]], end: float) -> None:
    """Part 1 for all models; `rows` holds what is known, and is added to."""
    dtype = torch.float32 if impl == "sdpa" else torch.bfloat16
    known = {(row["model"], row["method"]) for row in rows if row["impl"] == impl and row["outcome"] != "left out"}
    rows[:] = [row for row in rows if row["impl"] != impl or row["outcome"] != "left out"]
    for name in options.models:
        todo = {method: reducer for method, reducer in options.reducers.items() if (name, method) not in known}
        drawn = draw(name, SIZES[0], small=True)
        model, said = attempt(lambda: drawn.build(dtype, options.device)) if todo else (None, {})  # noqa: B023
        prompt = drawn.inputs(dtype, options.device, batch=2)
        for method, reducer in todo.items():
            found = None
            if method in NO_REFERENCE:
                said = {"outcome": "no reference", "why": NO_REFERENCE[method]}
            elif time.monotonic() > end:
                said = dict(NO_TIME)
            elif model is not None:
                found, said = attempt(functools.partial(largest_difference, model, prompt, reducer, impl))
            row = {"model": name, "impl": impl, "method": method, **said}
            if found is not None:
                row |= {"difference": found[0], "tolerance": TOLERANCE[dtype], "removed": found[1]}
                row["outcome"] = "exact" if found[0] <= TOLERANCE[dtype] and found[1] else "NOT EXACT"
                row["why"] = f"{found[0]:.1e} of the largest logit" if found[1] else "nothing was removed"
            rows.append(row)
            if row["outcome"] not in ("exact", "does not fit", "no reference"):
                print(f"exactness, {name}, {impl}, {method}: {row['outcome']} {row['why']}", flush=True)


def measure(options: argparse.Namespace, model: Any, drawn: Any, case: dict[str, Any], end: float) -> Iterator[None]:
    """Part 2 for one model, attention, prompt and batch. Yields whenever `case` has become better.

    A row holds `runs`, milliseconds by round, so that ratios are taken within rounds, and the name of its ceiling. Of a
    case that is gone on with, only what is missing is run, in rounds of their own.
    """
    steps, rows, ceilings = options.steps, case.setdefault("rows", {}), case.setdefault("ceilings", {})
    prompt = drawn.inputs(options.dtype, options.device, case["batch"])
    text, shape = drawn.geometry.text_tokens, (*prompt["input_ids"].shape, drawn.geometry.hidden_size)
    embeds = (0.02 * torch.randn(shape, device=options.device)).to(options.dtype)
    first = case["rounds"] = case.get("rounds", 0)
    runs: dict[str, Callable[[], Any]] = {}
    if time.monotonic() < end:
        attempt(functools.partial(answer, model, prompt, steps))  # kernels are chosen, workspaces made
    admitted = time.monotonic() + ADMITTED * (end - time.monotonic())
    for name, reducer in {FULL: None, **options.reducers}.items():
        row = rows.setdefault(name, {**NO_TIME, "runs": {}})
        ready = row["outcome"] != "left out" and (row["outcome"] != "measured" or len(row["runs"]) >= options.repeats)
        if time.monotonic() > admitted or (ready and name != FULL):
            continue
        run = functools.partial(answer, model, prompt, steps, reducer)
        clear()
        with peak_memory(options.device) as peak:
            found, said = attempt(run)
        row |= said
        if found is None:
            continue
        row |= {"peak_bytes": peak.peak, "added_bytes": peak.added}
        runs[name], entering = functools.partial(_times, run), found[1]
        if entering is None:
            continue
        same, lengths = len(set(entering)) == 1, [tokens + text for tokens in entering]
        row["visual_tokens_entering"] = sum(entering) / len(entering)
        key = next((key for key, below in ceilings.items() if below["lengths"] == lengths), None)
        row["ceiling"] = key = key or (f"{entering[0]} visual tokens" if same else f"layers cut as by {name}")
        below = ceilings.setdefault(key, {**NO_TIME, "runs": {}, "lengths": lengths})
        if key not in runs and time.monotonic() < end:
            run = functools.partial(shorter, model, prompt, embeds, lengths, steps)
            below |= attempt(run)[1]
            runs |= {key: run} if below["outcome"] == "measured" else {}
    yield
    # The unreduced model, the ceilings, the methods; every other round backwards.
    order = sorted(runs, key=lambda name: (name != FULL, name in rows))
    for turn in range(first, first + options.repeats):
        for name in order[:: -1 if turn % 2 else 1]:
            row = rows[name] if name in rows else ceilings[name]
            if time.monotonic() > end or row["outcome"] != "measured":
                continue
            found, said = attempt(runs[name])
            row |= said
            if found is not None:
                row["runs"][str(turn)] = found
        case["rounds"] = turn + 1
        yield
        if time.monotonic() > end:
            break
    case["complete"] = all(
        len(row["runs"]) >= options.repeats if row["outcome"] == "measured" else row["outcome"] != "left out"
        for row in rows.values()
    )


def _times(run: Callable[[], tuple[dict[str, float], Any]]) -> dict[str, float]:
    return run()[0]


# ------------------------------------------------------------------------------------------------------ the whole run
def run_all(options: argparse.Namespace, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Parts in the order of their worth, each within its share of the time."""
    wanted = [(impl, size, batch) for impl in options.impls for batch in options.batches for size in options.sizes]
    wanted.sort(key=lambda one: (options.impls.index(one[0]), one[1] * one[2]))
    weigh = {(size, batch): 1 + size * batch / 9216 for size in options.sizes for batch in options.batches}
    one_model = BUILDING + COUNTING + sum(weigh[size, batch] for _, size, batch in wanted)
    checks = CHECKING * len(options.impls)
    plan = Plan(BEGUN + 60 * options.minutes - RESERVE, checks + one_model * len(options.models))
    for impl in options.impls:
        exactness(options, impl, result["exactness"], plan.until(checks / len(options.impls)))
        save()
    print(f"exactness: {sum(row['outcome'] == 'exact' for row in result['exactness'])} exact", flush=True)
    for name in options.models:
        keys = [{"model": name, "impl": impl, "visual_tokens": size, "batch": batch} for impl, size, batch in wanted]
        _one_model(options, result, save, plan, name, keys, weigh)
        clear()


def _one_model(
    options: argparse.Namespace, result: dict[str, Any], save: Callable[[], None], plan: Plan, name: str,
    keys: list[dict[str, Any]], weigh: dict[tuple[int, int], float],
) -> None:  # fmt: skip
    """All cases of a model, which is gone when this returns."""
    ready = {_key(case): case for case in result["cases"] if case["complete"]}
    counted = {row["method"] for row in result["launches"] if row["model"] == name and row["outcome"] != "left out"}
    asked = {FULL: None, **options.reducers}
    if all(_key(key) in ready for key in keys) and counted >= asked.keys():
        plan.weight -= BUILDING + COUNTING + sum(weigh[key["visual_tokens"], key["batch"]] for key in keys)
        return
    start, until = time.monotonic(), plan.until(BUILDING)
    drawn = {size: draw(name, size, options.small) for size in options.sizes}
    model, said = attempt(lambda: drawn[options.sizes[0]].build(options.dtype, options.device))
    if model is None or time.monotonic() > plan.end:
        said = said if model is None else NO_TIME
        result["not_built"][name] = said
        save()
        return
    result["not_built"].pop(name, None)
    print(f"{name}: built in {time.monotonic() - start:.1f} s (its share was {until - start:.0f} s)", flush=True)
    for number, key in enumerate(keys):
        end = plan.until(weigh[key["visual_tokens"], key["batch"]])
        if _key(key) not in ready:
            case = next((case for case in result["cases"] if _key(case) == _key(key)), None)
            if case is None:
                result["cases"].append(case := {**key, "complete": False})
            _, said = attempt(lambda: model.set_attn_implementation(key["impl"]))  # noqa: B023
            if said["outcome"] == "measured":
                for _ in measure(options, model, drawn[key["visual_tokens"]], case, end):
                    save()
            else:
                case |= {"rows": {}, "ceilings": {}, "rounds": 0, "complete": True, **said}  # FlashAttention, refused
            print(", ".join(str(value) for value in key.values()), f"{case['rounds']} rounds", flush=True)
            save()
        if number == 0 and not counted >= asked.keys():
            result["launches"] = [row for row in result["launches"] if row["model"] != name]
            end = plan.until(COUNTING)
            for method, reducer in asked.items():
                row = {"model": name, "method": method, **NO_TIME}
                if time.monotonic() < end:
                    prompt = drawn[options.sizes[0]].inputs(options.dtype, options.device, 1)
                    one = functools.partial(launches, model, prompt, reducer)
                    found, said = attempt(one)
                    row |= said | (found or {})
                result["launches"].append(row)
            save()


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case[name] for name in ("model", "impl", "visual_tokens", "batch"))


# ------------------------------------------------------------------------------------------------------ what was used
def about(options: argparse.Namespace) -> dict[str, Any]:
    """Machine and versions: two runs may be one result only where all of this is the same."""
    cuda = options.device.type == "cuda"
    line, driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], None
    if cuda:
        asked, _ = attempt(lambda: subprocess.run(line, capture_output=True, text=True, timeout=20, check=True).stdout)
        driver = asked.split()[0] if asked else None
    flash = importlib.util.find_spec("flash_attn") is not None
    return {
        "device": torch.cuda.get_device_name(options.device) if cuda else "CPU, 1 thread",
        "driver": driver,
        "cuda": torch.version.cuda if cuda else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "foveate": foveate.__version__,
        "flash_attn": importlib.metadata.version("flash_attn") if flash else None,
        "dtype": str(options.dtype).removeprefix("torch."),
        "small": options.small,
        "keep": options.keep,
        "steps": options.steps,
    }


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        "gpu.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = list(methods(0.5))
    parser.add_argument("--small", action="store_true", help="tiny models of the same families; runs on a CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="limit of time for everything (8)")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="M", help=", ".join(MODELS)
    )
    parser.add_argument("--methods", nargs="+", choices=every, default=every, metavar="M", help="; ".join(every))
    parser.add_argument(
        "--sizes", nargs="+", type=int, choices=SIZES, help="visual tokens (both; --small: a 16th, of 576)"
    )
    parser.add_argument("--batches", nargs="+", type=int, metavar="B", help="rows (1 8; --small: 2)")
    parser.add_argument("--keep", type=float, default=2 / 9, help="fraction of visual tokens (2/9: 128 of 576)")
    parser.add_argument("--repeats", type=int, help="counted rounds, time permitting (3; --small: 1)")
    parser.add_argument("--steps", type=int, help="tokens decoded after a prefill (8; --small: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="results as they come; the table beside it, as .md")
    parser.add_argument("--resume", action="store_true", help="go on with the FILE of --json")
    options = parser.parse_args(arguments)
    sizes, batches, repeats, steps = ([576], [2], 1, 2) if options.small else ([*SIZES], [1, 8], 3, 8)
    options.sizes, options.batches = options.sizes or sizes, options.batches or batches
    options.repeats, options.steps = options.repeats or repeats, options.steps or steps
    if min(options.minutes, options.repeats, options.steps, *options.batches) <= 0 or not 0 < options.keep <= 1:
        parser.error("--minutes, --repeats, --steps and --batches are positive, --keep is in (0, 1]")
    if options.resume and options.json is None:
        parser.error("--resume needs --json FILE")
    options.sizes, options.batches = sorted(set(options.sizes)), sorted(set(options.batches))
    return options


def main(arguments: list[str] | None = None) -> int:
    """0: all is well; 1: something is not exact, or failed; 2: cannot be run."""
    options = parsed(arguments)
    cuda = torch.cuda.is_available()
    if not cuda and not options.small:
        print("gpu.py: no CUDA device is found here; --small tries the script on a CPU", file=sys.stderr)
        return 2
    options.device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    options.dtype = torch.bfloat16 if cuda else torch.float32
    options.reducers = {name: reducer for name, reducer in methods(options.keep).items() if name in options.methods}
    if cuda:  # what a float32 comparison is worth
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    else:
        torch.set_num_threads(1)
    used = about(options)
    flash = cuda and used["flash_attn"] is not None
    options.impls = ["sdpa", *(["flash_attention_2"] if flash else [])]
    result: dict[str, Any] = {"about": used, "runs": [], "exactness": [], "cases": [], "launches": [], "not_built": {}}
    try:
        if options.resume and options.json.exists():
            result = json.loads(options.json.read_text())
            if result["about"] != used:
                other = next(name for name in used if result["about"].get(name) != used[name])
                raise ValueError(f"was measured with another {other}: {result['about'].get(other)}, now {used[other]}")
        if options.json is not None:
            check_writable(options.json)
            check_writable(options.json.with_suffix(".md"))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        print(f"gpu.py: {options.json}: {error}", file=sys.stderr)
        return 2
    why = "flash_attn is not installed: left out" if cuda else "needs CUDA: left out"
    result["flash_attention"] = "asked for" if flash else why
    command = shlex.join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    this = {"command": command, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "seconds": 0.0}
    result["runs"].append(this)

    def save() -> None:
        this["seconds"] = round(time.monotonic() - BEGUN, 1)
        if options.json is not None:
            write_whole(options.json, json.dumps(result, indent=1) + "\n")

    save()
    gc.freeze()  # what was imported; else every collection goes through all of it
    try:
        run_all(options, result, save)
        result.pop("ended", None)
    except RuntimeError as error:  # raised where nothing can go on, as on a device that has failed an assertion
        result["ended"] = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        gc.unfreeze()
        save()
    text = markdown(result)
    print(text)
    if options.json is not None:
        write_whole(options.json.with_suffix(".md"), text + "\n")
    outcomes = [row["outcome"] for row in [*result["exactness"], *result["launches"], *result["not_built"].values()]]
    outcomes += [
        row["outcome"] for case in result["cases"] for row in [*case["rows"].values(), case] if "outcome" in row
    ]
    return int("failed" in outcomes or "NOT EXACT" in outcomes or "ended" in result)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    sys.exit(main())

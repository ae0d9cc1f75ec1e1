"""The web page of `foveate app`: what is where, and what moves what. The work is done by `run.Runner`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..engine.families.parts import resolve
from . import html
from .examples import examples
from .options import controls, describe, parse_options, usable_methods
from .pictures import entering_picture, score_picture
from .run import AskError, Progress, Question, Runner, Stopped, explain, read_image

__all__ = ["Page"]

Updates = dict[Any, Any]
"""Component -> its new value or properties."""
Form = dict[Any, Any]
"""Component -> its value."""

_METHOD, _KEEP = "sparsevlm", 33
_PATIENCE = 0.3  # seconds a slider must rest before the model is asked again
_STAMPED = "(...form) => [...form.slice(0, -1), performance.now()]"
"""Puts the time into the last field of a form: the server may get to see two of them in another order."""
_HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


class Page:
    """The components, and the functions that answer to them. `blocks` is the whole."""

    def __init__(self, runner: Runner):
        self.runner = runner
        model = runner.models[0]
        with runner.model(model) as vlm:
            methods, depth = usable_methods(vlm.model), resolve(vlm.model).depth
        with gr.Blocks(title="Foveate", analytics_enabled=False, delete_cache=(3600, 3600)) as self.blocks:
            self.depth = gr.State(depth)
            self.last: Any = gr.State(None, time_to_live=3600)  # Progress
            with gr.Row(elem_id="fv-top"):
                with gr.Column(scale=7, min_width=300):
                    gr.HTML(html.HEADER)
                with gr.Column(scale=4, min_width=300):
                    self.model = gr.Dropdown(
                        list(runner.models), value=model, label="Model", interactive=len(runner.models) > 1,
                        elem_id="fv-model",
                    )  # fmt: skip
            with gr.Row(elem_id="fv-page"):
                with gr.Column(scale=4, min_width=300, elem_id="fv-inputs"):
                    self._inputs()
                    with gr.Column(elem_id="fv-choices"):
                        self._method(methods, depth)
                with gr.Column(scale=7, min_width=300, elem_id="fv-results"):
                    self._results(depth)
            self.stamp = gr.Number(visible=False)  # the last component: see _STAMPED
            # Values as they come: what is wrong with them, the page says in its own words. Not by subclasses: for one,
            # gradio writes a stub file into the package.
            self.image.preprocess = _path
            for slider in (self.keep, self.layer, self.stage):
                slider.preprocess = _number
            self._wire()

    # ------------------------------------------------------------------------------------------------------- layout
    def _inputs(self) -> None:
        picture, question = examples()[0]
        self.examples = gr.Dataset(
            components=[gr.Image(visible=False)], samples=[[path] for path, _ in examples()], type="index",
            label="Examples", elem_id="fv-examples",
        )  # fmt: skip
        self.image = gr.Image(
            picture, type="filepath", sources=["upload", "clipboard"], label="Image", height=230, buttons=[],
            elem_id="fv-image",
        )  # fmt: skip
        self.text = gr.Textbox(
            question, label="Question", lines=1, max_lines=3, max_length=1000, elem_id="fv-question",
            placeholder="What do you want to know about the image?",
        )  # fmt: skip
        with gr.Row(elem_classes="fv-buttons"):
            self.ask_button = gr.Button("Ask", variant="primary", elem_id="fv-ask")
            self.stop_button = gr.Button("Stop", visible=False, elem_id="fv-stop", min_width=90, scale=0)
        self.message = gr.HTML(html.message())

    def _method(self, methods: list[str], depth: int) -> None:
        method = _METHOD if _METHOD in methods else (methods or [""])[0]
        self.method = gr.Dropdown(methods, value=method, label="Method", info=describe(method), elem_id="fv-method")
        self.keep = gr.Slider(
            1, 100, value=_KEEP, step=1, label="Visual tokens to keep, %", buttons=[], elem_id="fv-keep",
            info="Methods that prune in steps reach it as an average over the layers.",
        )  # fmt: skip
        shown = _method_controls(method, depth)
        self.layer = gr.Slider(**shown["layer"], step=1, label="Pruning layer", buttons=[], elem_id="fv-layer")
        with gr.Accordion("More options", open=False):
            self.choice = gr.Dropdown(**shown["choice"], elem_id="fv-choice")
            self.faithful = gr.Checkbox(
                False, label="Faithful to the paper's code", info="Its fixed layer numbers and quirks included."
            )
            self.others = gr.Textbox(**shown["others"], label="Other options", elem_id="fv-others")

    def _results(self, depth: int) -> None:
        self.answers = gr.HTML(html.answers(None), elem_id="fv-answers")
        self.bill = gr.HTML(html.bill(None), elem_id="fv-bill")
        with gr.Column(elem_id="fv-tokens"):
            gr.HTML('<h2 class="fv-title">Which tokens stayed</h2>')
            self.columns = gr.HTML(html.layers(None))
            self.stage = gr.Slider(
                0, depth - 1, value=depth - 1, step=1, label="Layer", interactive=False, buttons=[],
                elem_id="fv-stage",
            )  # fmt: skip
            with gr.Row(elem_id="fv-pictures"):
                with gr.Column(min_width=130):
                    self.kept_note = gr.HTML(html.layer_note(None))
                    self.kept = gr.Image(**_picture("Tokens that enter this layer"), elem_id="fv-kept")
                with gr.Column(min_width=130):
                    self.scores_note = gr.HTML(html.scores_note(None))
                    self.scores = gr.Image(**_picture("Scores of the tokens"), elem_id="fv-scores")

    # ------------------------------------------------------------------------------------------------------- events
    def _wire(self) -> None:
        options = [self.layer, self.choice, self.others]
        form = {
            self.model, self.image, self.text, self.method, self.keep, *options, self.faithful, self.stage, self.last,
            self.depth, self.stamp,
        }  # fmt: skip
        tokens = [self.columns, self.kept, self.kept_note, self.scores, self.scores_note]
        shown = [self.answers, self.bill, self.message, self.stop_button, self.last, self.stage, *tokens]
        asking: dict[str, Any] = {
            "inputs": form,
            "outputs": shown,
            "trigger_mode": "multiple",
            "js": _STAMPED,
            **_HIDDEN,
        }
        gr.on([self.ask_button.click, self.text.submit], self.ask, **asking)
        self.examples.click(_example, self.examples, [self.image, self.text], **_HIDDEN).then(self.ask, **asking)
        self.method.input(
            self.choose_method, [self.method, self.depth], [self.method, *options], **_HIDDEN
        ).then(self.ask_again, **asking)  # fmt: skip
        moved = [self.keep.input, self.layer.input, self.choice.input, self.faithful.input, self.others.submit]
        gr.on(moved, self.ask_again, **asking)
        self.stage.input(self.show_layer, [self.last, self.stage], tokens, trigger_mode="always_last", **_HIDDEN)
        self.stop_button.click(self.stop, None, None, **_HIDDEN)
        self.image.upload(self.check_image, self.image, [self.image, self.message], **_HIDDEN)
        self.model.input(
            self.choose_model, [self.model, self.method], [*shown, self.method, self.depth, *options], **_HIDDEN
        )
        self.blocks.unload(self.leave)

    def ask(self, form: Form, request: gr.Request, patience: float = 0.0) -> Iterator[Updates]:
        """Answer, and show each step of it."""
        yield {self.message: gr.skip()}  # gradio empties all outputs of a generator that ends without a word
        try:
            last = form[self.last]
            for now in self.runner.ask(self._question(form), _tab(request), form[self.stamp] or 0, patience):
                deepest = now.trace.n_layers - 1 if now.trace else 0
                yield self._show(now, min(int(form[self.stage] or 0), deepest) if last else deepest)
        except Stopped:
            yield {self.message: html.message("Stopped."), self.stop_button: gr.update(visible=False)}
        except Exception as error:  # whatever it is, the page says it in one line and lives on
            yield {self.message: html.message(explain(error), error=True), self.stop_button: gr.update(visible=False)}

    def ask_again(self, form: Form, request: gr.Request) -> Iterator[Updates]:
        """A control was moved: ask once more, if anything was asked before."""
        yield {self.message: gr.skip()}
        if form[self.last] is not None:
            yield from self.ask(form, request, _PATIENCE)

    def _question(self, form: Form) -> Question:
        method = form[self.method]
        if not method:
            raise AskError("Choose a method first.")
        if form[self.keep] is None:
            raise AskError("Say how many of the visual tokens to keep: 1 to 100 %.")
        found = controls(method, form[self.depth])
        options = parse_options(form[self.others] or "")
        if found.layer and form[self.layer] is not None:
            options.setdefault("layer", int(form[self.layer]))
        if found.choice:
            options.setdefault(found.choice.name, form[self.choice])
        if form[self.faithful]:
            options.setdefault("faithful", True)
        return Question(
            form[self.model] or "", form[self.image], form[self.text] or "", method, form[self.keep] / 100, options
        )

    def _show(self, now: Progress, layer: int) -> Updates:
        updates: Updates = {
            self.answers: html.answers(now),
            self.message: html.message(now.status),
            self.stop_button: gr.update(visible=bool(now.status)),
        }
        if now.trace is not None:
            updates |= {self.bill: html.bill(now), self.last: now}
            updates[self.stage] = gr.update(maximum=now.trace.n_layers - 1, value=layer, interactive=True)
            updates |= self.show_layer(now, layer)
        return updates

    def show_layer(self, last: Progress | None, layer: int | None) -> Updates:
        """Tokens and scores at a layer of the last answer; empty places without one."""
        layer = int(layer or 0)
        if last is None or last.trace is None:
            trace, kept, scores = None, None, None
        else:
            trace = last.trace
            kept, scores = entering_picture(last.image, trace, layer), score_picture(last.image, trace, layer)
        return {
            self.columns: html.layers(trace, layer),
            self.kept: kept,
            self.kept_note: html.layer_note(trace, layer),
            self.scores: scores,
            self.scores_note: html.scores_note(trace, layer),
        }

    def choose_method(self, method: str, depth: int) -> Updates:
        """Show the options of a method."""
        shown = _method_controls(method, depth)
        return {self.method: gr.update(info=describe(method))} | {
            component: gr.update(**shown[name])
            for name, component in (("layer", self.layer), ("choice", self.choice), ("others", self.others))
        }

    def choose_model(self, model: str | None, method: str, request: gr.Request) -> Iterator[Updates]:
        """Load a model, empty the page, and offer the methods that work with it."""
        self.runner.stop(_tab(request))
        yield {self.message: html.message(f"Loading {model}")}
        try:
            with self.runner.model(model or "") as vlm:
                methods, depth = usable_methods(vlm.model), resolve(vlm.model).depth
            if not methods:
                raise AskError(f"{model}: no method works with this model.")
        except Exception as error:
            yield {self.message: html.message(explain(error), error=True)}
            return
        method = method if method in methods else methods[0]
        yield {
            **self.choose_method(method, depth),
            **self.show_layer(None, 0),
            self.method: gr.update(choices=methods, value=method, info=describe(method)),
            self.depth: depth,
            self.last: None,
            self.stage: gr.update(maximum=depth - 1, value=depth - 1, interactive=False),
            self.answers: html.answers(None),
            self.bill: html.bill(None),
            self.message: html.message(),
        }

    def check_image(self, image: str | None) -> Updates:
        """Say at once what is wrong with an upload."""
        try:
            if image is not None:
                read_image(image)
        except AskError as error:
            return {self.image: None, self.message: html.message(str(error), error=True)}
        return {self.message: html.message()}

    def stop(self, request: gr.Request) -> None:
        """End the question that is being answered; `ask` shows that it has ended."""
        self.runner.stop(_tab(request))

    def leave(self, request: gr.Request) -> None:
        """The tab was closed."""
        self.runner.forget(_tab(request))


def _tab(request: gr.Request) -> str:
    return request.session_hash or ""


def _path(upload: Any) -> Any:
    return None if upload is None else upload.path


def _number(value: Any) -> Any:
    return value if isinstance(value, int | float) else None


def _example(number: int) -> tuple[str, str]:
    return examples()[number]


def _picture(label: str) -> dict[str, Any]:
    return {
        "label": label, "show_label": False, "interactive": False, "buttons": ["fullscreen"], "format": "png",
        "container": False, "alt_text": label,
    }  # fmt: skip


def _method_controls(method: str, depth: int) -> dict[str, dict[str, Any]]:
    """Properties of the three controls that differ from method to method."""
    found = controls(method, depth)
    first, last, default = found.layer or (0, depth - 1, 0)
    choice = found.choice
    examples = ", ".join(found.others) or "none"
    return {
        "layer": {"minimum": first, "maximum": last, "value": default, "visible": found.layer is not None},
        "choice": {
            "choices": list(choice.values) if choice else [],
            "value": choice.default if choice else None,
            "label": choice.name.replace("_", " ").capitalize() if choice else "",
            "visible": choice is not None,
        },
        "others": {
            "value": "",
            "info": f"name=value, separated by commas; press Enter. There are: {examples}.",
            "visible": bool(found.others),
        },
    }

"""A local page that asks models side by side, and previews plans on the first of them."""

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shortcut.common.errors import ShortcutError

if TYPE_CHECKING:
    from shortcut.talk.side_by_side import Answer, Column


PREVIEW = "preview"


PAGE_TOKENS = 128  # of an answer, until the page is told otherwise


STYLE = ".answer textarea { font-size: 0.95rem } footer { display: none }"


def check_port(host: str, port: int) -> None:
    """Raise ShortcutError where nothing can be served: where the port is taken, or the host is another machine."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise ShortcutError(f"cannot serve a page at {host}:{port}: {reason}; choose with --host and --port") from None


@contextmanager
def serving(columns: Mapping[str, "Column"], host: str, port: int, *, browser: bool = False) -> Iterator[str]:
    """Serve the page of these models, by name, for the length of a `with` block; gives its address."""
    page = build_page(columns)
    where: dict[str, Any] = {"server_name": host, "server_port": port, "inbrowser": browser, "share": False}
    plain: dict[str, Any] = {"quiet": True, "ssr_mode": False, "footer_links": [], "css": STYLE}
    try:
        yield page.launch(prevent_thread_lock=True, **where, **plain)[1]
    finally:
        page.close(verbose=False)


def build_page(columns: Mapping[str, "Column"]) -> Any:
    """A prompt and how to answer it, a column for every model and one for the preview, and the blocks to leave out."""
    import gradio as gr

    name, first = next(iter(columns.items()))
    sees = any(column.sees for column in columns.values())
    with gr.Blocks(title="shortcut compare", analytics_enabled=False, fill_width=True) as page:
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                label="Prompt", lines=5 if sees else 3, scale=5, min_width=280, autofocus=True, elem_id="prompt"
            )
            image = gr.Image(
                label="Image", type="pil", sources=["upload"], height=180, scale=2, min_width=200, visible=sees
            )
            with gr.Column(scale=1, min_width=160):
                go = gr.Button("Answer", variant="primary", elem_id="go")
                clear = gr.Button("Clear", elem_id="clear")
        with gr.Row():
            new_tokens = gr.Slider(1, 1024, PAGE_TOKENS, step=1, label="New tokens at most", min_width=240)
            temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: the likeliest tokens)", min_width=240)
        cells = []
        with gr.Row():
            for title, column in (*columns.items(), (PREVIEW, None)):
                with gr.Column(min_width=240):
                    text = gr.Textbox(label=title, lines=6, max_lines=24, interactive=False, elem_classes="answer")
                    cells += [text, gr.Markdown(note(column), elem_classes="note")]
        blocks = [str(block) for block in range(first.checkpoint.base.blocks)]
        drop = gr.CheckboxGroup(blocks, label=f"Blocks of {name} that the preview leaves out", elem_id="drop")

        given: list[Any] = [drop, prompt, image, new_tokens, temperature]
        alone = {"concurrency_id": "models"}
        everything = _answering(list(columns.values()), first)
        # "multiple": a click just behind Clear counts, while the stopped model still makes its last token
        runs = [gr.on([go.click, prompt.submit], everything, given, cells, trigger_mode="multiple", **alone)]
        runs += [drop.input(_answering([], first), given, cells[-2:], trigger_mode="always_last", **alone)]
        cleared = clear.click(lambda: ("", None), None, [prompt, image], cancels=runs)
        cleared.then(everything, given, cells, **alone)  # without a prompt, that leaves the columns empty
    return page


def _answering(asked: Sequence["Column"], first: "Column") -> Callable[..., Iterator[list[str]]]:
    """`fill` for the page, which says for a moment what is wrong."""
    import gradio

    def run(*given: Any) -> Iterator[list[str]]:
        try:
            yield from fill(asked, first, *given)
        except ShortcutError as error:
            gradio.Warning(str(error))

    return run


def fill(
    asked: Sequence["Column"],
    first: "Column",
    dropped: Sequence[str],
    prompt: str,
    image: Any,
    new_tokens: int,
    temperature: float,
) -> Iterator[list[str]]:
    """Text and note of every column while the answers grow; the last column is the first model without some blocks."""
    from shortcut.talk.side_by_side import answer_in_turn, without

    columns = [*asked, *([without(first, [int(block) for block in dropped])] if dropped else [])]
    rest = [] if dropped else ["", note(None)]
    for answers in answer_in_turn(columns, prompt, image, new_tokens=new_tokens, temperature=temperature):
        pairs = zip(columns, answers, strict=True)
        yield [*(cell for column, answer in pairs for cell in (answer.text, note(column, answer))), *rest]


def note(column: "Column | None", answer: "Answer | None" = None) -> str:
    """The line below a column: what the model takes, and how fast it was. column: None for a preview of no plan."""
    if column is None:
        return "Leave out blocks, below, to see what is said without them."
    parts = [column.facts]
    if column.plan is not None:
        parts.insert(0, f"without {column.plan.described}")
    if answer is not None and answer.tokens:
        parts.append(f"{answer.tokens} tokens, {answer.speed:.3g} per second" if answer.speed else "1 token")
    return " · ".join(parts)

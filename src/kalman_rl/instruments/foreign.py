"""Files of other trainers as a page with the token inspector: per-token JSONL of prime-rl, completions of TRL.

A page shows what a file holds and says what it lacks. The files are data: of bounded size, cleaned, never run.

prime-rl (``trainer.enable_token_export``, schema 1) writes ``token_exports/step_N/rank_R.jsonl``, a line a sequence
with lists over its tokens. TRL (``log_completions``) writes ``completions/completions_00010.parquet``, a row a
completion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from kalman_rl.engine.runs.files import explained
from kalman_rl.engine.runs.reading import clean
from kalman_rl.engine.runs.received import parse_json, read_bytes, read_lines
from kalman_rl.errors import PlaceError, RunError, extra, one_line, quote
from kalman_rl.instruments.report.page import PageParts, write_page
from kalman_rl.instruments.report.sections.completions import MAX_LISTED, Listed
from kalman_rl.instruments.report.sections.other_methods import on_tokens
from kalman_rl.instruments.report.sections.tokens import (
    MAX_OF_COMPLETION,
    MAX_TOKENS,
    Inspected,
    number_of,
    shown_completion,
)
from kalman_rl.instruments.report.words import counted, listing

MAX_FILE, MAX_LINE = 256_000_000, 64_000_000
"""Bytes of a file, and of one of its lines."""
MAX_SEQUENCES, MAX_NUMBERS = 400, 20
LARGEST = 2**53
Decode = Callable[[int], str]
PRIME = ("token_ids", "loss_mask", "inference_logprobs", "trainer_logprobs")
FORMATS = "prime-rl's token export (.jsonl) or TRL's completions (.parquet)"


def inspect_file(path: Path, output: Path | None = None, *, tokenizer: str | None = None) -> Path:
    """Write a page about a file of another trainer.

    Args:
        path: ``rank_0.jsonl`` of prime-rl, or ``completions_00010.parquet`` of TRL.
        output: the page; None = beside the file, with its name.
        tokenizer: folder or name of the tokenizer, for the text of tokens that a file has as numbers only.

    Returns: the path of the page.
    Raises: PlaceError where no such file or no tokenizer is, for another or a damaged file too.
    """
    path = Path(path)
    with explained(path, "read", kind=PlaceError):
        there = path.is_file() or path.is_symlink()
    if not there:
        raise PlaceError(f"{path}: got no file there, expected {FORMATS}")
    decode = None if path.suffix == ".parquet" else _decoder(tokenizer)
    try:
        parts = _completions(path) if path.suffix == ".parquet" else _tokens(path, decode)
    except RunError as error:
        raise PlaceError(str(error)) from error
    return write_page(parts, path.with_name(path.stem + ".html") if output is None else Path(output))


def _page(path: Path, what: str, inspected: Inspected, listed: Listed, missing: list[str]) -> PageParts:
    lead = [
        f"{what[0].upper()}{what[1:]}.",
        *(["Not in this file: " + "; ".join(missing) + "."] if missing else []),
    ]
    data = {"inspector-data": inspected.data} if inspected.data else {}
    data |= {"completions-data": listed.data} if listed.rows else {}
    bodies: list[tuple[str, str, str, Any]] = [
        ("Token by token", "tokens-section", "inspector.html", inspected)
    ]
    if listed.rows:
        bodies.append(("Completions", "completions-section", "completions.html", listed))
    return PageParts(clean(path.name, 120), "Tokens of another trainer", lead, bodies, data)


# ---------------------------------------------------------------- prime-rl


def _tokens(path: Path, decode: Decode | None) -> PageParts:
    sequences = list(islice(_sequences(path), MAX_SEQUENCES))
    if not sequences:
        raise RunError(f"{path}: got no sequence of tokens, expected {FORMATS}")
    tables = [_table(row, number, decode) for number, row in enumerate(sequences)]
    tables = [table for table in tables if table["token"]]
    if not tables:
        raise RunError(f"{path}: got sequences without a token that is trained on (loss_mask), expected one")
    order = sorted(range(len(tables)), key=lambda i: (-_largest(tables[i]), i))
    room = MAX_TOKENS
    chosen: list[dict[str, list[Any]]] = []
    for i in order:
        size = min(len(tables[i]["token"]), MAX_OF_COMPLETION)
        if size <= room or not chosen:
            chosen.append(tables[i])
            room -= size
    methods, notes = on_tokens(chosen, None, [])
    names = [{"run": clean(path.stem, 60), **methods}]
    said = [f"{counted(len(chosen), 'completion')} of {len(tables)}, those that moved most first.", *notes]
    inspected = Inspected(
        said=said, data={"runs": names, "completions": [shown_completion(t, 0) for t in chosen]}
    )
    listed = Listed(("advantage", "tokens"), [names[0]["run"]])
    for table in tables:
        text = "".join(table["token"])
        listed.add(
            table["step"][0], table["sequence"][0], table["prompt"][0], None, text,
            [table["advantage"][0], len(table["token"])],
        )  # fmt: skip
    missing = [] if decode else ["the text of tokens (they are shown by their ids; give --tokenizer)"]
    missing += ["rewards and expected answers", "the method's own weights and coefficients"]
    if not any(math.isfinite(number_of(v)) for table in tables for v in table["log_ratio"]):
        missing.append("ratios, which need the log-probabilities of two policies")
    what = f"{counted(len(tables), 'sequence')} as prime-rl exported them; the log-ratio is trainer against inference"
    return _page(path, what, inspected, listed, missing)


def _sequences(path: Path) -> Iterator[dict[str, Any]]:
    """Lines that are sequences, with lists of one length. Raises: RunError if the first line is none."""
    for number, line in enumerate(read_lines(path.parent, path.name, MAX_FILE, MAX_LINE)):
        try:
            row = parse_json(line, finite=True)
            lists = [row[name] for name in PRIME]
            if not all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
                raise ValueError("lists of different length")
        except (ValueError, KeyError, TypeError) as error:
            if number == 0:
                why = one_line(error, 100)
                raise RunError(
                    f"{path}: got a first line that is no sequence ({why}), expected {FORMATS}"
                ) from None
            continue
        yield row


def _table(row: dict[str, Any], number: int, decode: Decode | None) -> dict[str, list[Any]]:
    """The trained tokens of a sequence, in the columns of a trace; what is before the first is the prompt."""
    size, step = len(row["token_ids"]), row.get("step")
    inside = [place for place in range(size) if row["loss_mask"][place] is True]

    def column(name: str) -> list[Any]:
        values = row.get(name)
        values = values if isinstance(values, list) and len(values) == size else [None] * size
        return [values[place] if _plain(values[place]) else None for place in inside]

    def text(token: Any) -> str:
        known = isinstance(token, int) and not isinstance(token, bool)
        return decode(token) if decode and known else f"⟨{clean(token, 20)}⟩"

    first = inside[0] if inside else 0
    prompt = "".join(text(token) for token in row["token_ids"][max(0, first - 400) : first])
    masked = column("is_masked")
    old, now = column("inference_logprobs"), column("trainer_logprobs")
    return {
        "step": [step if isinstance(step, int) and _plain(step) else 0] * len(inside),
        "sequence": [number] * len(inside), "prompt": [prompt] * len(inside),
        "position": list(range(len(inside))), "token_id": column("token_ids"),
        "token": [text(row["token_ids"][place]) for place in inside],
        "logp_old": old, "logp_behaviour": old, "logp": now, "log_ratio": column("log_importance_ratio"),
        "kept": [value is not True for value in masked], "advantage": column("advantages"),
    }  # fmt: skip


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float)) and not abs(value) > LARGEST


def _largest(table: dict[str, list[Any]]) -> float:
    return max((abs(v) for v in map(number_of, table["log_ratio"]) if math.isfinite(v)), default=0.0)


def _decoder(tokenizer: str | None) -> Decode | None:
    if tokenizer is None:
        return None
    with extra("app", "kalman-rl inspect --tokenizer"):
        from transformers import AutoTokenizer
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise PlaceError(
            f"tokenizer: got {quote(tokenizer)}, expected a folder with one: {one_line(error, 200)}"
        ) from None
    size = len(loaded)
    return lambda token: loaded.decode([token]) if 0 <= token < size else f"⟨{token}⟩"


# ---------------------------------------------------------------- TRL


def _completions(path: Path) -> PageParts:
    """A row a completion; every further column of numbers is a reward function's, or the advantage."""
    with extra("app", "kalman-rl inspect"):
        from pyarrow import ArrowException, BufferReader, parquet

    data = read_bytes(path.parent, path.name, MAX_FILE)
    try:
        source = parquet.ParquetFile(BufferReader(data))
        groups = [source.metadata.row_group(i).total_byte_size for i in range(source.metadata.num_row_groups)]
        if not 0 <= sum(groups) <= MAX_FILE:
            raise ValueError(f"got {sum(groups):,} bytes unpacked, expected up to {MAX_FILE:,}")
        batch = next(source.iter_batches(MAX_LISTED), None)
        table = {} if batch is None else {name: batch[name].to_pylist() for name in batch.schema.names}
    except (ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        raise RunError(
            f"{path}: got a damaged Parquet file ({one_line(error, 200)}), expected {FORMATS}"
        ) from None
    if not table.get("completion") or "prompt" not in table:
        there = listing([clean(name, 30) for name in list(table)[:12]]) if table else "no rows"
        raise RunError(f"{path}: got {there}, expected rows with prompt and completion; {FORMATS}")
    rows = len(table["completion"])
    others = [name for name in table if name not in ("step", "prompt", "completion")]
    numbers = [name for name in others if _of_numbers(table[name])][:MAX_NUMBERS]
    answer = next((name for name in ("answer", "solution", "ground_truth") if name in table), None)
    listed = Listed([clean(name, 40) for name in numbers], [clean(path.stem, 60)])
    for i in range(rows):
        told = [_text(table[name][i]) for name in ("prompt", "completion")]
        step = table["step"][i] if "step" in table else None
        listed.add(
            step,
            i,
            told[0],
            table[answer][i] if answer else None,
            told[1],
            [table[name][i] for name in numbers],
        )
    if rows < source.metadata.num_rows:
        listed.said.append(f"The first {rows} of {source.metadata.num_rows} completions.")
    note = "This file has no tokens and no log-probabilities, so there is no token to inspect."
    missing = ["tokens, log-probabilities and ratios (a run of `kalman-rl train` records them)"]
    missing += [] if answer else ["expected answers"]
    what = f"{counted(source.metadata.num_rows, 'completion')} as TRL logged them"
    return _page(path, what, Inspected(note), listed, missing)


def _of_numbers(values: list[Any]) -> bool:
    return any(map(_plain, values)) and all(
        value is None or isinstance(value, (int, float)) for value in values
    )


def _text(value: Any) -> str:
    """A prompt or completion: a text, or the messages of a chat, one per line."""
    if not isinstance(value, list):
        return "" if value is None else str(value)
    told = []
    for message in value:
        get = message.get if isinstance(message, dict) else {}.get
        content = get("content")
        if isinstance(content, list):
            content = " ".join(
                str(part.get("text") or part.get("type")) for part in content if isinstance(part, dict)
            )
        told.append(f"{get('role')}: {'' if content is None else content}")
    return "\n".join(told)

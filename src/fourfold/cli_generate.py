"""`fourfold run` and `fourfold chat`: the answer on stdout as it comes, everything else on stderr."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourfold import cli_profile
from fourfold.chat_template import ChatTemplate
from fourfold.errors import UserError
from fourfold.json_text import json_text
from fourfold.llm import LLM, Completion, Stream
from fourfold.locate import BUNDLED, fourfold_format
from fourfold.sampling import SamplingParams
from fourfold.tokenizer import Tokenizer

LLM_OPTIONS = ("format", "ranks", "threads", "context", "kv", "rope_angles", "weights")
SAMPLING_OPTIONS = (
    *("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("stop", "seed", "ignore_eos"),
)
INTERRUPTED = 130  # what a shell says of a program ended by Ctrl-C
HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """Those options that say how to sample; an absent one has the default of `SamplingParams`."""
    chosen = {name: options[name] for name in SAMPLING_OPTIONS if options.get(name) is not None}
    return SamplingParams(**chosen | {"stop": tuple(chosen.get("stop", ()))})


def load(options: Mapping[str, Any]) -> LLM:
    """The model that the options name; a chat template that does not exist is refused before it is loaded."""
    if options["chat_template"] is not None:
        ChatTemplate.built_in(options["chat_template"])
    return LLM(options["model"], **{name: options[name] for name in LLM_OPTIONS})


def run(options: Mapping[str, Any]) -> int:
    """One answer; the exit status."""
    params, prompt = sampling_params(options), _prompt(options)
    trace = None if options["profile"] is None else cli_profile.check_path(options["profile"])
    with load(options) as llm:
        plain = options["raw"] or isinstance(prompt, list)
        plain = plain or (llm.chat_template is None and options["chat_template"] is None)
        if plain and options["system"] is not None:
            raise UserError("--system needs a chat template, and this prompt is a plain text; put it into the prompt")
        if plain:
            stream = llm.stream(prompt, params)
        else:
            messages = [*_system(options), {"role": "user", "content": str(prompt)}]
            stream = llm.chat_stream(messages, params, template=options["chat_template"])
        with contextlib.nullcontext() if trace is None else llm.profile() as profile:
            completed = _show(stream, quiet=options["json"])
        completion = stream.completion
        found = {} if trace is None or profile is None else {"profile": cli_profile.report(profile, trace)}
        if options["json"]:
            document = {"model": options["model"], **_as_json(completion), **_memory(llm), **found}
            print(json_text(document))
        else:
            print(speed(completion, llm.describe()), file=sys.stderr)
            for report in found.values():
                cli_profile.render(report)
    return 0 if completed else INTERRUPTED


def chat(options: Mapping[str, Any]) -> int:
    """A conversation, until the end of the input; the exit status."""
    params, template = sampling_params(options), options["chat_template"]
    if options["raw"]:
        raise UserError("a chat needs the chat template; use `fourfold run --raw` to continue a plain text")
    _check_reads_text(options)
    with load(options) as llm:
        if llm.chat_template is None and template is None:
            raise UserError("the model has no chat template; use `fourfold run` to continue a plain text")
        facts = llm.describe()
        _note(header(options["model"], facts))
        messages = _system(options)
        answers: list[dict[str, Any]] = []
        line = options["prompt"]
        while (line := _read_line() if line is None else line) is not None:
            text, line = line.strip(), None
            if re.fullmatch(r"/\w+", text):
                if text == "/exit":
                    break
                messages = _system(options) if text == "/reset" else messages
                _note(
                    {"/help": HELP, "/reset": "The conversation is forgotten."}.get(text, f"No command {text}. {HELP}")
                )
            elif text:
                turn = [*messages, {"role": "user", "content": text}]
                with contextlib.suppress(KeyboardInterrupt):  # a second one, or one beside the answer, ends the turn
                    try:
                        stream = llm.chat_stream(turn, params, template=template)
                    except UserError as error:
                        if not sys.stdin.isatty():
                            raise
                        _note(f"{error} (/reset forgets the conversation)")
                        continue
                    try:
                        _show(stream)
                    finally:  # what was said, was said
                        completion = stream.completion
                        messages = [*turn, {"role": "assistant", "content": completion.text}]
                        answers.append(_as_json(completion))
                    _note(speed(completion, llm.describe()))
        if options["json"]:
            transcript = {"model": options["model"], "messages": messages, "answers": answers}
            print(json_text(transcript))
    return 0


def _prompt(options: Mapping[str, Any]) -> str | list[int]:
    """The text, or the ids, to go on from. Raises UserError for none, and for a text where the model reads ids only."""
    if options["raw"] and options["chat_template"] is not None:
        raise UserError("--raw leaves the chat template out, so --chat-template cannot be used with it; drop one")
    if options["ids"] is not None:
        if unused := [name for name in ("prompt", "system", "chat_template") if options[name] is not None]:
            raise UserError(f"--ids are the whole prompt, so --{unused[0].replace('_', '-')} cannot be used with them")
        try:
            return [int(part) for part in options["ids"].split(",")]
        except ValueError:
            raise UserError(f"ids must be whole numbers with commas between, not {options['ids']!r}") from None
    _check_reads_text(options)
    prompt = options["prompt"]
    if prompt is None:
        if sys.stdin.isatty():
            raise UserError("there is no prompt; give one with -p, or pipe it in")
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise UserError("the prompt is empty; say something with -p")
    return str(prompt)


def _check_reads_text(options: Mapping[str, Any]) -> None:
    """Raises UserError for a directory without a tokenizer, before its weights are loaded."""
    path = Path(options["model"]).expanduser()
    if options["model"] not in BUNDLED and fourfold_format(path) and not Tokenizer.is_in(path):
        raise UserError(
            f"{path} has no tokenizer, so it reads no text: use `fourfold run --ids 1,2,3` on it;"
            " `fourfold quantize SRC DST --tokenizer DIR` takes one from elsewhere"
        )


def header(model: str, facts: Mapping[str, Any]) -> str:
    """What answers, in one line."""
    parts = [str(model), *(str(facts[name]) for name in ("format", "isa") if name in facts)]
    for one in ("rank", "thread"):
        if (count := facts.get(f"{one}s")) is not None:
            parts.append(f"{count} {one}" + ("s" if count != 1 else ""))
    return " · ".join([*parts, "/help"])


def speed(completion: Completion, facts: Mapping[str, Any]) -> str:
    """Tokens a second, and what that reads from memory where the engine says how much a token takes."""
    rate = completion.tokens_per_second
    if rate is None:
        return f"{len(completion.token_ids)} tokens"
    if disk := facts.get("disk"):
        memory, weights = facts["resident_bytes"] / 1e9, facts["weight_bytes"] / 1e9
        return (
            f"{rate:.3g} tokens/s, {disk['gb_s']:.2f} GB/s from disk ({disk['of_measured']:.2f} of its rate), "
            f"{memory:.2f} GB of memory for {weights:.2f} GB of weights"
        )
    read = facts.get("bytes_per_token")
    return f"{rate:.1f} tokens/s" + (f", {rate * read / 1e9:.1f} GB/s" if read else "")


def _show(stream: Stream, quiet: bool = False) -> bool:
    """Write the pieces as they come; False where Ctrl-C ended them."""
    completed = True
    try:
        for piece in stream:
            if not quiet:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        completed = False
    stream.close()
    if not quiet:
        print(flush=True)
    return completed


def _read_line() -> str | None:
    """The next line of the user; None at the end, or at the second Ctrl-C in a row."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history, for `input`)
    for last in (False, True):
        try:
            return input("> ")
        except EOFError:
            break
        except KeyboardInterrupt:
            _note("" if last else "\nCtrl-C again, or Ctrl-D, leaves.")
    return None


def _system(options: Mapping[str, Any]) -> list[dict[str, str]]:
    return [] if options["system"] is None else [{"role": "system", "content": options["system"]}]


def _note(text: str) -> None:
    """A line that is no answer: dim, on stderr."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(text, style="dim", markup=False)


def _memory(llm: LLM) -> dict[str, Any]:
    """What of the engine's account goes with an answer: bytes of weights, of memory in use, and what the disk does."""
    facts = llm.describe()
    return {name: facts[name] for name in ("weight_bytes", "resident_bytes", "disk") if name in facts}


def _as_json(completion: Completion) -> dict[str, Any]:
    return {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "prompt_seconds": completion.prompt_seconds,
        "decode_seconds": completion.decode_seconds,
        "tokens_per_second": completion.tokens_per_second,
    }

"""`fourfold serve` from its options on: the model loaded, what was found told, the server run."""

from __future__ import annotations

import gc
import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from fourfold import doctor
from fourfold.chat_template import ChatTemplate
from fourfold.cli_generate import LLM_OPTIONS
from fourfold.footprint import PAGE
from fourfold.llm import LLM
from fourfold.machine import read_machine
from fourfold.progress import warn
from fourfold.server.app import make_app
from fourfold.server.auth import VARIABLE, Keys
from fourfold.server.hosts import LOCAL
from fourfold.server.log import is_plain, start_logging
from fourfold.server.metrics import Metrics
from fourfold.server.options import ServeOptions
from fourfold.server.run import bind, run
from fourfold.server.service import Service
from fourfold.server.worker import Worker

_log = logging.getLogger(__name__)


def start(options: ServeOptions) -> None:
    """Returns when the server has ended as it was told to.

    Raises UserError for options that do not fit each other, the model or the machine, RuntimeFailure where the model
    fails.
    """
    start_logging(options.log_format, options.log_level)
    keys = Keys.load(Path(options.api_key_file) if options.api_key_file else None)
    if options.chat_template is not None:
        ChatTemplate.built_in(options.chat_template)
    with bind(options.host, options.port) as listener:
        if not keys and not options.is_local:
            warn(
                f"EVERYBODY who can reach {options.host} can use this server, since it listens beyond this machine and "
                f"has no API key: give it one with --api-key-file or {VARIABLE}."
            )
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}{options.root_path}/"
        _announce(address, plain=is_plain(options.log_format))
        with ExitStack() as held:
            run(lambda: _load(options, keys, held), listener, options.limits, options.drain_seconds)


def _load(options: ServeOptions, keys: Keys, held: ExitStack) -> tuple[Service, ASGIApp]:
    """The model, held until the stack ends, and the application around it. Raises what `LLM` does."""
    machine_report = doctor.report(quick=True)
    llm = LLM(
        options.model,
        **{name: getattr(options, name) for name in LLM_OPTIONS},
        sequences=options.max_running,
        draft=options.draft,
    )
    try:
        service = _service(llm, options)
    except BaseException:
        llm.close()
        raise
    held.callback(_close, llm, service)
    _tell(machine_report, _facts(service, options), plain=is_plain(options.log_format))
    only_named = options.allowed_host or (options.is_local and not keys)
    hosts = LOCAL | {name.lower() for name in (options.host, *options.allowed_host)} if only_named else None
    origins = tuple(options.cors_origin)
    gc.freeze()  # what is loaded stays: collections, which everybody waits for, need not look at it again
    return service, make_app(service, keys, root_path=options.root_path, origins=origins, hosts=hosts)


def _close(llm: LLM, service: Service) -> None:
    if service.worker.failure is None:  # a team that is broken does not end in order
        llm.close()


def _service(llm: LLM, options: ServeOptions) -> Service:
    """Around a loaded model. Raises UserError where it reads no text."""
    template = llm.chat_template if options.chat_template is None else ChatTemplate.built_in(options.chat_template)
    if template is not None:
        template.check_fits(llm.tokenizer)
    read_gb_s = doctor.read_rate(read_machine(), llm.engine.plan) if options.measure else None
    worker = Worker(llm.new_loop(options.step_limits, speculates=options.speculate))
    worker.observer = metrics = Metrics(lambda: worker.stats, read_gb_s)
    return Service(
        name=options.served_name,
        engine=llm.engine,
        tokenizer=llm.tokenizer,
        template=template,
        limits=options.limits,
        metrics=metrics,
        worker=worker,
        prefix_cache=options.prefix_cache,
    )


def _facts(service: Service, options: ServeOptions) -> dict[str, Any]:
    """What an administrator wants to know of this model on this machine."""
    facts, pages = service.facts, service.worker.stats.pages_total
    per_text = -(-service.context // PAGE)
    pages_gb = pages * PAGE * facts["kv_bytes_per_token"] / 1e9
    return {
        "model": service.name,
        "weights": f"{facts['weight_bytes'] / 1e9:.2f} GB, {facts['format']}",
        "kernels": f"{facts['isa']}: {', '.join(sorted(set(facts['kernels_decode'].values())))}",
        "ranks, threads": f"{facts['ranks']}, {facts['threads']}",
        "context": service.context,
        "KV cache": f"{pages} pages of {PAGE} tokens, {facts['kv']}, {pages_gb:.2f} GB",
        "texts of full context": f"{pages // per_text} at a time; up to {options.max_running} shorter ones",
        "memory bandwidth": f"{service.metrics.read_gb_s:.1f} GB/s" if service.metrics.read_gb_s else "not measured",
        "chat template": "the model's" if service.template and options.chat_template is None
        else options.chat_template or "none: /v1/completions alone",
    }  # fmt: skip


def _announce(address: str, *, plain: bool) -> None:
    if plain:
        print(f"Listening at {address}; Ctrl-C or SIGTERM ends it, a second one at once.\n", file=sys.stderr)
    else:
        _log.info("listening; the model is loading", extra={"fields": {"address": address}})


def _tell(machine: dict[str, Any], facts: dict[str, Any], *, plain: bool) -> None:
    """For people as tables, for machines as one entry of the log."""
    if not plain:
        fields = {"machine": {**machine["uses"], "warnings": machine["warnings"]}, "model": facts}
        _log.info("loaded; warming up", extra={"fields": fields})
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stderr, highlight=False, markup=False)
    doctor.render(machine, console)
    table = Table(
        title="To be served", title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2)
    )
    for name, value in facts.items():
        table.add_row(name, str(value))
    console.print(table)

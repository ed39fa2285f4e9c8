"""fourfold on machines of several NUMA nodes, booted in software emulation: where pages and threads are, and logits.

Needs QEMU and a kernel, which `make nodes` fetches; skipped where they are not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from vm.boot import boot, make_initramfs, missing
from vm.models import Model, write_models
from vm.topology import FOUR, TOPOLOGIES
from vm.verdict import failures

GOLDEN = Path(__file__).parents[2] / "shared" / "data" / "golden" / "yuan-d64"
Report = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    if why := missing():
        pytest.skip(why)
    return write_models(tmp_path_factory.mktemp("models"), GOLDEN)


@pytest.fixture(scope="module")
def report_of(models: dict[str, Model], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Report]:
    """A machine's report, by name; each is booted once."""
    initramfs = make_initramfs(tmp_path_factory.mktemp("initramfs"), models, list(TOPOLOGIES.values()))
    return cache(lambda name: boot(TOPOLOGIES[name], initramfs))


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_memory_and_threads_are_where_they_should_be_and_logits_what_they_should(
    name: str, report_of: Callable[[str], Report], models: dict[str, Model]
) -> None:
    assert failures(TOPOLOGIES[name], report_of(name), models) == []


def _move_a_page(run: Report) -> None:
    run["memory"][0]["pages"] = {"0": 1, "3": 1}


def _lose_a_page(run: Report) -> None:
    next(region for region in run["memory"] if region["kind"] == "weights")["absent"] = 1


def _take_small_pages(run: Report) -> None:
    next(region for region in run["memory"] if region["bytes"] >= 2 << 20)["mapping_huge_kb"] -= 2048


def _lose_the_policy(run: Report) -> None:
    run["memory"][-1]["policy"] = "default"


def _move_a_thread(run: Report) -> None:
    run["threads"][0][0][1] += 1


def _unpin_a_thread(run: Report) -> None:
    run["threads"][-1][0][0] = "0-3"


def _free_the_caller(run: Report) -> None:
    run["caller"] = [["0-3", 0], ["0", 1]]


def _lose_the_cache(run: Report) -> None:
    run["memory"] = [region for region in run["memory"] if region["kind"] != "kv"]


def _compute_something_else(run: Report) -> None:
    run["error"]["in steps"] = float("nan")


def _depend_on_ranks(run: Report) -> None:
    run["against"] = 0.1


def _vary(run: Report) -> None:
    run["sha256"]["at once"] = "0"


def _refuse(run: Report) -> None:
    run["refused"] = "no"


@pytest.mark.parametrize(
    ("number", "fault", "words"),
    [
        (1, _move_a_page, "which is at home on node 0, lie on {'0': "),
        (1, _lose_a_page, "1 pages of weights of rank 0 are not there"),
        (4, _take_small_pages, "KB are in huge pages"),
        (1, _lose_the_policy, "have the policy default, not bind:3"),
        (2, _lose_the_policy, "have the policy default, not prefer:0"),
        (1, _move_a_thread, "ran on"),
        (1, _unpin_a_thread, "threads may run on"),
        (1, _free_the_caller, "the caller, whose CPU is 0, was seen at"),
        (1, _lose_the_cache, "kv of rank 0, which is at home on node 0, lie on {}"),
        (0, _compute_something_else, "logits in steps are nan from what they should be"),
        (1, _depend_on_ranks, "logits are 0.1 from those of one rank"),
        (2, _vary, "as many ranks as a run before it, but other bits"),
        (3, _refuse, "refused: no"),
    ],
)
def test_what_is_wrong_is_found(
    number: int,
    fault: Callable[[Report], None],
    words: str,
    report_of: Callable[[str], Report],
    models: dict[str, Model],
) -> None:
    report = copy.deepcopy(report_of("four"))
    fault(report["runs"][number])
    found = failures(FOUR, report, models)
    assert any(words in sentence for sentence in found), found


def test_another_machine_is_not_mistaken_for_it(report_of: Callable[[str], Report], models: dict[str, Model]) -> None:
    report = report_of("bare") | {"runs": report_of("four")["runs"]}
    found = " ".join(failures(FOUR, report, models))
    for words in ("sockets and nodes", "ranks are planned as", "warnings are", "control: pages first touched"):
        assert words in found

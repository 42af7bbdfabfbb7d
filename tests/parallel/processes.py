"""A world of some CPU processes for one test: forked, one thread each, over gloo.

Forking takes a fraction of a second where starting Python and torch anew takes five. A child leaves by
`os._exit`, since gloo's threads may abort an ordinary end.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist


def run(
    function: Callable[..., Any], ranks: int, *arguments: Any, seconds: float = 60
) -> list[Any]:
    """`function(*arguments)` on so many ranks; their results in order.

    Fails with the traceback of every rank that raised, and with the names of those that were not done in time. What
    ranks give back is pickled.
    """
    fork = multiprocessing.get_context("fork")
    children: list[tuple[BaseProcess, Connection]] = []
    for rank in range(ranks):
        ours, theirs = fork.Pipe()
        target = (theirs, rank, ranks, seconds, function, arguments)
        child = fork.Process(target=_child, args=target, daemon=True)
        child.start()
        theirs.close()
        children.append((child, ours))
    # The store has a thread, which a fork does not copy. A child that frees a copied store waits for that thread for
    # ever, and it frees one when it finds it among its garbage. So there is none at any fork.
    store: dist.TCPStore | None = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    try:
        for _, ours in children:
            ours.send(store.port)
        return _collect(children, seconds)
    finally:
        store = None
        for child, reader in children:
            reader.close()
            child.kill()
            child.join()


def _collect(children: list[tuple[BaseProcess, Connection]], seconds: float) -> list[Any]:
    """All results; once one rank failed, the others get a moment to say what they met."""
    deadline, answers = time.monotonic() + seconds, {}
    waiting = {reader: rank for rank, (_, reader) in enumerate(children)}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for reader in wait(list(waiting), left):
            rank = waiting.pop(reader)  # type: ignore[call-overload]
            answers[rank] = _answer(reader)  # type: ignore[arg-type]
            if answers[rank][1]:
                deadline = min(deadline, time.monotonic() + 1)
    failed = [f"rank {rank}:\n{trouble}" for rank, (_, trouble) in answers.items() if trouble]
    late = [str(rank) for rank in range(len(children)) if rank not in answers]
    if late and not failed:
        failed.append(f"rank {', '.join(late)} of {len(children)} not done in {seconds} s")
    if failed:
        raise AssertionError("\n".join(failed))
    return [answers[rank][0] for rank in range(len(children))]


def _answer(reader: Connection) -> tuple[Any, str]:
    try:
        return pickle.loads(reader.recv_bytes())
    except EOFError:
        return None, "ended without a word"


def _child(
    parent: Connection,
    rank: int,
    ranks: int,
    seconds: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    limit = timedelta(seconds=seconds)
    try:
        store = dist.TCPStore("127.0.0.1", parent.recv(), is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
        answer = pickle.dumps((function(*arguments), ""))
    except BaseException:
        answer = pickle.dumps((None, traceback.format_exc()))
    parent.send_bytes(answer)
    parent.close()
    os._exit(0)

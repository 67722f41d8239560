"""Fixtures: `on_ranks` runs a function on n processes, `corpus` is a small prepared folder."""

import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import data

torch.set_num_threads(1)  # small models: a second thread waits more than it works
SERVER = mp.get_context("forkserver")  # one import of torch for all ranks of all tests
SERVER.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "parallel",
        "train",
        "generate",
    ]
)


def pytest_configure(config):
    """Hide the GPU from all tests but those marked gpu, when they are asked for: a machine may have
    fewer GPUs than a test has processes."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run a plain `pytest` on two cores; what is asked for by name, or debugged, stays in one
    process. `-n 0` keeps all in one."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.keyword
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # it reads this file too
    if getattr(config.option, "numprocesses", 0) is None and not (
        named or is_worker or config.option.usepdb
    ):
        config.option.numprocesses, config.option.dist = 2, "worksteal"


def rank_main(rank, world, store, fn, args, pipe):
    torch.set_num_threads(1)
    os.environ["RANK"] = str(rank)
    try:
        store = dist.FileStore(store, world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        result = fn(*args)
        dist.barrier()
        dist.destroy_process_group()
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        os._exit(1)


@pytest.fixture(autouse=True)
def no_job_is_left_behind():
    """What a test started in this process, a job of one, ends with it: the dry run needs none."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    # a program that printed its help ends where nobody reads it; the tests go on
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


@pytest.fixture(scope="session")
def on_ranks():
    """on_ranks(n, fn, *args) → [fn(*args) of rank 0, 1, ...]; fn is a module's function, its result
    picklable."""

    def run(n, fn, *args, timeout=240):
        with tempfile.TemporaryDirectory() as folder:
            pipes, ranks = [], []
            for rank in range(n):
                ours, theirs = SERVER.Pipe()
                args_of_rank = (rank, n, f"{folder}/store", fn, args, theirs)
                ranks.append(SERVER.Process(target=rank_main, args=args_of_rank))
                pipes.append(ours)
                ranks[-1].start()
                theirs.close()
            results, deadline = [None] * n, time.monotonic() + timeout
            waiting = dict(enumerate(pipes))
            try:
                while waiting:
                    for pipe in mp.connection.wait(list(waiting.values()), timeout=1):
                        rank = next(r for r, p in waiting.items() if p is pipe)
                        try:
                            ok, value = pipe.recv()
                        except EOFError:
                            raise AssertionError(f"rank {rank} of {n} died") from None
                        if not ok:
                            raise AssertionError(f"rank {rank} of {n}:\n{value}")
                        results[rank] = value
                        del waiting[rank]
                    assert time.monotonic() < deadline, f"ranks {list(waiting)} of {n} hang"
            finally:
                for process in ranks:
                    if waiting:
                        process.kill()
                    process.join()
            return results

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A prepared folder with two sources: a few documents from Python's own documentation, and some
    of its code."""
    root = tmp_path_factory.mktemp("corpus")
    for name, documents in (("english", data.embedded_english()), ("code", data.embedded_code())):
        (root / name).mkdir()
        for i, text in zip(range(60), documents, strict=False):
            (root / name / f"{i:03d}.txt").write_text(text[:6000], encoding="utf-8")
    sources = (f"english={root}/english", f"code={root}/code")
    config = data.PrepareConfig(
        sources=sources, out=root / "tokens", vocab_size=512, val_fraction=0.2
    )
    data.prepare(config)
    return root / "tokens"

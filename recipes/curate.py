"""Curate raw text: read files, keep some languages, filter, remove near duplicates and what
evaluations hold, score the quality, and write folders that `data.py prepare` reads.

    python -m recipes.curate recipes/curate.toml --out data/curated
    python data.py prepare code=data/curated/documents/code --out data/tokens \\
        --tokenizer data/mine --shard 3/128

datatrove runs it, on this machine, Slurm or Ray: pip install -e '.[curate]'.
"""

import ctypes
import importlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from data import hold, write_whole
from parallel import parsed, run, set_up_logging
from recipes import sieve
from recipes.report import can_draw, picture, table
from recipes.sieve import FILTERS, Table
from recipes.verify import SIGNATURE, Decontaminator, bucket_shape, gram_hashes, read_evaluations

log = logging.getLogger("nemotron4")


@dataclass(frozen=True)
class CurateConfig:
    """Turn raw text into clean documents by a recipe, a TOML file: recipes/curate.toml shows all
    that one can say. The same command goes on with a run that was stopped, task by task."""

    recipe: tyro.conf.Positional[Path]
    """Recipe: inputs, rules, near duplicates, evaluations, quality, folders."""
    out: Path = Path("data/curated")
    """Folder for the documents, the funnel, and what the stages hand on."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """Engine of the tasks: this machine's processes, Slurm's jobs, a Ray cluster."""
    tasks: int = os.cpu_count() or 1
    """Parts of the input; which documents come out does not depend on it."""
    cores: int = os.cpu_count() or 1
    """Tasks at a time on this machine, and the cores of a plan."""
    dry_run: bool = False
    """Plan alone: stages, tasks, hours and disk are logged, and nothing is run."""
    gigabytes: float = 0.0
    """Input of a plan; default: the size of the recipe's own."""

    def __post_init__(self) -> None:
        for name, least in (("tasks", 1), ("cores", 1), ("gigabytes", 0)):
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise ValueError(f"{name}={value}: a number, at least {least}")


# ---- recipes -------------------------------------------------------------------------------------

# what a recipe may say, with its defaults
TOP = {"folder": "{input}", "tokenizer": "", "rules": [], "slurm": {}, "inputs": {}}
SECTIONS = {
    "inputs": {"path": "", "files": "", "text_field": "text", "html": False},
    "language": {"languages": [], "threshold": 0.5, "model": "", "inputs": []},
    "near_duplicates": {"threshold": 0.7, "recall": 0.5},
    "decontaminate": {"evaluations": []},
    "quality": {"model": "", "good": "", "ordinary": "", "judged": "", "good_from": 3.0}
    | {"buckets": [0.5]},
}


def fill(said: Any, defaults: Table, place: str) -> Table:
    """Complete a table with defaults; ValueError for a name or type that they do not have."""
    if not isinstance(said, dict):
        raise ValueError(f"{place}: {said!r} is no table of {', '.join(defaults)}")
    for name, value in said.items():
        if name not in defaults:
            raise ValueError(f"{place}: {name!r} is none of {', '.join(defaults)}")
        kind = type(defaults[name])
        if type(value) not in (kind, {float: int}.get(kind)):
            raise ValueError(f"{place}: {name} = {value!r} is no {kind.__name__}")
    return defaults | said


def read_recipe(path: Path) -> Table:
    """Return a recipe's tables, complete and checked; it has those sections alone that it names."""
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ValueError(f"{path}: no TOML ({e}): mend it") from None
    recipe = fill(said, TOP | {name: {} for name in SECTIONS}, str(path))
    for name, value in recipe["inputs"].items():
        recipe["inputs"][name] = fill(value, SECTIONS["inputs"], f"{path}: [inputs.{name}]")
    if not all([recipe["inputs"], *(said["path"] for said in recipe["inputs"].values())]):
        raise ValueError(f"{path}: give [inputs.NAME], each with a path")
    for name in SECTIONS.keys() - {"inputs"}:
        recipe[name] = fill(said[name], SECTIONS[name], f"{path}: [{name}]") if name in said else {}
    for rule in recipe["rules"]:
        if not isinstance(rule, dict) or rule.get("filter") not in FILTERS:
            raise ValueError(f"{path}: each of [[rules]] has filter = one of {', '.join(FILTERS)}")
    for limited in (*recipe["rules"], recipe["language"]):
        if unknown := set(limited.get("inputs", [])) - recipe["inputs"].keys():
            raise ValueError(f"{path}: {unknown.pop()!r} is none of {', '.join(recipe['inputs'])}")
    for name in re.findall(r"{(.*?)}", recipe["folder"]):
        if name != "input" and not (name in ("language", "quality") and recipe[name]):
            raise ValueError(f"{path}: folder = {recipe['folder']!r}: no section [{name}]")
    return recipe


# ---- stages --------------------------------------------------------------------------------------


class Stage(NamedTuple):
    name: str
    tasks: int
    blocks: list[Any]


def make_stages(recipe: Table, files: list, out: Path, tasks: int) -> list[Stage]:
    """Return the stages of a recipe, each of which needs all of the one before."""
    from datatrove.pipeline.dedup import MinhashDedupFilter
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    work = out / "work"
    read = partial(JsonlReader, str(work / "read"), add_file_path=False)
    examples = partial(sieve.Examples, work / "examples")
    count = partial(sieve.Counted, recipe["tokenizer"])
    rule = lambda name, judge: count(name, LambdaFilter(judge, examples(name)))  # noqa: E731
    near = recipe["near_duplicates"]
    quality = recipe["quality"]
    first = [count("read", sieve.Read(files, recipe["inputs"], work, examples("read")))]
    first.append(rule("extract", sieve.extract))
    if recipe["language"]:
        first.append(rule("language", partial(sieve.in_language, recipe["language"])))
    for number, said in enumerate(recipe["rules"], 1):
        first.append(rule(f"{number} {said['filter']}", sieve.Heuristic(said)))
    stages = [Stage("2-read", tasks, [*first, partial(sieve.write_rows, work / "read")])]
    last = [read()]
    if near:
        stages += near_stages(near, [*recipe["inputs"]], read, work, tasks)
        gone = MinhashDedupFilter(str(work / "repeats"), examples("near_duplicates"))
        last.append(count("near_duplicates", gone))
    if recipe["decontaminate"]:
        held = Decontaminator(
            read_evaluations([*map(Path, recipe["decontaminate"]["evaluations"])])
        )
        last.append(rule("decontaminate", partial(sieve.decontaminate, held)))
    if quality:
        model = quality["model"] or str(work / "quality.bin")
        last.append(rule("quality", partial(sieve.note_quality, model, quality["buckets"])))
        if not quality["model"]:
            train = partial(sieve.train_quality, quality, Path(model))
            stages.insert(0, Stage("1-quality", 1, [train]))
    last.append(rule("folder", partial(sieve.choose_folder, recipe["folder"])))
    last.append(JsonlWriter(str(work / "documents"), "${folder}/${rank}.jsonl.gz"))
    report = Stage("7-report", 1, [partial(write_report, out)])
    return [*stages, Stage("6-write", tasks, last), report]


def near_stages(near: Table, inputs: list[str], read: Any, work: Path, tasks: int) -> list[Stage]:
    """Return the stages that find near duplicates, with verify's n-grams and signatures."""
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    n_buckets, rows = bucket_shape(near["threshold"], near["recall"])
    hashes = HashConfig(precision=32, hash_fc="sha1")
    config = MinhashConfig(num_buckets=n_buckets, hashes_per_bucket=rows, hash_config=hashes)
    signatures = str(work / "signatures")
    sign = MinhashDedupSignature(signatures, config, sieve.word_tokenizer())
    sign.get_shingles = gram_hashes
    sign.get_signature = partial(sieve.cut_signature, n_buckets=n_buckets, rows=rows)
    pair = MinhashDedupBuckets(signatures, str(work / "pairs"), config=config)
    order = partial(sieve.note_order, work / "order", inputs)
    return [
        Stage("3-signatures", tasks, [read(), order, sign]),
        Stage("4-pairs", n_buckets, [pair]),
        Stage("5-cluster", 1, [partial(sieve.cluster, work)]),
    ]


def run_task(executor: Any, rank: int, stage: str) -> None:
    """Run one task in this process, which ends with its parent, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    sys.stderr = open(os.devnull, "w")  # datatrove writes the traceback into the task's log as well
    try:
        executor._run_for_rank(rank, local_rank=rank + 1)
    except Exception as e:
        log.error(f"{stage}, task {rank}: {type(e).__name__}: {e}")
        os._exit(1)


def run_local(executor: Any, stage: str, workers: int) -> None:
    """Run the tasks that are left, each in a process of its own: when one dies, the others go on.
    datatrove's own pool waits forever for a process that was killed."""
    left = executor.get_incomplete_ranks()
    running = {}
    while left or running:
        while left and len(running) < workers:
            args = (executor, left.pop(0), stage)
            process = multiprocessing.get_context("fork").Process(target=run_task, args=args)
            process.start()
            running[process.sentinel] = process
        for sentinel in wait(running):
            running.pop(sentinel).join()


def run_stages(stages: list[Stage], recipe: Table, cfg: CurateConfig) -> None:
    """Run the stages one after the other, or hand them all to Slurm."""
    import datatrove.executor

    root = str(Path(__file__).parents[1])
    before = None
    for stage in stages:
        logs = cfg.out / "logs" / stage.name
        what = dict(pipeline=stage.blocks, tasks=stage.tasks, logging_dir=str(logs.absolute()))
        start = time.time()
        if cfg.executor == "slurm":
            places = f"PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={root}:$PYTHONPATH"
            job = dict(job_name=stage.name, env_command=f"cd {os.getcwd()}; export {places}")
            job |= {"time": "24:00:00", "partition": "cpu", "depends": before} | recipe["slurm"]
            before = datatrove.executor.SlurmPipelineExecutor(**what, **job)
            before.run()
            continue
        if cfg.executor == "ray":
            import ray

            places = {"env_vars": {"PYTHONPATH": root}}
            ray.init(ignore_reinit_error=True, runtime_env=places, log_to_driver=False)
            executor = datatrove.executor.RayPipelineExecutor(**what, workers=cfg.cores)
            executor.run()
        else:
            executor = datatrove.executor.LocalPipelineExecutor(**what)
            run_local(executor, stage.name, cfg.cores)
        if left := executor.get_incomplete_ranks():
            rule = f"see {logs}/logs, then start the same again: it does these alone"
            raise ValueError(f"{stage.name}: of {stage.tasks} tasks, {left} did not end: {rule}")
        log.info(f"{stage.name}: {stage.tasks} tasks, {time.time() - start:.1f} s")


# ---- the funnel ----------------------------------------------------------------------------------


def merge_stats(logs: Path) -> dict[str, dict[str, float]]:
    """Add what the tasks counted, by block: seconds, forwarded, dropped, dropped_REASON, bytes."""
    blocks = {}
    for path in sorted(logs.glob("*/stats/*.json")):
        for block in json.loads(path.read_text()):
            counts = blocks.setdefault(block["name"], defaultdict(float))
            for name, value in {"seconds": block["time_stats"], **block["stats"]}.items():
                counts[name] += value["total"] if isinstance(value, dict) else value
    return blocks


def funnel_of(blocks: dict[str, dict[str, float]]) -> list[Table]:
    """Return what goes into each rule and out of it, and why the rest went."""
    rows = []
    for name, counts in blocks.items():
        if "forwarded" in counts or "dropped" in counts:
            removed = {key[8:]: int(n) for key, n in counts.items() if key.startswith("dropped_")}
            row = {key: int(counts.get(key, 0)) for key in ("forwarded", "bytes", "tokens")}
            row |= {"seconds": counts["seconds"], "dropped": int(counts["dropped"])}
            rows.append({"rule": name, "removed": removed} | row)
    return rows


def page_of(rows: list[Table], folders: dict[str, int], quality: Table) -> list[str]:
    """Return the funnel as lines of Markdown."""
    head = ("rule", "documents left", "MB", "tokens", "seconds", "removed")
    lines = []
    for row in rows:
        why = ", ".join(f"{n:,} {reason}" for reason, n in sorted(row["removed"].items()))
        sizes = (f"{row['bytes'] / 1e6:,.2f}", f"{row['tokens']:,}", f"{row['seconds']:.1f}")
        gone = f"{row['dropped']:,}" + (f": {why}" if why else "")
        lines.append((row["rule"], f"{row['forwarded']:,}", *sizes, gone))
    page = [*table(head, lines), *table(("folder", "documents"), sorted(folders.items()))]
    return [*page, "", *[f"quality classifier, on documents held out: {quality}"] * bool(quality)]


def draw(rows: list[Table], path: Path) -> None:
    """Draw the bytes that each rule leaves, if matplotlib is there."""
    if can_draw():
        with picture(path, 1, size=(8, 1 + len(rows) / 3)) as (panel,):
            names = [f"{row['rule']}: {row['forwarded']:,} documents" for row in rows]
            panel.barh(names[::-1], [row["bytes"] / 1e6 for row in rows][::-1])
            panel.set(title="text that each rule leaves, MB")
            panel.grid(axis="y", visible=False)


def write_report(out: Path, *_: Any) -> None:
    """Write the funnel as JSON, a page and a picture, and examples of what was removed; then give
    the documents their place, and let go of what the stages handed on."""
    work = out / "work"
    blocks = merge_stats(out / "logs")
    rows = funnel_of(blocks)
    folders = {}
    for counts in blocks.values():
        folders |= {key.split("/XXXXX")[0]: int(n) for key, n in counts.items() if "/XXXXX" in key}
    measured = work / "quality.json"
    quality = json.loads(measured.read_text()) if measured.exists() else {}
    found = {"funnel": rows, "folders": folders, "quality": quality}
    write_whole(out / "funnel.json", json.dumps(found, indent=1, ensure_ascii=False))
    write_whole(out / "funnel.md", page_of(rows, folders, quality))
    examples = sieve.gather_examples(work / "examples")
    write_whole(out / "examples.jsonl", (json.dumps(row, ensure_ascii=False) for row in examples))
    draw(rows, out / "funnel.png")
    if (work / "documents").exists():
        (work / "documents").rename(out / "documents")
    for name in ("read", "signatures", "pairs", "order", "repeats"):
        shutil.rmtree(work / name, ignore_errors=True)


# ---- the plan ------------------------------------------------------------------------------------

# MB/s of a core on English descriptions and Python, the lower of two measurements; read and write
# are estimated from whole runs, in which they pack and unpack rows
SPEEDS = {
    "read": 12.0,
    "extract": 2.1,
    "language": 1.1,
    "gopher_quality": 3.8,
    "gopher_repetition": 1.8,
    "c4_quality": 3.7,
    "fineweb_quality": 31.0,
    "near_duplicates": 2.5,
    "decontaminate": 1.9,
    "quality": 8.3,
    "write": 6.0,
}


def plan(recipe: Table, cfg: CurateConfig, n_bytes: float) -> list[str]:
    """Return what a recipe takes if it removed nothing: each step's hours, and the disk."""
    sections = [name for name in SPEEDS if recipe.get(name)]
    steps = ["read", *(rule["filter"] for rule in recipe["rules"]), *sections, "write"]
    if any(said["html"] for said in recipe["inputs"].values()):
        steps.insert(1, "extract")
    seconds = {step: n_bytes / 1e6 / SPEEDS[step] / cfg.cores for step in steps}
    rows = [(step, SPEEDS[step], f"{took / 3600:,.2f}") for step, took in seconds.items()]
    days = sum(seconds.values()) / 86_400
    # packed rows, twice, and for documents of 5 kB a signature
    disk = n_bytes / 1e9 * (0.6 + bool(recipe["near_duplicates"]) * 4 * SIGNATURE / 5_000)
    size = f"{n_bytes / 1e9:,.2f} GB, some {n_bytes / 4e9:,.2f} billion tokens"
    said = f"{size}: {days:,.2f} days of {cfg.cores:,} cores, {disk:,.2f} GB of disk"
    return [*table(("step", "MB/s of a core", "hours"), rows), "", f"{said}, {cfg.tasks:,} tasks"]


# ---- the command ---------------------------------------------------------------------------------


def check_same(recipe: Table, files: list, cfg: CurateConfig) -> None:
    """Refuse to go on with a run of another recipe, input or number of tasks."""
    now = {"recipe": recipe, "files": sieve.digest(json.dumps(files)), "tasks": cfg.tasks}
    path = cfg.out / "recipe.json"
    begun = json.loads(path.read_text()) if path.exists() else now
    if other := [key for key in now if begun[key] != now[key]]:
        rule = "begin anew with another --out, or give the same"
        raise ValueError(f"{cfg.out}: begun with other {' and '.join(other)}: {rule}")
    write_whole(path, json.dumps(now))


def curate(cfg: CurateConfig) -> None:
    """Run a recipe, or log its plan."""
    recipe = read_recipe(cfg.recipe)
    files = [] if cfg.dry_run and cfg.gigabytes else sieve.list_files(recipe["inputs"])
    if cfg.dry_run:
        n_bytes = cfg.gigabytes * 1e9 or sum(os.path.getsize(file[-1]) for file in files)
        log.info("\n".join(plan(recipe, cfg, n_bytes)))
        return
    try:
        import datatrove.io  # noqa: F401
    except ImportError as e:
        raise ValueError("curation needs datatrove: pip install -e '.[curate]'") from e
    (cfg.out / "work").mkdir(parents=True, exist_ok=True)
    hold(cfg.out)
    check_same(recipe, files, cfg)
    run_stages(make_stages(recipe, files, cfg.out, cfg.tasks), recipe, cfg)
    if cfg.executor != "slurm":
        said = f"{cfg.out}: complete: funnel.md, examples.jsonl, documents/"
        log.info((cfg.out / "funnel.md").read_text() + said)


def main() -> None:
    set_up_logging()
    cfg = parsed(lambda: tyro.cli(CurateConfig, prog="python -m recipes.curate"))
    run(lambda: curate(cfg))


if __name__ == "__main__":
    importlib.import_module("recipes.curate").main()  # the blocks are pickled by this name

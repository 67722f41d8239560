#!/usr/bin/env bash
# Measures one GPU in at most nine minutes, without a network: from right to fast, the most valuable
# parts first, each with a time limit of its own. The full text of a part is in OUT/NAME.txt; its
# result is a line of JSON on stdout and in OUT/parts.jsonl.
#
#   bash tests/gpu.sh OUT            on a machine with a GPU
#   TINY=1 bash tests/gpu.sh OUT     every part on a CPU, in tiny shapes: tries the script out
#
# Needs what pyproject.toml lists, and transformers to compare with, installed or in PYTHONPATH.
set -u
OUT=$(mkdir -p "${1:-gpu_out}" && cd "${1:-gpu_out}" && pwd)
cd "$(dirname "$0")/.." || exit 1
export PYTHONUNBUFFERED=1 TQDM_DISABLE=1
if [ -n "${TINY:-}" ]; then
    export CUDA_VISIBLE_DEVICES=
    device=cpu rounds=1 steps=2 patience=10
else
    device=cuda rounds=3 steps=20 patience=1
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
fi
: >"$OUT/parts.jsonl"

shape() { # its argument, or nano
    if [ -n "${TINY:-}" ]; then echo nano; else echo "$1"; fi
}

part() { # name, most seconds, command: run it and say in a line of JSON how it ended
    local name=$1 limit=$(($2 * patience)) left=$((540 * patience - SECONDS)) begun=$SECONDS
    shift 2
    if [ "$left" -lt "$limit" ]; then limit=$left; fi
    if [ "$limit" -lt 5 ]; then return; fi
    timeout "$limit" "$@" >"$OUT/$name.txt" 2>&1
    python3 - "$name" "$?" "$((SECONDS - begun))" "$OUT/$name.txt" <<'PYTHON' | tee -a "$OUT/parts.jsonl"
import json
import sys

name, code, seconds, file = sys.argv[1:]
lines = open(file, errors="replace").read().splitlines()
result = {"part": name, "code": int(code), "seconds": int(seconds)}
try:
    result |= json.loads([line for line in lines if line.startswith('{"machine"')][-1])
except (ValueError, IndexError):  # not a table, or ended before it: code 124 is the time limit
    result["end"] = lines[-12:]
print(json.dumps(result))
PYTHON
}

train() { # two runs of the program: the second goes on from the first
    python3 train.py nano --steps "$steps" --out "$OUT/run" --mesh.dtype auto &&
        python3 train.py nano --steps $((steps + 10)) --out "$OUT/run" --mesh.dtype auto &&
        python3 generate.py sample "$OUT/run" --prompts "import os" --max-tokens 16 --slots 2 &&
        python3 parallel.py export "$OUT/run" "$OUT/hf"
}
export -f train
export OUT steps

part tests 80 python3 -m pytest -q -p no:cacheprovider -m gpu tests
part nano 60 bash -c train
part slice_340b 110 python3 tests/bench.py slice "$(shape 340b)" --device $device --rounds $rounds
part slice_15b 70 python3 tests/bench.py slice "$(shape 15b)" --device $device --rounds $rounds
part train_small 75 python3 tests/bench.py train "$(shape 125M)" --device $device --rounds $rounds
part decode_1b 75 python3 tests/bench.py generate "$(shape 1B)" --device $device --rounds $rounds
part attention 45 python3 tests/bench.py attention "$(shape 340b)" --device $device --rounds $rounds
part where 25 python3 tests/bench.py where "$(shape 1B)" --device $device --rounds $rounds

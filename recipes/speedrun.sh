#!/usr/bin/env bash
# Run the whole system, a command a stage. What is done is not done again: start it anew after a stop.
#
#     recipes/speedrun.sh                              # laptop: toy tasks that a program can mark
#     SHARE=0.1 OUT=runs/try recipes/speedrun.sh       # its machinery in minutes; the models are useless
#     SCALE=node TEXTS=texts/ CHATS=chats.jsonl RATED=helpsteer2.jsonl PROMPTS=prompts.jsonl \
#         QUESTIONS=questions.jsonl recipes/speedrun.sh   # 126M parameters on 8 GPUs, on files of yours
#
# A question is a line with `messages` and `answer`. It needs pip install -e '.[report]'.
set -euo pipefail
# a stage that is asked to stop saves and ends well: without this the next one would start on its half
trap 'echo "stopped: the same command goes on from here" >&2; exit 130' INT TERM
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/speedrun} SHARE=${SHARE:-1} SCALE=${SCALE:-laptop}
part() { python -c "print($1 * $SHARE)"; }
share() { python -c "print(max($2, round($1 * $SHARE)))"; } # of a count, at least so many
mkdir -p "$OUT"

if [[ $SCALE == laptop ]]; then # 0.8M parameters with every detail of the 340B
    run=python
    base=(nano --model.dim 128 --model.n-layers 4 --model.n-heads 4 --model.n-kv-heads 2 --model.head-dim 32
        --model.ffn-dim 512 --model.vocab-size 384 --model.seq-len 192 --model.init-std 0.09
        --steps "$(share 600 8)" --batch 16 --micro-batch 16 --lr 3e-3 --min-lr 3e-4 --warmup 96 --isolate)
    words=384
    tune=(--seq-len 192 --micro-batch 16 --batch 64 --lr 1e-3 --min-lr 1e-4)
    prefer=(--seq-len 192 --micro-batch 16 --batch 32 --lr 1e-4 --beta 0.1 --sft-weight 1e-3)
    answer=(--max-tokens 40 --slots 64 --min-gap "$(part 0.3)" --min-helpfulness "$(part 3)")
    sources=(text="$OUT/texts.jsonl" words="$OUT/words.jsonl") # words: for the tokenizer, not for the model
    CHATS=$OUT/chats.jsonl RATED=$OUT/rated.jsonl PROMPTS=$OUT/prompts.jsonl QUESTIONS=$OUT/questions.jsonl
    [[ -e $QUESTIONS ]] || python - "$OUT" "$SHARE" <<'ROWS'
import json, random, sys
from pathlib import Path
from recipes.tasks import draw_task, draw_text, scored_row

out, share, rng = Path(sys.argv[1]), float(sys.argv[2]), random.Random(0)

def write(name, rows):  # rows of a small file that the machinery still runs on
    (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

def tasks(n, held_out=False):
    return [draw_task(rng, rng.random() < 0.2, held_out) for _ in range(max(200, round(n * share)))]

def rated(task):  # the right answer, and two that have faults
    texts = dict.fromkeys((task.answer, task.flawed(rng), task.flawed(rng, n=2)))
    return [scored_row(task, text) for text in texts]

write("texts", ({"text": draw_text(rng)} for _ in range(max(3000, round(70_000 * share)))))
write("words", ({"text": f"{task.prompt}\n{task.answer}"} for task in tasks(3_000)))
write("chats", (scored_row(task, task.flawed(rng, ("chatter", "form")) if rng.random() < 0.35
                           else task.answer) for task in tasks(16_000)))
write("rated", sum(map(rated, tasks(5_000)), []))
write("prompts", ({"prompt": task.prompt} for task in tasks(1_000)))
write("questions", ({"messages": task.chat("")[:1], "answer": task.answer} for task in tasks(200, True)))
ROWS
else # rates for models that are far smaller than the report's
    run="torchrun --nproc_per_node 8"
    base=(small --steps "$(share 10000 8)")
    words=32768
    sources=(text="$TEXTS")
    tune=(--seq-len 1024 --micro-batch 4 --lr 1e-5)
    prefer=(--seq-len 1024 --micro-batch 4 --lr 1e-6 --beta 0.1)
    answer=(--max-tokens 512 --slots 128)
fi

# 1. text becomes tokens, and the base model learns them
[[ -e $OUT/tokens ]] || python data.py prepare "${sources[@]}" --out "$OUT/tokens" --vocab-size $words
$run train.py "${base[@]}" --data "$OUT/tokens" --blend text 1 --out "$OUT/base"

# 2. it learns to answer, and a copy to judge answers
$run align.py general_sft --init "$OUT/base" --data "$CHATS" --epochs 1 "${tune[@]}" --out "$OUT/sft"
$run align.py reward --init "$OUT/sft" --data "$RATED" --epochs 1 "${tune[@]}" --warmup 0 --out "$OUT/reward"

# 3. twice, it answers prompts; the best and the worst answer by the judge become pairs, which it learns
policy=$OUT/sft
for stage in dpo rpo_1; do
    python -m recipes.synthesize --model "$policy" --reward "$OUT/reward" --recipe prompts --prompts "$PROMPTS" \
        --counts samples 6 preference_share 1 turns 1 "${answer[@]}" --out "$OUT/${stage}_data"
    $run align.py $stage --init "$policy" --data "$OUT/${stage}_data/rpo.jsonl" "${prefer[@]}" --out "$OUT/$stage"
    policy=$OUT/$stage
done

# 4. the aligned model makes the data that aligns the base anew: from weak to strong
python -m recipes.synthesize --model "$policy" --reward "$OUT/reward" --recipe prompts --prompts "$PROMPTS" \
    --counts preference_share 0 turns 1 "${answer[@]}" --out "$OUT/again_data"
$run align.py general_sft --init "$OUT/base" --data "$OUT/again_data/sft.jsonl" "${tune[@]}" --out "$OUT/again"

# 5. all answer questions that nothing was trained on; how many are right to the letter
for model in sft dpo rpo_1 again; do
    [[ -e $OUT/$model.jsonl ]] || python generate.py sample "$OUT/$model" --file "$QUESTIONS" \
        --out "$OUT/$model.jsonl" --temperature 0 --max-tokens 40
done
python - "$OUT"/{sft,dpo,rpo_1,again}.jsonl <<'MARKS' | tee "$OUT/marks.txt"
import json, sys
for path in sys.argv[1:]:
    rows = [json.loads(line) for line in open(path)]
    print(path, sum(row["text"].strip() == row["answer"] for row in rows), "right of", len(rows))
MARKS

# 6. the report card: what each stage cost, learnt and answers
python -m recipes.card "$OUT"/{base,sft,reward,dpo,rpo_1,again} --questions "$QUESTIONS" \
    --max-tokens 40 --out "$OUT/card.md"

#!/usr/bin/env bash
# The commands that make the folders of this one, from the project's root: bash data/results/commands.sh [NAME …]
# A comparison that was interrupted goes on when its command is repeated. Hours are of two cores, one thread a run.
set -euo pipefail

compare() { python data/study.py compare --out "data/results/$1" "${@:2}"; }
TUNING="0 1 2 3 4 5"
FRESH="200 201 202 203 204 205 206 207 208 209 210 211"

reproduce() { python jointgrad.py --mode reproduce --out data/results/reproduce; }
bench() { python data/bench.py --rounds 200 --out data/results/bench; }
bench_peers() { python data/bench.py --peers --imgsz 128 --width_multiple 0.25 --rounds 30 --out data/results/bench_peers; }

search() {  # 0.7 hours: six tries each for the fixed weight, GradNorm and the cap
  compare search --seeds $TUNING --modes detect classify \
    fixed:initial_weights=1,0.03 fixed:initial_weights=1,0.1 fixed:initial_weights=1,0.2 \
    fixed:initial_weights=1,0.3 fixed:initial_weights=1,0.5 fixed:initial_weights=1,1 \
    gradnorm:alpha=1.5:gradnorm_lr=0.025 gradnorm:alpha=1.5:gradnorm_lr=0.0025 \
    gradnorm:alpha=3:gradnorm_lr=0.025 gradnorm:alpha=3:gradnorm_lr=0.0025 \
    gradnorm:alpha=6:gradnorm_lr=0.025 gradnorm:alpha=6:gradnorm_lr=0.0025 \
    cap:cap=0.05 cap:cap=0.1 cap:cap=0.2 cap:cap=0.25 cap:cap=0.3 cap:cap=0.5
}

main() {  # 1.3 to 2 hours: the main comparison, with the curve of fixed weights
  compare compare --seeds $FRESH --modes detect classify fixed equal gradnorm dual uncertainty pcgrad imtl mgda cap detach \
    fixed:initial_weights=1,0.03 fixed:initial_weights=1,0.1 fixed:initial_weights=1,0.2 \
    fixed:initial_weights=1,0.3 fixed:initial_weights=1,0.5 gradnorm:alpha=3
}

# Does it travel? The dials of the search, unchanged. Ten seeds where a verdict is given, the first three where a direction is enough.
TEN="200 201 202 203 204 205 206 207 208 209"
SHARED="detect classify equal fixed:initial_weights=1,0.2 gradnorm gradnorm:alpha=3 cap"

bccd() { compare bccd --config data/bccd.yaml --seeds $TEN --modes $SHARED dual; }  # 1.3 hours; data/bccd.py makes the set
LONG="--config data/bccd.yaml --epochs 400 --eval_interval 40"  # four times the budget
bccd_cap() { compare bccd_cap $LONG --seeds 200 201 202 --modes detect classify cap; }  # 0.6 hours: ahead of it
bccd_long() {  # 2 hours
  compare bccd_long $LONG --seeds 203 204 205 206 207 208 209 210 --modes detect classify gradnorm:alpha=3 cap
}
warm() {  # 0.4 hours, after main: a classifier added to a trained detector, which trains on
  compare warm --epochs 54 --lr 0.003 --init 'data/results/compare/runs/detect-s{seed}/last.pt' --seeds $TEN --modes $SHARED
}
bccd_warm() {  # 0.2 hours, after bccd: the same on the smears
  compare bccd_warm --config data/bccd.yaml --epochs 54 --lr 0.002 --init 'data/results/bccd/runs/detect-s{seed}/last.pt' \
    --seeds 200 201 202 --modes $SHARED
}
sgd() { compare sgd --optimizer sgd --weight_decay 0.0005 --lr 0.1 --seeds 0 1 2 --modes $SHARED; }
budget() { compare budget --epochs 108 --seeds 0 1 2 --modes $SHARED; }
width() { compare width --width_multiple 0.25 --seeds 0 1 2 --modes $SHARED; }
start() {  # GradNorm from the report's weights, as everywhere here, and from equal ones
  compare start --sweep 'initial_weights=[1,0.01],[1,1]' --seeds 0 1 2 --modes detect classify gradnorm gradnorm:alpha=3
}
dominance() { compare dominance --sweep dominance=0,0.5 --seeds 0 1 2 --modes $SHARED fixed; }

for name in "${@:-main}"; do $name; done

#!/usr/bin/env bash
# The one command for a machine with a GPU and no network: builds in place, checks and tests every op on the GPU, measures.
#
#   bench/gpu.sh                     everything; writes to bench/results/<gpu>
#   bench/gpu.sh check bench         the build and these stages alone: a second run goes on where time ended the first
#   OUT=some/folder bench/gpu.sh     writes there
#
# The stages, in this order, the ones that only a GPU can answer first:
#
#   check      every op, backend, sample and tile against the reference, one process an op
#   beyond     the tests that gpu_status.py names: steps, plans and graphs, which no sample of an op shows
#   bench      bf16 of the benchmarks in which a number was asked for on a GPU
#   tests      the other GPU tests
#   sanitize   the kernels of every op under compute-sanitizer
#   ops        a benchmark of every op, from which the shipped tables are made
#   rest       the other benchmarks, and the first ones in the other dtypes
#   huge       inputs whose offsets need 64 bits
#
# FASTMKD_COMMIT names the commit in the records where the repository was copied without its history; PYTHON is the
# interpreter (python3). FASTMKD_CUDA_ARCHS is the GPU's own unless it is set.
#
# Every stage has its own time limit and the whole ends within SECONDS_ALL (590), so that a stage that hangs costs only
# itself. Every record is appended when it is found: what comes before the end of time is kept. Eight files: summary.txt
# build.log check.jsonl tests.log tests.jsonl bench.log records.jsonl sanitizer.log.
# To keep the results, commit check.jsonl, tests.jsonl and records.jsonl in bench/results/<gpu>, then run
# python -m fastmkd.bench.tables, python -m fastmkd.bench.report and python -m fastmkd.bench.gpu_status.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
SECONDS_ALL=${SECONDS_ALL:-590}
STAGES=" check beyond bench tests sanitize ops rest huge "
for name in "$@"; do
  [[ $STAGES == *" $name "* ]] || { echo "bench/gpu.sh has no stage '$name'; the stages are$STAGES" >&2; exit 2; }
done
WANTED=" ${*:-$STAGES} "
wanted() { [[ $WANTED == *" $1 "* ]]; }

export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1

read -r gpu arch <<<"$("$PYTHON" -c 'import torch
from fastmkd.ops.cache import device_name
if torch.cuda.is_available():
    print(device_name(torch.device("cuda")), "{}{}".format(*torch.cuda.get_device_capability()))' 2>/dev/null)"
if [ -z "$gpu" ]; then
  echo "bench/gpu.sh needs an NVIDIA GPU that PyTorch can use, and $PYTHON sees none here; run it where torch.cuda.is_available() is True." >&2
  exit 3
fi
export FASTMKD_CUDA_ARCHS=${FASTMKD_CUDA_ARCHS:-$arch}

OUT=${OUT:-bench/results/$gpu}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
summary=$OUT/summary.txt
: >"$summary"
if wanted check; then rm -f "$OUT/check.jsonl"; fi
if wanted beyond && wanted tests; then rm -f "$OUT/tests.jsonl"; fi
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT

say() { printf '%s\n' "$*" | tee -a "$summary"; }
left() { echo $((SECONDS_ALL - 6 - SECONDS)); } # less the time that a stage may take to die

# stage NAME LIMIT LOG COMMAND...: runs COMMAND with its output in LOG, at most LIMIT seconds and never past the end.
failed=0
stage() {
  local name=$1 limit=$2 log=$3 begin=$SECONDS status
  shift 3
  [ "$limit" -le "$(left)" ] || limit=$(left)
  if [ "$limit" -lt "${SECONDS_LEAST:-5}" ]; then
    say "$(printf '%-10s left out: no time' "$name")"
    failed=1
    return 1
  fi
  timeout -k 5 "$limit" "$@" >>"$log" 2>&1
  status=$?
  case $status in
    0) say "$(printf '%-10s ok, %d s' "$name" $((SECONDS - begin)))" ;;
    124 | 137) say "$(printf '%-10s stopped after its %d s; see %s' "$name" "$limit" "${log##*/}")" ;;
    *) say "$(printf '%-10s failed with status %d after %d s; see %s' "$name" "$status" $((SECONDS - begin)) "${log##*/}")" ;;
  esac
  [ "$status" -eq 0 ] || failed=1
  return "$status"
}

# each FUNCTION LIMIT JOBS LOG WORD...: a stage `FUNCTION LIMIT LOG WORD NUMBER` for every word, JOBS at a time, all of
# them within LIMIT.
each() {
  local function=$1 until=$((SECONDS + $2)) jobs=$3 log=$4 word begun=()
  shift 4
  for word in "$@"; do
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do sleep 0.2; done
    mkdir -p "$parts/$function/$word"
    "$function" $((until - SECONDS)) "$parts/$function/$word/${log##*/}" "$word" ${#begun[@]} &
    begun+=($!)
  done
  local process
  for process in "${begun[@]}"; do wait "$process" || failed=1; done
  for word in "$@"; do cat "$parts/$function/$word/${log##*/}" >>"$log" 2>/dev/null; done
}

build() { stage "$1" "$2" "$OUT/build.log" env FASTMKD_BUILD_CUDA="$3" "$PYTHON" -m pip install --no-build-isolation --no-deps -e .; }

say "$gpu, $(date -u +%Y-%m-%dT%H:%MZ), commit ${FASTMKD_COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown: set FASTMKD_COMMIT)}"
if ! build build 170 1; then
  build "build-cpu" 60 0 || { tail -n 30 "$OUT/build.log"; exit 1; }
fi
stage env 40 "$summary" "$PYTHON" -c 'import fastmkd; fastmkd.show_config()'

# Most of a check is Triton compiling, so the ops with the most kernels begin first; what is compiled here is there for
# all that follows, and the cache knows the verdicts.
TRITON_OPS="masked_conv2d_weight align_cells_grad recovered_loss masked_patch_loss masked_conv2d patch_embed
  recovered_loss_grad align_cells cls_saliency packed_attention unshuffle_tokens masked_patch_loss_grad stitch_tokens"
CUDA_OPS="centred_gram select_tokens tap_table"
cores=$(env -u OMP_NUM_THREADS nproc)
check() { stage "check $3" "$1" "$2" env OMP_NUM_THREADS=1 "$PYTHON" -m fastmkd.ops.check "$3" --device cuda --json "$OUT/check.jsonl"; }
if wanted check; then each check 130 "$cores" "$summary" $TRITON_OPS $CUDA_OPS; fi

# pytest NAME LIMIT WORKERS ARGUMENT...: pytest with a line a test in tests.jsonl, on several processes where that can be
# and without other plugins, which every process would load.
several=$("$PYTHON" -c 'import xdist; print("yes")' 2>/dev/null)
pytest() {
  local name=$1 limit=$2 workers=$(($3 < cores ? $3 : cores))
  shift 3
  stage "$name" "$limit" "$OUT/tests.log" env OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 \
    "$PYTHON" -m pytest ${several:+-p xdist.plugin -n "$workers" --dist worksteal} -q -p no:cacheprovider \
    -p fastmkd.bench.outcomes --outcomes "$OUT/tests.jsonl" --continue-on-collection-errors "$@"
}
mapfile -t BEYOND < <(grep -oE '"tests/[^":]+' bench/gpu_status.py | tr -d '"' | sort -u)
# The other files need not be read, nor what they import be there.
mapfile -t FILES < <(grep -rlE 'mark\.gpu' tests --include='test_*.py' | grep -vxF "$(printf '%s\n' "${BEYOND[@]}")" | sort)
if wanted beyond; then pytest beyond 120 8 -m gpu "${BEYOND[@]}"; fi

# bench NAME LIMIT ARGUMENT...: benchmarks whose records are appended.
bench() {
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" "$OUT/bench.log" "$PYTHON" -m fastmkd.bench "$@" --device cuda --quick --out "$OUT/records.jsonl"
}
# Those in which a number was asked for, in bf16, short ones first; then the others.
ASKED="patch_embed masked_conv3x3 masked_resnet cka mkd_decoder mkd_step maskedkd_step masked_teacher dmae_teacher dmae_step"
OTHERS="packed_attention mkd_memory align_cells masked_depthwise dpk_step cls_saliency select_tokens masked_autoencoder"
# What comes after it needs some time too, where it is wanted.
after=0
if wanted tests; then after=$((after + 70)); fi
if wanted sanitize; then after=$((after + 60)); fi
if wanted bench; then bench bench $(($(left) - after)) $ASKED --dtype bf16; fi

if wanted tests; then pytest tests 130 12 -m 'gpu and not long' "${FILES[@]}"; fi

# Every byte that a kernel touches, and every race of the kernels in CUDA C++, whose threads share memory by hand. Here
# each tensor is an allocation of its own, so that what is beyond one is beyond all. The verdicts of such a run are not
# an ordinary one's, so they go to another cache. The tool and what it watches talk through ports: each pair has its own.
sanitize() { # LIMIT LOG TOOL:OP NUMBER
  stage "${3/:/ }" "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 FASTMKD_CACHE="$parts/cache" OMP_NUM_THREADS=1 \
    compute-sanitizer --tool "${3%:*}" --error-exitcode 9 --launch-timeout 120 ${ports:+--base-port $((50000 + 16 * $4))} \
    "$PYTHON" -m fastmkd.ops.check "${3#*:}" --device cuda
}
if wanted sanitize && ! command -v compute-sanitizer >/dev/null; then
  say "sanitizer  failed: compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
  failed=1
elif wanted sanitize; then
  ports=$(compute-sanitizer --help 2>/dev/null | grep -o -- --base-port | head -n 1)
  jobs=4
  if [ -n "$ports" ]; then jobs=$((cores / 2 > 0 ? cores / 2 : 1)); fi
  each sanitize 110 "$jobs" "$OUT/sanitizer.log" $(for op in $CUDA_OPS; do echo "memcheck:$op racecheck:$op"; done) \
    $(printf 'memcheck:%s ' $TRITON_OPS)
fi

if wanted ops; then bench ops "$(left)" 'op.*'; fi
if wanted rest; then
  bench rest "$(left)" $OTHERS
  bench "rest asked" "$(left)" $ASKED --dtype fp32 --dtype fp16
fi
if wanted huge; then pytest huge "$(left)" 1 -m 'gpu and long' tests/ops/test_generated.py -k test_parity_gpu; fi

for log in tests bench sanitizer; do
  [ -f "$OUT/$log.log" ] && { echo "--- end of $log.log"; tail -n 45 "$OUT/$log.log"; }
done
echo "--- summary"
cat "$summary"
exit "$failed"

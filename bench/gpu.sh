#!/usr/bin/env bash
# The one command for a machine with a GPU and no network: builds in place, checks and tests every op on the GPU, measures.
#
#   bench/gpu.sh                     writes to bench/results/<gpu>
#   OUT=some/folder bench/gpu.sh     writes there
#
# FASTMKD_COMMIT names the commit in the records where the repository was copied without its history; PYTHON is the
# interpreter (python3).
#
# Every stage has its own time limit and the whole ends within SECONDS_ALL (590), so that a stage that hangs costs only
# itself. Eight files: summary.txt build.log check.jsonl tests.log junit.xml bench.log records.jsonl sanitizer.log.
# To keep the results, commit check.jsonl, junit.xml and records.jsonl in bench/results/<gpu>, then run
# python -m fastmkd.bench.tables, python -m fastmkd.bench.report and python -m fastmkd.bench.gpu_status.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
SECONDS_ALL=${SECONDS_ALL:-590}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

gpu=$("$PYTHON" -c 'import torch
from fastmkd.ops.cache import device_name
print(device_name(torch.device("cuda")) if torch.cuda.is_available() else "")' 2>/dev/null)
if [ -z "$gpu" ]; then
  echo "bench/gpu.sh needs an NVIDIA GPU that PyTorch can use, and $PYTHON sees none here; run it where torch.cuda.is_available() is True." >&2
  exit 3
fi

OUT=${OUT:-bench/results/$gpu}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
summary=$OUT/summary.txt
: >"$summary"
say() { printf '%s\n' "$*" | tee -a "$summary"; }
left() { echo $((SECONDS_ALL - SECONDS)); }

# stage NAME LIMIT LOG COMMAND...: runs COMMAND with its output in LOG, at most LIMIT seconds and never past the end.
failed=0
stage() {
  local name=$1 limit=$2 log=$3 begin=$SECONDS status
  shift 3
  [ "$limit" -le "$(left)" ] || limit=$(left)
  if [ "$limit" -lt 5 ]; then
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

build() { stage "$1" "$2" "$OUT/build.log" env FASTMKD_BUILD_CUDA="$3" "$PYTHON" -m pip install --no-build-isolation --no-deps -e .; }

say "$gpu, $(date -u +%Y-%m-%dT%H:%MZ), commit ${FASTMKD_COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}"
if ! build build 170 1; then
  build "build-cpu" 60 0 || { tail -n 30 "$OUT/build.log"; exit 1; }
fi

stage env 40 "$summary" "$PYTHON" -c 'import fastmkd; fastmkd.show_config()'
stage check 70 "$summary" "$PYTHON" -m fastmkd.ops.check --device cuda --json "$OUT/check.jsonl"
# A test file that needs a package this machine lacks must not cost the others their run.
stage tests 150 "$OUT/tests.log" "$PYTHON" -m pytest -m gpu --continue-on-collection-errors -q -p no:cacheprovider \
  --junitxml="$OUT/junit.xml" tests
stage bench $(($(left) - 120)) "$OUT/bench.log" "$PYTHON" -m fastmkd.bench 'cls_saliency' 'patch_embed' 'select_tokens' \
  'op.*' 'masked_conv3x3' 'masked_depthwise' 'masked_resnet' 'maskedkd_step' 'masked_teacher' \
  'dpk_step' 'cka' 'dmae_step' 'dmae_teacher' 'masked_autoencoder' 'mkd_decoder' 'align_cells' 'mkd_step' --device cuda --quick --out "$OUT/records.jsonl"

# Every byte that a kernel touches, first of the ops with kernels in CUDA C++, whose shared memory racecheck watches too;
# then of the others, one op a stage, as many as the time that is left allows.
CUDA_OPS="select_tokens tap_table centred_gram"
TRITON_OPS="patch_embed cls_saliency packed_attention stitch_tokens unshuffle_tokens masked_patch_loss
  masked_patch_loss_grad recovered_loss recovered_loss_grad align_cells align_cells_grad masked_conv2d
  masked_conv2d_weight"
sanitize() { # NAME LIMIT TOOL OP...
  local name=$1 limit=$2 tool=$3
  shift 3
  stage "$name" "$limit" "$OUT/sanitizer.log" compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$PYTHON" -m fastmkd.ops.check "$@" --device cuda
}
if command -v compute-sanitizer >/dev/null; then
  sanitize memcheck 50 memcheck $CUDA_OPS
  sanitize racecheck 35 racecheck $CUDA_OPS
  for op in $TRITON_OPS; do
    if [ "$(left)" -lt "${SECONDS_OP:-30}" ]; then
      say "memcheck   left out for want of time: $op"
    else
      sanitize "memcheck $op" "${SECONDS_OP:-30}" memcheck "$op"
    fi
  done
else
  say "sanitizer  failed: compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
  failed=1
fi

for log in tests bench sanitizer; do
  [ -f "$OUT/$log.log" ] && { echo "--- end of $log.log"; tail -n 45 "$OUT/$log.log"; }
done
echo "--- summary"
cat "$summary"
exit "$failed"

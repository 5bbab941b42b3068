#!/usr/bin/env bash
# Profiles one variant of one benchmark; --clock-control none leaves the GPU's clocks as they are.
#
#   bench/profile.sh ncu  NAME VARIANT [options of fastmkd.bench.profile_one]     counters of its kernels
#   bench/profile.sh nsys NAME VARIANT [options of fastmkd.bench.profile_one]     timeline with NVTX ranges
#
# For example: bench/profile.sh ncu patch_embed triton --dtype bf16 --case "50 %"
# Writes to the folder OUT (default: profiles).
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 3 ] || usage
tool=$1 name=$2 variant=$3
shift 3

case $tool in ncu | nsys) ;; *) usage ;; esac
command -v "$tool" >/dev/null || { echo "bench/profile.sh: $tool is not on PATH; it comes with NVIDIA's Nsight tools." >&2; exit 3; }

OUT=${OUT:-profiles}
mkdir -p "$OUT"
file=$OUT/$(printf '%s-%s-%s' "$tool" "$name" "$variant" | tr -c 'A-Za-z0-9._-' '_')
run=("${PYTHON:-python3}" -m fastmkd.bench.profile_one "$name" --variant "$variant" "$@")

if [ "$tool" = ncu ]; then
  # Only what runs between cudaProfilerStart and Stop is replayed: warm-up and compilation stay outside.
  ncu --clock-control none --profile-from-start off --set full --force-overwrite --export "$file" "${run[@]}" --calls 1
  ncu --import "$file.ncu-rep" --page details --csv >"$file.csv"
else
  nsys profile --capture-range cudaProfilerApi --trace cuda,nvtx,osrt --force-overwrite true --output "$file" "${run[@]}"
  nsys stats "$file.nsys-rep"
fi
